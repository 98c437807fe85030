"""Reading a file of records by row: JSON, CSV or parquet. One open table holds the file once, in
the form that it has on disk or in Arrow.

Every error is a `TaskError` that names the file, the place in it, and what is there.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
import zlib
from abc import ABC, abstractmethod
from array import array
from codecs import BOM_UTF8
from pathlib import Path
from typing import Any

from lowmem_grpo.errors import TaskError, nearest
from lowmem_grpo.plain_json import array_items, parse_json
from lowmem_grpo.tasks.arrow_cells import exact
from lowmem_grpo.text_files import decoded

_LINE = re.compile(rb"[^\r\n]+")
# What separates the cells of a .csv: the first of them that its header has.
_SEPARATORS = ",;\t"
_SEPARATOR_LINE = re.compile(r"sep=(.)(\r\n|\r|\n)")


class Table(ABC):
    """Rows by number from 0; `columns` are those of the file, or of its first row where rows may
    differ.
    """

    columns: list[str]
    hint: str = ""  # what the file may be instead, where a column is missed

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def row(self, number: int) -> dict[str, Any]:
        """The cells of a row, by column."""

    @abstractmethod
    def where(self, number: int) -> str:
        """What a person calls that row: its line, or its number from 1."""


def open_table(path: str) -> Table:
    """The table in the file at `path`, by its ending: .jsonl .ndjson .json (an object a line, or
    one array of objects), .csv (cells separated by commas, semicolons or tabs, as its header is),
    .tsv, each also with .gz behind it, and .parquet.
    """
    file = Path(path).expanduser()
    packed = file.suffix.lower() == ".gz"
    ending = (file.with_suffix("") if packed else file).suffix.lower()
    if file.is_dir():
        inside = sorted(
            each.name for each in file.iterdir() if each.suffix.lower() in (*_KINDS, ".parquet")
        )
        some = f", like {file / inside[0]}" if inside else ""
        raise TaskError(f"{path} is a directory: give one file{some}")
    kind = _KINDS.get(ending)
    if ending not in (*_KINDS, ".parquet") or (packed and kind is None):
        raise TaskError(
            f"{path}: the ending '{file.suffix}' is not known{nearest(ending, _KINDS)}; "
            f"use one of {' '.join(_KINDS)}, also with .gz behind it, or .parquet"
        )
    try:
        if kind is None:
            table: Table = _parquet(file)
        else:
            data = file.read_bytes()
            table = kind(file, gzip.decompress(data) if packed else data)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise TaskError(f"{path} is not a whole gzip file: {error}") from error
    except OSError as error:
        raise TaskError(f"cannot read {path}: {error.strerror or error}") from error
    if len(table) == 0:
        raise TaskError(f"{path} has no rows")
    return table


class _Json(Table):
    """Keeps the bytes of the file and where its objects begin, and parses one when it is asked for.

    The bytes, not the file: a run must not notice when somebody edits the file under it.
    """

    def __init__(self, file: Path, data: bytes) -> None:
        self._file = file
        data = data.removeprefix(BOM_UTF8)
        text = _text(file, data)  # also to name the first byte that is not UTF-8
        # An array begins with a bracket and an object; a line that is a list is no row.
        self._array = re.match(r"\s*\[\s*(\{|\]|$)", text) is not None
        self._starts, self._ends, self._lines = array("Q"), array("Q"), array("Q")
        if self._array:
            self._bytes = self._keep_items(text)
        else:
            self._bytes = data
            self._find_lines()
            self.hint = self._nested(text)
        self.columns = list(self.row(0)) if len(self) else []

    def _keep_items(self, text: str) -> bytes:
        kept, line, seen = io.BytesIO(), 1, 0
        try:
            for start, end in array_items(text):
                line, seen = line + text.count("\n", seen, start), start
                self._starts.append(kept.tell())
                kept.write(text[start:end].encode())
                self._ends.append(kept.tell())
                self._lines.append(line)
        except ValueError as error:
            raise TaskError(f"{self._file} is not one JSON array: {error}") from error
        return kept.getvalue()

    def _nested(self, text: str) -> str:
        """What there is to say of a file that is one object as a whole, with the rows inside."""
        first = self._bytes[self._starts[0] : self._ends[0]] if len(self) else b""
        if not first.strip().startswith(b"{") or (len(self) > 1 and first.strip().endswith(b"}")):
            return ""
        try:
            whole = parse_json(text)
        except ValueError:
            return ""
        inside = [name for name, value in whole.items() if _are_objects(value)]
        if inside:
            hint = (
                f"the file is one object with rows in '{inside[0]}': write that list alone, as "
                f"jq '.{inside[0]}' does"
            )
        elif len(self) > 1 or any(isinstance(value, (dict, list)) for value in whole.values()):
            hint = "the file is one object: write one object a line, or one array of objects"
        else:  # a row by itself
            return ""
        if len(self) > 1:
            raise TaskError(f"{self._file}: {hint}")
        return f"; {hint}"

    def _find_lines(self) -> None:
        line, end = 1, 0
        for match in _LINE.finditer(self._bytes):
            between = self._bytes[end : match.start()]
            line += between.count(b"\n") + between.count(b"\r") - between.count(b"\r\n")
            end = match.end()
            if not match[0].isspace():
                self._starts.append(match.start())
                self._ends.append(end)
                self._lines.append(line)

    def __len__(self) -> int:
        return len(self._starts)

    def row(self, number: int) -> dict[str, Any]:
        text = self._bytes[self._starts[number] : self._ends[number]]
        try:
            row = parse_json(text)
        except ValueError as error:  # also a number of 5000 digits
            decoding = isinstance(error, json.JSONDecodeError)
            form = " (one object a line, or one array of objects, is expected)" if decoding else ""
            raise TaskError(
                f"{self._file}, {self.where(number)} is not JSON that can be used: {error}{form}"
            ) from error
        if not isinstance(row, dict):
            raise TaskError(
                f"{self._file}, {self.where(number)} is not a JSON object but {_shown(row)}"
            )
        return row

    def where(self, number: int) -> str:
        line = f"line {self._lines[number]}"
        return f"object {number + 1} ({line})" if self._array else line


class _Csv(Table):
    """Every cell is text: nothing turns an answer of 007 into 7."""

    separators = _SEPARATORS

    def __init__(self, file: Path, data: bytes) -> None:
        self._rows: list[list[str]] = []
        self._lines = array("Q")
        text, separator, before = _text(file, data), None, 0
        if first := _SEPARATOR_LINE.match(text):  # what Excel writes and takes
            text, separator, before = text[first.end() :], first[1], 1
        most = csv.field_size_limit(max(1, len(text)))  # of the whole process, so put back
        try:
            separator = separator or self._separator(text)
            reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
            self.columns = next(filter(None, reader), [])
            for cells in reader:
                if cells:
                    self._rows.append(cells)
                    self._lines.append(reader.line_num + before)
        except csv.Error as error:
            line = reader.line_num + before
            raise TaskError(f"{file}, line {line}: not CSV: {error}") from error
        finally:
            csv.field_size_limit(most)
        if len(set(self.columns)) != len(self.columns):
            raise TaskError(f"{file}: its header names a column twice: {', '.join(self.columns)}")
        for number, cells in enumerate(self._rows):
            if len(cells) != len(self.columns):
                name = {",": "commas", ";": "semicolons", "\t": "tabs"}.get(separator, separator)
                raise TaskError(
                    f"{file}, {self.where(number)} has {len(cells)} cells, the header "
                    f"{len(self.columns)} ({', '.join(self.columns)}); "
                    f"put text that has {name} in double quotes"
                )

    def _separator(self, text: str) -> str:
        """The first of `separators` that makes more than one column of the header."""
        for each in self.separators:
            lines = io.StringIO(text, newline="")
            if len(next(filter(None, csv.reader(lines, delimiter=each)), [])) > 1:
                return each
        return self.separators[0]

    def __len__(self) -> int:
        return len(self._rows)

    def row(self, number: int) -> dict[str, Any]:
        return dict(zip(self.columns, self._rows[number], strict=True))

    def where(self, number: int) -> str:
        return f"line {self._lines[number]}"


class _Tsv(_Csv):
    separators = "\t"


class ArrowTable(Table):
    """A `pyarrow.Table`, of the file or data set `name`; a row becomes Python objects when it is
    asked for. Raises TaskError where two columns have one name.
    """

    def __init__(self, table: Any, name: str) -> None:
        self._table, self._name = table, name
        self.columns = table.column_names
        if len(set(self.columns)) < len(self.columns):
            raise TaskError(f"{name} names a column twice: {', '.join(self.columns)}")

    def __len__(self) -> int:
        return self._table.num_rows

    def row(self, number: int) -> dict[str, Any]:
        cells = {}
        for name, column in zip(self.columns, self._table.columns, strict=True):
            try:
                cells[name] = exact(column[number].as_py(), column.type)
            # Text that is not UTF-8, times that Python has not.
            except (ValueError, ArithmeticError, NotImplementedError) as error:
                raise TaskError(
                    f"{self._name}, {self.where(number)}: its '{name}' cannot be read: {error}"
                ) from error
        return cells

    def where(self, number: int) -> str:
        return f"row {number + 1}"


def _parquet(file: Path) -> ArrowTable:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise TaskError(
            f'{file}: parquet needs pyarrow: pip install "lowmem-grpo[tasks]"'
        ) from error
    try:
        table = pyarrow.parquet.read_table(file, page_checksum_verification=True)
    except pyarrow.ArrowException as error:
        raise TaskError(f"{file} is not a parquet file: {str(error).splitlines()[0]}") from error
    return ArrowTable(table, str(file))


_KINDS = {
    ".jsonl": _Json,
    ".ndjson": _Json,
    ".json": _Json,
    ".csv": _Csv,
    ".tsv": _Tsv,
}


def _text(file: Path, data: bytes) -> str:
    try:
        return decoded(data)
    except ValueError as error:
        raise TaskError(f"{file} is {error}") from error


def _are_objects(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(e, dict) for e in value)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
