"""JSON that somebody else wrote, read strictly.

The standard reader takes a name that comes twice in one object, of which the last wins, text that
is not UTF-8, half of a surrogate pair, which cannot be written again, and ends in a RecursionError
where a document is nested too deeply. Here each of them is an error. NaN and Infinity pass, which
models' configurations have; whoever reads numbers looks at them.
"""

import json
import re
from collections.abc import Iterator
from typing import Any

from lowmem_grpo.text_files import decoded, half_character

__all__ = ["array_items", "parse_json"]

_SPACE = re.compile(r"[ \t\n\r]*")
_ESCAPED = re.compile(r"\\u[dD][89a-fA-F]")


def parse_json(data: str | bytes) -> Any:
    """The value in `data` (bytes: UTF-8, with or without a byte order mark). Raises ValueError that
    says what is wrong.
    """
    text = decoded(data) if isinstance(data, bytes) else data
    try:
        value = json.loads(text, object_pairs_hook=_once)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if _ESCAPED.search(text):
        _check_characters(value, "")
    return value


def array_items(text: str) -> Iterator[tuple[int, int]]:
    """Where the items of the one array in `text` begin and end. Raises ValueError where it is not
    JSON.
    """
    decoder, end = json.JSONDecoder(), _SPACE.match(text).end()
    if text[end : end + 1] != "[":
        raise json.JSONDecodeError("Expecting an array", text, end)
    after = _SPACE.match(text, end + 1).end()
    closed = text[after : after + 1] == "]"
    while not closed:
        try:
            _, end = decoder.raw_decode(text, after)
        except RecursionError:
            raise ValueError("nested too deeply") from None
        yield after, end
        end = _SPACE.match(text, end).end()
        if text[end : end + 1] not in (",", "]"):
            raise json.JSONDecodeError("Expecting ',' or ']'", text, end)
        closed = text[end] == "]"
        after = end if closed else _SPACE.match(text, end + 1).end()
    end = _SPACE.match(text, after + 1).end()
    if end != len(text):
        raise json.JSONDecodeError("Extra data", text, end)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the name {twice!r:.60} comes twice")
    return found


def _check_characters(value: Any, place: str) -> None:
    if isinstance(value, str) and (half := half_character(value)):
        raise ValueError(f"{half}{place} is half of a surrogate pair, and no character: mend it")
    if isinstance(value, dict):
        for name, item in value.items():
            _check_characters(name, place)
            _check_characters(item, place or f" in {name!r:.60}")
    elif isinstance(value, list):
        for item in value:
            _check_characters(item, place)
