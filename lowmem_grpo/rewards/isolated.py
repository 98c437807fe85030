"""A reward function in a child process (`isolation/`): what it does costs its scores, never the
run.

It is called once, with all completions of whole groups, and never again for them: a function that
compares completions with each other would have other results. Where that brings no list of one
value for each (it raised, died, took too long or returned something else), none has a score.

Functions of our own that look at each completion by itself are asked again with one at a time where
that happens, and those that fail alone have failed. All of this takes at most twice the time limit,
of which a single completion gets an eighth.
"""

from __future__ import annotations

import math
import numbers
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from lowmem_grpo.errors import UserError
from lowmem_grpo.isolation.worker import Failure, Worker, WorkerFailure, WorkerSetupError
from lowmem_grpo.tasks.base import Problem

__all__ = ["Isolated", "Values", "answering"]

Values = list[float | list[float] | Failure | None]
"""Of each completion: its value, or one for each of its steps; None where the function says that it
does not apply; or why there is none.
"""
_SINGLES = 8


class Isolated:
    """The reward function that `worker` holds. `request`: what its handler gets besides completions
    and fields. `limit_s`: for all completions of a call, or for so many `together`. `apart`: it
    looks at each completion by itself, and may be asked for one at a time.
    """

    def __init__(
        self,
        worker: Worker,
        limit_s: float,
        request: dict[str, Any] | None = None,
        together: int | None = None,
        *,
        apart: bool,
    ):
        self._worker, self._limit_s, self._request = worker, limit_s, request or {}
        self._together, self._apart = together, apart

    def __call__(self, completions: list[str], problems: list[Problem], **fields: Any) -> Values:
        """Never raises for what the function does."""
        fields["problems"] = [asdict(problem) for problem in problems]
        limit_s = self._limit_s * -(-len(completions) // (self._together or len(completions)))
        found = self._ask(completions, fields, limit_s)
        if isinstance(found, list):
            return found
        if len(completions) == 1 or not self._apart:
            return [found] * len(completions)
        end = time.monotonic() + limit_s
        single = self._limit_s if self._together else 0.0
        values: Values = []
        for i, text in enumerate(completions):
            left = min(end - time.monotonic(), max(limit_s / _SINGLES, single))
            if left <= 0:
                values += [found] * (len(completions) - i)
                break
            one = self._ask([text], {name: [of[i]] for name, of in fields.items()}, left)
            values += one if isinstance(one, list) else [one]
        return values

    def _ask(self, completions: list[str], fields: dict, limit_s: float) -> Values | Failure:
        request = {**self._request, "completions": completions, "fields": fields}
        try:
            reply = self._worker.call(request, limit_s)
        except WorkerFailure as error:
            return error.failure
        except (UserError, WorkerSetupError) as error:  # it could start before
            return Failure("died", f"it cannot start again: {error}")
        # A child can send anything: what is taken is looked at here.
        if not isinstance(reply, list) or len(reply) != len(completions):
            return Failure("invalid", str(reply)[:200])
        return [_taken(value) for value in reply]


def _taken(value: Any) -> float | list[float] | Failure | None:
    if value is None or _is_number(value):
        return value
    if isinstance(value, list) and value and all(map(_is_number, value)):
        return value
    return Failure("invalid", f"it returned {str(value)[:100]}, not a finite number")


def _is_number(value: Any) -> bool:
    return isinstance(value, float) and math.isfinite(value)


def answering(function: Callable[..., Any], where: str = "") -> Callable[..., list | str]:
    """The child's side: a handler that calls `function` and returns plain values, each a float or
    None or text that shows what it was instead; or text that says what the whole was. `where`:
    FILE:LINE of the function, for that.
    """
    place = f" ({where})" if where else ""

    def handler(completions: list[str], fields: dict[str, Any]) -> list | str:
        fields["problems"] = [
            Problem(**{**problem, "messages": tuple(problem["messages"])})
            for problem in fields["problems"]
        ]
        returned = function(completions=completions, **fields)
        # Arrays and tensors turn themselves into plain numbers; no package is needed to ask.
        values = returned.tolist() if hasattr(returned, "tolist") else returned
        if not isinstance(values, (list, tuple)):
            kind = type(returned).__name__
            return f"it returned {_short(returned)} ({kind}), not a list of numbers{place}"
        if len(values) != len(completions):
            count = f"{len(values)} value{'' if len(values) == 1 else 's'}"
            return (
                f"it returned {count} for {len(completions)} completions: "
                f"it must return one for each{place}"
            )
        return [_plain(value) for value in values]

    return handler


def _plain(value: Any) -> float | list | str | None:
    if hasattr(value, "tolist"):
        value = value.tolist()
    elif hasattr(value, "item"):
        value = value.item()
    if value is None:
        return None
    if isinstance(value, numbers.Real) and math.isfinite(value):
        return float(value)
    if isinstance(value, (list, tuple)) and not any(isinstance(x, (list, tuple)) for x in value):
        return [_plain(x) for x in value]
    return f"{_short(value)} ({type(value).__name__})"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
