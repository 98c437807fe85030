"""JSON that somebody else wrote, read strictly.

The standard reader takes a name that comes twice in one object, of which the last wins, text that
is not UTF-8, and ends in a RecursionError where a document is nested too deeply. Here each of them
is an error. NaN and Infinity pass, which models' configurations have; whoever reads numbers looks
at them.
"""

import json
from typing import Any

__all__ = ["parse_json"]


def parse_json(data: str | bytes) -> Any:
    """The value in `data` (bytes: UTF-8, with or without a byte order mark). Raises ValueError that
    says what is wrong.
    """
    try:
        text = data.decode("utf-8-sig") if isinstance(data, bytes) else data
        return json.loads(text, object_pairs_hook=_once)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the name {twice!r:.60} comes twice")
    return found
