"""A prompt as chat messages: how a cell of a table becomes them, and which part of them is what.

A message has a role and a content. Content may come as a list of text parts, which are joined with
nothing between them, as the chat templates that take such lists do; behind this file it is always
text. A prompt that ends in a message of the assistant has the beginning of the completion in it
(prefilled): completions go on from there.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, NoReturn

from lowmem_grpo.plain_json import parse_json
from lowmem_grpo.text_files import half_character

__all__ = ["after_system", "prefilled", "question", "read_messages", "split_prefilled"]

Messages = Sequence[dict[str, Any]]

_JSON_CHAT = re.compile(r'\s*\[\s*\{\s*"(role|content)"\s*:')
_JSON_OBJECTS = re.compile(r'\s*(\[\s*)?\{\s*"')
_PYTHON_CHAT = re.compile(r"\s*(array\()?\[\s*\{\s*'(role|content)'\s*:")
_TEXT_PARTS = ("text", "input_text", None)


def read_messages(prompt: Any) -> tuple[dict[str, Any], ...]:
    """The messages of a prompt that is a text, which the user says, or a list of messages, also
    when that list is written as JSON. Raises ValueError that says what is wrong.
    """
    if isinstance(prompt, str):
        if half := half_character(prompt):
            raise ValueError(f"{half} in it is half of a character: give text in UTF-8")
        if not prompt.strip():
            raise ValueError(f"{prompt!r:.60} asks nothing")
        if _PYTHON_CHAT.match(prompt):
            raise ValueError(f"{prompt!r:.60} is a chat as Python shows it: write it as JSON")
        chat = _chat_in(prompt)
        if chat is None:
            return ({"role": "user", "content": prompt},)
        prompt = chat
    if isinstance(prompt, dict):
        found = _shown(prompt)
        raise ValueError(f"{found} is one object: a text or a list of chat messages is expected")
    if not isinstance(prompt, list) or not prompt:
        raise ValueError(f"{_shown(prompt)} is not a text or a list of chat messages")
    messages = tuple(_read_message(message) for message in prompt)
    _check_end(messages)
    return messages


def _chat_in(text: str) -> Any:
    """The chat that `text` is as JSON, or None where it is something else. Raises ValueError for
    one that cannot be read.
    """
    if not _JSON_OBJECTS.match(text):
        return None
    try:
        found = parse_json(text)
    except ValueError:
        if _JSON_CHAT.match(text):
            raise
        return None
    if isinstance(found, dict):
        return found if "messages" in found or {"role", "content"} <= found.keys() else None
    keys = found[0].keys()
    return found if {"role", "content"} & keys or {"from", "value"} <= keys else None


def split_prefilled(messages: Messages) -> tuple[list[dict[str, Any]], str]:
    """The messages up to the assistant's turn, and what the assistant's turn begins with, which is
    mostly nothing.
    """
    text = prefilled(messages)
    return list(messages[:-1] if text else messages), text


def after_system(messages: Messages, system_prompt: str | None) -> tuple[dict[str, Any], ...]:
    """`messages` after that system prompt, unless there is none or they have a system message of
    their own.
    """
    if system_prompt is None or messages[0]["role"] == "system":
        return tuple(messages)
    return ({"role": "system", "content": system_prompt}, *messages)


def prefilled(messages: Messages) -> str:
    """What the completion's turn begins with: the content of a last message of the assistant, else
    "".
    """
    return messages[-1]["content"] if messages[-1]["role"] == "assistant" else ""


def question(messages: Messages) -> str:
    """The content of the message that a completion answers."""
    return split_prefilled(messages)[0][-1]["content"]


def _read_message(message: Any) -> dict[str, Any]:
    if not isinstance(message, dict):
        _refuse(message, "is not an object with a role and a content")
    if "role" not in message and "from" in message and "value" in message:
        _refuse(message, "has 'from' and 'value': name them 'role' and 'content', with the roles "
                "user and assistant")  # fmt: skip
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str) or not role.strip():
        _refuse(message, "is without a role in text")
    if isinstance(content, list):
        content = "".join(_text_of(part, message) for part in content)
    if content is None and message.get("tool_calls"):
        content = ""
    if not isinstance(content, str):
        _refuse(message, "is without a content in text")
    # An empty system message says that there is none, which keeps a template's own out.
    if not content.strip() and role != "system" and not message.get("tool_calls"):
        _refuse(message, f"is an empty one of the {role}: leave it out")
    # Arrow fills every message with the names that any has; to templates a name says something.
    given = {name: value for name, value in message.items() if value is not None}
    return {**given, "content": content}


def _text_of(part: Any, message: dict[str, Any]) -> str:
    if isinstance(part, str):
        return part
    if isinstance(part, dict):
        # Arrow fills every part of a column with the names that any of them has.
        given = {name: value for name, value in part.items() if value is not None}
        if given.get("type") in _TEXT_PARTS and isinstance(given.get("text"), str):
            if more := [name for name in given if name not in ("type", "text")]:
                _refuse(
                    message, f"has a text part with {', '.join(more)}: text alone is trained on"
                )
            return given["text"]
        kind = given.get("type", ", ".join(given))
        _refuse(message, f"has a part that is no text but '{kind}': text alone is trained on")
    _refuse(message, f"has {_shown(part)} as a part of its content, which is no text")


def _check_end(messages: Messages) -> None:
    last = messages[-1]
    if last["role"] in ("system", "developer"):
        _refuse(last, f"is of the {last['role']} and the last one: nobody asks anything")
    if last["role"] != "assistant":
        return
    if last.get("tool_calls"):
        _refuse(last, "of the assistant is the last one and calls a tool: there is nothing to say")
    if len(messages) == 1 or messages[-2]["role"] in ("assistant", "system", "developer"):
        _refuse(last, "of the assistant is the last one and answers nobody: it follows no question")


def _refuse(message: Any, why: str) -> NoReturn:
    raise ValueError(f"the message {_shown(message)} {why}")


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
