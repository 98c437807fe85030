"""Columns of a record by name, nested ones by a dotted name, and the answer that a cell gives.

`reward_model.ground_truth` is the key `ground_truth` in the column `reward_model`. A column whose
own name has the dot comes first.
"""

from __future__ import annotations

import datetime
import math
from collections.abc import Iterator
from decimal import Decimal
from typing import Any

from lowmem_grpo.errors import nearest
from lowmem_grpo.plain_json import parse_json

ABSENT = object()
"""What `lookup` returns for a column that a row does not have: None is a cell like others."""
_SHOWN = 12


def lookup(row: Any, name: str) -> Any:
    """The cell of `row` under a name, which may be dotted, or `ABSENT`."""
    if not isinstance(row, dict):
        return ABSENT
    if name in row:
        return row[name]
    at = name.find(".")
    while at >= 0:
        found = lookup(row.get(name[:at]), name[at + 1 :])
        if found is not ABSENT:
            return found
        at = name.find(".", at + 1)
    return ABSENT


def dotted_names(row: dict[str, Any]) -> Iterator[str]:
    """Every name that `lookup` finds in `row` and under which is no further one."""
    for name, value in row.items():
        if isinstance(value, dict) and value:
            yield from (f"{name}.{rest}" for rest in dotted_names(value))
        else:
            yield name


def names_in(row: dict[str, Any]) -> str:
    """The names of `row` for a message, the first dozen of them."""
    names = list(dotted_names(row))
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def meant(name: str, row: dict[str, Any]) -> str:
    """A hint at the name in `row` that `name` may be meant for: a nested column with that name, or
    the nearest; else nothing.
    """
    names = list(dotted_names(row))
    nested = [other for other in names if other.rpartition(".")[2] == name]
    if nested:
        return f" (did you mean {' or '.join(map(repr, nested[:3]))}?)"
    return nearest(name, names)


def answer_of(value: Any) -> str | list[str]:
    """The answer that a cell gives: a text, or of a list the accepted ones, also where that is a
    text in JSON (["72"]).

    A float is its shortest decimal, never with an exponent, and a whole one has no point; a date is
    in ISO form, a bool "True" or "False". Raises `ValueError`, with words for "has ...", for a cell
    that gives none.
    """
    if isinstance(value, str) and value.lstrip().startswith('["'):
        value = _written_list(value)
    if not isinstance(value, (list, tuple)):
        return _text(value)
    if not value:
        raise ValueError("has an empty list of accepted answers")
    return [_text(each, " in its list of accepted answers") for each in value]


def _written_list(text: str) -> str | list[str]:
    """The texts of a list that is written as JSON (["72"]), or the text where it is none."""
    try:
        found = parse_json(text)
    except ValueError:
        return text
    return found if all(isinstance(each, str) for each in found) else text


def _text(value: Any, place: str = "") -> str:
    if isinstance(value, bytes):
        try:
            value = value.decode()
        except UnicodeDecodeError as error:
            raise ValueError(f"has bytes{place} that are not UTF-8 text") from error
    if isinstance(value, str):
        if not value.strip():
            raise ValueError(f"has {value!r}{place}")
        return value
    if isinstance(value, (bool, int)):
        return str(value)
    if isinstance(value, (float, Decimal)):
        if not math.isfinite(value):
            raise ValueError(f"has {value!r}{place}")
        # Never 1e-05, and 72 for 72.0: what a model would write.
        number = Decimal(repr(value)) if isinstance(value, float) else value
        whole = number == number.to_integral_value()
        text = format(number.to_integral_value() if whole else number, "f")
        return "0" if not number else text
    if isinstance(value, (datetime.date, datetime.time)):
        return value.isoformat()
    raise ValueError(f"has {_named(value)}{place}")


def _named(value: Any) -> str:
    if isinstance(value, dict):
        return f"nested columns ({names_in(value)})"
    if isinstance(value, (list, tuple)):
        return f"a list of lists, {value!r:.40}"
    return f"{value!r:.60}" if value is None else f"{value!r:.60} ({type(value).__name__})"
