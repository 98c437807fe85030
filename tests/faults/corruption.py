"""Damage to a file or a directory, each a pure function of (content, random numbers).

    BYTES       of any file: bits, lengths, a page of zeros, another kind of file in its place
    DOCUMENTS   of JSON, a line of JSON lines, TOML, and the header of safetensors: names twice,
                values of another type, NaN, huge numbers, nesting without end
    WEIGHTS     of safetensors: numbers that are none

What a corruption does is in its name, which is a row of the table that the slow tests print.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from random import Random

__all__ = ["BYTES", "DOCUMENTS", "WEIGHTS", "corruptions", "snapshot"]

Corruption = Callable[[Path, Random], None]
PAGE = 4096
DEEP = 20_000  # beyond what any reader takes
PICTURE = b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR\x00\x00\x00\x01\x00\x00\x00\x01\x08\x06\x00\x00\x00"
_MARK = "@@here@@"


def corruptions(path: Path) -> dict[str, Corruption]:
    """Those that suit a file, by name."""
    found = dict(BYTES)
    if path.suffix in (".json", ".jsonl", ".toml", ".safetensors"):
        found |= DOCUMENTS
    if path.suffix == ".safetensors":
        found |= WEIGHTS
    return found


def snapshot(directory: Path) -> dict[str, bytes | str]:
    """Everything below a directory: the bytes of files, where links lead, and directories."""
    found: dict[str, bytes | str] = {}
    for entry in sorted(directory.rglob("*")):
        name = str(entry.relative_to(directory))
        if entry.is_symlink():
            found[name] = f"-> {os.readlink(entry)}"
        else:
            found[name] = entry.read_bytes() if entry.is_file() else "a directory"
    return found


# --- Bytes


def _changed(change: Callable[[bytearray, Random], bytes | bytearray]) -> Corruption:
    def corrupt(path: Path, random: Random) -> None:
        path.write_bytes(change(bytearray(path.read_bytes()), random))

    return corrupt


def _flip(content: bytearray, random: Random) -> bytearray:
    content[random.randrange(len(content))] ^= 1 << random.randrange(8)
    return content


def _flip_many(content: bytearray, random: Random) -> bytearray:
    for _ in range(20):
        _flip(content, random)
    return content


def _zeros(content: bytearray, random: Random) -> bytearray:
    start = random.randrange(len(content))
    size = min(PAGE, len(content) - start)
    content[start : start + size] = bytes(size)
    return content


def _not_utf8(content: bytearray, random: Random) -> bytearray:
    place = random.randrange(len(content) + 1)
    content[place:place] = random.choice([b"\xff\xfe", b"\xc3\x28", b"\xed\xa0\x80", b"\x80"])
    return content


def _become(kind: str) -> Corruption:
    def corrupt(path: Path, random: Random) -> None:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
        if kind == "directory":
            path.mkdir()
        elif kind == "link":
            path.symlink_to(path.parent / "nowhere" / path.name)
        elif kind == "loop":
            path.symlink_to(path.name)

    return corrupt


def _swap(path: Path, random: Random) -> None:
    """Change places with another file of its directory, of its kind if there is one."""
    others = sorted(p for p in path.parent.iterdir() if p.is_file() and p != path)
    alike = [p for p in others if p.suffix == path.suffix] or others
    if not alike:
        path.write_bytes(b"")
        return
    other = random.choice(alike)
    mine, theirs = path.read_bytes(), other.read_bytes()
    path.write_bytes(theirs)
    other.write_bytes(mine)


BYTES: dict[str, Corruption] = {
    "one bit flipped": _changed(_flip),
    "twenty bits flipped": _changed(_flip_many),
    "cut off": _changed(lambda content, random: content[: random.randrange(len(content))]),
    "longer": _changed(lambda content, random: content + random.randbytes(random.randint(1, 99))),
    "a page of zeros": _changed(_zeros),
    "not UTF-8": _changed(_not_utf8),
    "empty": _changed(lambda content, random: b""),
    "a picture": _changed(lambda content, random: PICTURE + random.randbytes(64)),
    "swapped": _swap,
    "gone": _become("nothing"),
    "a directory": _become("directory"),
    "a link to nowhere": _become("link"),
    "a link to itself": _become("loop"),
}

# --- Documents


def _places(value, here=()) -> list[tuple]:
    """The paths to every value in a document but the whole."""
    inside = value.items() if isinstance(value, dict) else enumerate(value)
    found = []
    for key, item in inside:
        found.append((*here, key))
        if isinstance(item, (dict, list)):
            found += _places(item, (*here, key))
    return found


def _with(text: str, random: Random, put: Callable[[object], str]) -> str:
    """JSON with `put(value)`, as text, for one of its values."""
    document = json.loads(text)
    places = _places(document) if isinstance(document, (dict, list)) else []
    if not places:
        return put(document)
    *way, last = random.choice(places)
    inside = document
    for key in way:
        inside = inside[key]
    raw = put(inside[last])
    inside[last] = _MARK
    return json.dumps(document).replace(f'"{_MARK}"', raw, 1)


def _twice(text: str, random: Random) -> str:
    """JSON with a name twice in one of its objects, with two values."""
    document = json.loads(text)
    if not isinstance(document, dict) or not document:
        return '{"a": 1, "a": 2}'
    places = [(), *_places(document)]
    random.shuffle(places)
    for way in places:
        inside = document
        for key in way:
            inside = inside[key]
        if isinstance(inside, dict) and inside:
            name = random.choice(sorted(inside))
            inside[_MARK] = 0
            raw = f"{json.dumps(name)}: {random.choice(['1', '[]', chr(34) + 'x' + chr(34)])}"
            return json.dumps(document).replace(f'"{_MARK}": 0', raw, 1)
    return text


def _without(text: str, random: Random) -> str:
    document = json.loads(text)
    places = [place for place in _places(document) if isinstance(place[-1], str)]
    if not places:
        return "{}"
    *way, last = random.choice(places)
    inside = document
    for key in way:
        inside = inside[key]
    del inside[last]
    return json.dumps(document)


def _other_type(value: object, random: Random) -> str:
    kinds = {"null": type(None), "true": bool, "7": int, '"x"': str, "[1, 2]": list, "{}": dict}
    kinds |= {"-1": int, "0.5": float}
    return random.choice([raw for raw, kind in kinds.items() if type(value) is not kind])


def _json(kind: str) -> Callable[[str, Random], str]:
    def change(text: str, random: Random) -> str:
        if kind == "a name twice":
            return _twice(text, random)
        if kind == "a name missing":
            return _without(text, random)

        def put(value: object) -> str:
            if kind == "another type":
                return _other_type(value, random)
            if kind == "not finite":
                return random.choice(["NaN", "Infinity", "-Infinity", "1e999"])
            if kind == "enormous":
                return random.choice(["1" * 5000, "9" * 30, "1e300", "-1" + "0" * 25])
            nest = random.choice(["[]", '{"a":}'])
            return nest[: len(nest) - 1] * DEEP + nest[-1] * DEEP

        return _with(text, random, put)

    return change


def _toml(kind: str) -> Callable[[str, Random], str]:
    def change(text: str, random: Random) -> str:
        lines = text.splitlines()
        at = random.choice([i for i, line in enumerate(lines) if re.match(r"\w+ = ", line)])
        name, _, value = lines[at].partition(" = ")
        value = value.partition("  #")[0]
        if kind == "a name twice":
            lines.insert(at, f"{name} = 1")
        elif kind == "a name missing":
            del lines[at]
        elif kind == "another type":
            kinds = ["true", "7", '"x"', "[1, 2]", "{a = 1}", "1979-05-27", "-1", "0.5"]
            lines[at] = f"{name} = {random.choice([k for k in kinds if k[:1] != value[:1]])}"
        elif kind == "not finite":
            lines[at] = f"{name} = {random.choice(['nan', 'inf', '-inf', '1e999'])}"
        elif kind == "enormous":
            lines[at] = f"{name} = {random.choice(['1' * 5000, '9' * 30, '1e300', '9' * 18])}"
        else:
            lines[at] = f"{name} = {'[' * DEEP}{']' * DEEP}"
        return "\n".join(lines) + "\n"

    return change


def _document(kind: str) -> Corruption:
    """The corruption of that kind, in the language of the file."""

    def corrupt(path: Path, random: Random) -> None:
        if path.suffix == ".safetensors":
            content = path.read_bytes()
            size = struct.unpack("<Q", content[:8])[0]
            header = _json(kind)(content[8 : 8 + size].decode(), random).encode()
            path.write_bytes(struct.pack("<Q", len(header)) + header + content[8 + size :])
            return
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".jsonl":
            lines = text.splitlines()
            at = random.randrange(len(lines))
            lines[at] = _json(kind)(lines[at], random)
            text = "\n".join(lines) + "\n"
        else:
            text = (_toml if path.suffix == ".toml" else _json)(kind)(text, random)
        path.write_text(text, encoding="utf-8")

    return corrupt


_KINDS = (
    "a name twice", "a name missing", "another type", "not finite", "enormous", "nested deep",
)  # fmt: skip
DOCUMENTS: dict[str, Corruption] = {kind: _document(kind) for kind in _KINDS}

# --- Weights


def _number(bits: tuple[int, ...]) -> Corruption:
    """A float32 of a safetensors file replaced by one of these."""

    def corrupt(path: Path, random: Random) -> None:
        content = bytearray(path.read_bytes())
        size = struct.unpack("<Q", content[:8])[0]
        place = random.randrange((len(content) - 8 - size) // 4)
        struct.pack_into("<I", content, 8 + size + 4 * place, random.choice(bits))
        path.write_bytes(content)

    return corrupt


WEIGHTS: dict[str, Corruption] = {
    "a weight that is NaN": _number((0x7FC00000, 0xFFC00000, 0x7F800001)),
    "a weight that is infinite": _number((0x7F800000, 0xFF800000)),
}
