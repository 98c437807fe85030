"""Applies a chat template, which is a program of a stranger's, within a time.

transformers runs templates in Jinja's sandbox. That keeps them from files and attributes, and one
`range` from more than 100,000 numbers; two loops within each other may still take a year. So a
template runs in a thread of its own, into which an exception is put when its time is over: this
ends a loop on every platform, whichever thread asks.
"""

import ctypes
import threading
import time
from typing import Any

from lowmem_grpo.errors import ModelError

__all__ = ["TemplateTimeout", "apply_chat_template"]

SECONDS = 5.0  # of the clock and of the processor: templates take a thousandth of one
_STEP = 0.1


class TemplateTimeout(ModelError):
    """A chat template did not come to its end."""


class _Stop(BaseException):
    """Ends the template's thread; no Exception, which Jinja would describe."""


def apply_chat_template(tokenizer, messages: list[dict[str, Any]], **how: Any) -> str:
    """The text that a tokenizer's chat template makes of messages; `how`: what
    `tokenizer.apply_chat_template` takes beside them.

    Raises TemplateTimeout after `SECONDS`, and whatever the template raises.
    """
    found: list[str] = []
    errors: list[Exception] = []

    def run() -> None:
        try:
            found.append(tokenizer.apply_chat_template(messages, tokenize=False, **how))
        except Exception as error:  # a template is a program, which can raise anything
            errors.append(error)
        except _Stop:
            pass

    thread = threading.Thread(target=run, name="chat template", daemon=True)
    begun, worked = time.monotonic(), time.process_time()
    thread.start()
    thread.join(_STEP)
    while thread.is_alive():
        # Of the processor as well: a process that was stopped for a while has not been looping.
        if min(time.monotonic() - begun, time.process_time() - worked) > SECONDS:
            ctypes.pythonapi.PyThreadState_SetAsyncExc(
                ctypes.c_ulong(thread.ident), ctypes.py_object(_Stop)
            )
            raise TemplateTimeout(
                f"a chat template did not end within {SECONDS:g} s: does it loop?"
            )
        thread.join(_STEP)
    if errors:
        raise errors[0]
    return found[0]
