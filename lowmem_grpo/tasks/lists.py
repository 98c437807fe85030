"""Answers of several parts: sets and lists in any order, tuples and intervals in theirs."""

from __future__ import annotations

import re
from collections.abc import Callable

from lowmem_grpo.tasks.spelling import one_spelling

__all__ = ["same_list"]

_OPENING, _CLOSING = "([{", ")]}"
_BETWEEN = re.compile(r"\s(?:and|or)\s", re.IGNORECASE)
_NAME = re.compile(r"\A\s*[A-Za-z]\w{0,9}\s*(?:=|\\in\b|\u2208)\s*")
_MOST, _LONGEST = 30, 600


def same_list(one: str, other: str, same: Callable[[str, str], bool]) -> bool:
    """Whether both are lists of two parts or more, of one kind, and their parts the same."""
    first, second = _parts(one), _parts(other)
    if first is None or second is None:
        return False
    (brackets, parts), (other_brackets, others) = first, second
    if brackets != other_brackets or len(parts) != len(others):
        return False
    if brackets != "{}":
        return all(map(same, parts, others))
    for part in parts:
        at = next((i for i, each in enumerate(others) if same(part, each)), None)
        if at is None:
            return False
        del others[at]
    return True


def _parts(text: str) -> tuple[str, list[str]] | None:
    """The brackets around a list, "{}" where it has none, and its parts."""
    text = one_spelling(text).strip(" \t\n$.")
    if len(text) > _LONGEST:
        return None
    text = _NAME.sub("", text.replace("\\{", "{").replace("\\}", "}"))
    brackets = "{}"
    if len(text) > 1 and text[0] in _OPENING and text[-1] in _CLOSING and _is_one_pair(text):
        brackets, text = text[0] + text[-1], text[1:-1]
    else:
        text = _BETWEEN.sub(",", text.replace(", and ", ",").replace(", or ", ","))
    parts, depth, start = [], 0, 0
    for i, sign in enumerate(text):
        depth += (sign in _OPENING) - (sign in _CLOSING)
        if sign == "," and depth == 0:
            parts.append(text[start:i].strip())
            start = i + 1
    parts.append(text[start:].strip())
    if not 2 <= len(parts) <= _MOST or not all(parts):
        return None
    return brackets, parts


def _is_one_pair(text: str) -> bool:
    """Whether the bracket that opens `text` is closed at its end, and not before: (1,2),(3,4)."""
    depth = 0
    for i, sign in enumerate(text):
        depth += (sign in _OPENING) - (sign in _CLOSING)
        if depth <= 0:
            return i == len(text) - 1
    return False
