"""Text files that somebody else wrote: UTF-8, with or without a byte order mark.

Whatever a person gives as text is read here: run files, profiles, tables of problems, schemas,
chat templates. Another encoding is named together with the way out of it.
"""

from __future__ import annotations

import re
from pathlib import Path

__all__ = ["decoded", "half_character", "read_text"]

# What a file begins with that is no UTF-8 text, and what it then is.
_OTHERS = (
    (b"\xff\xfe\x00\x00", "UTF-32"),
    (b"\x00\x00\xfe\xff", "UTF-32"),
    (b"\xff\xfe", "UTF-16"),
    (b"\xfe\xff", "UTF-16"),
    (b"\x1f\x8b", "compressed by gzip"),
    (b"\x28\xb5\x2f\xfd", "compressed by zstd"),
    (b"BZh", "compressed by bzip2"),
    (b"\xfd7zXZ", "compressed by xz"),
    (b"PK\x03\x04", "a zip archive, which Excel's files are as well"),
    (b"PAR1", "a parquet file"),
)
_HALF = re.compile("[\ud800-\udfff]")


def read_text(path: str | Path) -> str:
    """The text of the file at `path`, without a byte order mark, every line end as \\n. Raises
    OSError, and ValueError that says what the file is instead.
    """
    return decoded(Path(path).read_bytes()).replace("\r\n", "\n").replace("\r", "\n")


def decoded(data: bytes) -> str:
    """`data` as text, without a byte order mark. Raises ValueError for what is not UTF-8."""
    for start, name in _OTHERS:
        if data.startswith(start):
            _refuse(name)
    if b"\0" in data[:2]:  # no mark, and every other byte of ASCII is zero
        _refuse("UTF-16, or no text")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"not UTF-8 text: byte {error.start} is {error.object[error.start]:#04x}; save it as "
            "UTF-8"
        ) from error


def half_character(text: str) -> str | None:
    """The first lone surrogate in `text`, as its escape: half of a character, which no file, no
    tokenizer and no other process takes.
    """
    found = _HALF.search(text)
    return f"\\u{ord(found[0]):04x}" if found else None


def _refuse(name: str) -> None:
    way_out = "save it as UTF-8" if name.startswith("UTF") else "give the text itself, in UTF-8"
    raise ValueError(f"not UTF-8 text but {name}: {way_out}")
