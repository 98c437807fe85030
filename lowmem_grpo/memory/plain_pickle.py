"""Read a pickle that holds nothing but dicts, lists, tuples, numbers and text; run nothing.

The standard unpickler can be told to refuse classes, but still lets a file crash the process (a
dict key of a million nested tuples overflows the C stack) or take all memory (a memo index of
2^32). So the opcodes are split by `pickletools` and interpreted here, by an allow-list: whatever
could import, call, or build anything else is an error before it has any effect.

Left out: bytes, sets, byte strings of Python 2, shared buffers, and dict keys other than text and
whole numbers. About a microsecond for an opcode, a second for 3 MB.
"""

from __future__ import annotations

import pickletools

MAX_DEPTH = 100  # containers under construction at once; a snapshot needs 7

_NUMBERS = frozenset(("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4"))
_FLOATS = frozenset(("FLOAT", "BINFLOAT"))
_TEXTS = frozenset(("UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"))
_VALUES = _NUMBERS | _FLOATS | _TEXTS
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_GET = frozenset(("GET", "BINGET", "LONG_BINGET"))
_PUT = frozenset(("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"))
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


def load(data: bytes) -> object:
    """The object in `data`. Raises `ValueError` that says what is wrong, and where (byte)."""
    stack: list = []
    marks: list[int] = []
    memo: dict[int, object] = {}
    position = 0
    try:
        for opcode, argument, start in pickletools.genops(data):
            name, position = opcode.name, start
            if name in _VALUES:
                stack.append(argument)
            elif name in _GET:
                stack.append(memo[argument])
            elif name in _PUT:
                memo[len(memo) if name == "MEMOIZE" else argument] = stack[-1]
            elif name == "MARK":
                marks.append(len(stack))
                if len(marks) > MAX_DEPTH:
                    raise ValueError(f"nested deeper than {MAX_DEPTH}")
            elif name == "EMPTY_DICT":
                stack.append({})
            elif name == "EMPTY_LIST":
                stack.append([])
            elif name in _CONSTANTS:
                stack.append(_CONSTANTS[name])
            elif name in _TUPLES:
                stack.append(tuple(_take(stack, len(stack) - _TUPLES[name])))
            elif name in ("TUPLE", "LIST", "DICT"):
                items = _take(stack, marks.pop())
                if name == "DICT":
                    stack.append({})
                    _set_items(stack[-1], items)
                else:
                    stack.append(tuple(items) if name == "TUPLE" else items)
            elif name in ("APPEND", "APPENDS"):
                items = _take(stack, len(stack) - 1 if name == "APPEND" else marks.pop())
                if type(stack[-1]) is not list:
                    raise ValueError("items for something that is not a list")
                stack[-1].extend(items)
            elif name in ("SETITEM", "SETITEMS"):
                items = _take(stack, len(stack) - 2 if name == "SETITEM" else marks.pop())
                _set_items(stack[-1], items)
            elif name == "STOP":
                return stack.pop()
            elif name not in ("PROTO", "FRAME"):
                raise ValueError(f"{name}, which plain containers do not need")
    except (IndexError, KeyError):
        raise ValueError(f"byte {position}: refers to an object that is not there") from None
    except ValueError as error:
        raise ValueError(f"byte {position}: {error}") from None
    raise ValueError(f"byte {position}: no end")


def _take(stack: list, start: int) -> list:
    if not 0 <= start <= len(stack):
        raise IndexError
    items = stack[start:]
    del stack[start:]
    return items


def _set_items(target: object, items: list) -> None:
    keys = items[::2]
    # Any other key would be hashed: a deeply nested tuple overflows the C stack there.
    if type(target) is not dict or len(items) % 2 or any(type(k) not in (str, int) for k in keys):
        raise ValueError("dict entries that are not pairs with a text or whole-number key")
    target.update(zip(keys, items[1::2], strict=True))
