"""Reading a file of records by row: jsonl, CSV or parquet. One open table holds the file once, in
the form that it has on disk or in Arrow.

Every error is a `TaskError` that names the file, the place in it, and what is there.
"""

from __future__ import annotations

import csv
from abc import ABC, abstractmethod
from array import array
from pathlib import Path
from typing import Any

from lowmem_grpo.errors import TaskError, nearest
from lowmem_grpo.plain_json import parse_json


class Table(ABC):
    """Rows by number from 0; `columns` are those of the file, or of its first row where rows may
    differ.
    """

    columns: list[str]

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def row(self, number: int) -> dict[str, Any]:
        """The cells of a row, by column."""

    @abstractmethod
    def where(self, number: int) -> str:
        """What a person calls that row: its line, or its number from 1."""


def open_table(path: str) -> Table:
    """The table in the file at `path`, by its ending: .jsonl .ndjson .json (one object a line),
    .csv, .parquet.
    """
    file = Path(path).expanduser()
    kind = _KINDS.get(file.suffix.lower())
    if kind is None:
        raise TaskError(
            f"{path}: the ending '{file.suffix}' is not known{nearest(file.suffix, _KINDS)}; "
            f"use one of {' '.join(_KINDS)}"
        )
    if file.is_dir():
        raise TaskError(f"{path} is a directory: give one file")
    try:
        table = kind(file)
    except OSError as error:
        raise TaskError(f"cannot read {path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise TaskError(
            f"{path} is not UTF-8 text: byte {error.start} is {error.object[error.start]:#04x}"
        ) from error
    if len(table) == 0:
        raise TaskError(f"{path} has no rows")
    return table


class _JsonLines(Table):
    """Keeps the bytes of the file and where its lines begin, and parses a line when it is asked
    for.

    The bytes, not the file: a run must not notice when somebody edits the file under it.
    """

    def __init__(self, file: Path) -> None:
        self._file = file
        self._bytes = file.read_bytes()
        self._bytes.decode()  # to name the first byte that is not UTF-8
        self._starts, self._ends, self._lines = array("Q"), array("Q"), array("Q")
        start = line = 0
        while start < len(self._bytes):
            end = self._bytes.find(b"\n", start)
            end = len(self._bytes) if end < 0 else end
            line += 1
            if not self._bytes[start:end].isspace() and end > start:
                self._starts.append(start)
                self._ends.append(end)
                self._lines.append(line)
            start = end + 1
        self.columns = list(self.row(0)) if len(self) else []

    def __len__(self) -> int:
        return len(self._starts)

    def row(self, number: int) -> dict[str, Any]:
        text = self._bytes[self._starts[number] : self._ends[number]]
        try:
            row = parse_json(text)
        except ValueError as error:  # also a number of 5000 digits
            raise TaskError(
                f"{self._file}, {self.where(number)} is not JSON: {error} "
                "(one object a line is expected)"
            ) from error
        if not isinstance(row, dict):
            raise TaskError(
                f"{self._file}, {self.where(number)} is not a JSON object but {_shown(row)}"
            )
        return row

    def where(self, number: int) -> str:
        return f"line {self._lines[number]}"


class _Csv(Table):
    """Every cell is text: nothing turns an answer of 007 into 7."""

    def __init__(self, file: Path) -> None:
        self._rows: list[list[str]] = []
        self._lines = array("Q")
        with file.open(encoding="utf-8-sig", newline="") as stream:
            reader = csv.reader(stream, strict=True)
            try:
                self.columns = next(reader, [])
                for cells in reader:
                    if cells:
                        self._rows.append(cells)
                        self._lines.append(reader.line_num)
            except csv.Error as error:
                raise TaskError(f"{file}, line {reader.line_num}: not CSV: {error}") from error
        if len(set(self.columns)) != len(self.columns):
            raise TaskError(f"{file}: its header names a column twice: {', '.join(self.columns)}")
        for number, cells in enumerate(self._rows):
            if len(cells) != len(self.columns):
                raise TaskError(
                    f"{file}, {self.where(number)} has {len(cells)} cells, the header "
                    f"{len(self.columns)} ({', '.join(self.columns)}); "
                    "put text that has commas in double quotes"
                )

    def __len__(self) -> int:
        return len(self._rows)

    def row(self, number: int) -> dict[str, Any]:
        return dict(zip(self.columns, self._rows[number], strict=True))

    def where(self, number: int) -> str:
        return f"line {self._lines[number]}"


class ArrowTable(Table):
    """A `pyarrow.Table`; a row becomes Python objects when it is asked for."""

    def __init__(self, table: Any) -> None:
        self._table = table
        self.columns = table.column_names

    def __len__(self) -> int:
        return self._table.num_rows

    def row(self, number: int) -> dict[str, Any]:
        return {
            name: column[number].as_py()
            for name, column in zip(self.columns, self._table.columns, strict=True)
        }

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
        return ArrowTable(pyarrow.parquet.read_table(file, page_checksum_verification=True))
    except pyarrow.ArrowException as error:
        raise TaskError(f"{file} is not a parquet file: {str(error).splitlines()[0]}") from error


_KINDS = {
    ".jsonl": _JsonLines,
    ".ndjson": _JsonLines,
    ".json": _JsonLines,
    ".csv": _Csv,
    ".parquet": _parquet,
}


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
