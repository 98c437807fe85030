"""Rows as plain text: one line each, what they rest on below."""

from __future__ import annotations

from collections.abc import Iterable

from .row import Row

HEADINGS = (
    "run", "the number is", "unit", "predicted", "published", "differs",
    "allocated", "reserved", "device use", "notes",
)  # fmt: skip


def as_text(rows: Iterable[Row]) -> str:
    """The table, and the notes and assumptions that its last column numbers."""
    remarks: list[str] = []
    lines = [HEADINGS]
    for row in rows:
        marks = []
        for remark in (row.note, f"Assumed: {row.assumed}" if row.assumed else ""):
            if remark and remark not in remarks:
                remarks.append(remark)
            if remark:
                marks.append(str(remarks.index(remark) + 1))
        lines.append(_cells(row, ", ".join(marks)))
    widths = [max(len(line[i]) for line in lines) for i in range(len(HEADINGS))]
    table = [
        "  ".join(
            cell.rjust(width) if 3 <= i <= 8 else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]
    return "\n".join([*table, "", *(f"{n}. {text}" for n, text in enumerate(remarks, 1))])


def _cells(row: Row, marks: str) -> tuple[str, ...]:
    digits = 1 if row.unit == "MiB" else 2
    numbers = row.predicted, row.published, row.allocated, row.reserved
    predicted, published, allocated, reserved = (
        "" if x is None else f"{x:.{digits}f}" for x in numbers
    )
    off = "" if row.difference is None else f"{row.difference:+.{3 - digits}f}%"
    device = "" if row.device is None else "{:.2f}-{:.2f}".format(*row.device)
    kind = row.run, row.number, row.unit
    return *kind, predicted, published, off, allocated, reserved, device, marks
