"""Tables of what memory did, for people (rich) and for programs (plain dicts).

So far the replays of recorded snapshots. Bytes in, MiB on the screen, bytes in JSON.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from lowmem_grpo.memory.allocator import MIB
from lowmem_grpo.memory.snapshot import ReplayReport

if TYPE_CHECKING:
    from rich.table import Table


def replay_json(reports: Iterable[ReplayReport]) -> list[dict]:
    """One object for each report: its fields, "file" among them, `totals_exact` and `exact`."""
    return [report.to_json() for report in reports]


def replay_table(reports: Iterable[ReplayReport]) -> Table:
    """A row for each snapshot: exact counts out of all, and the simulated peaks in MiB.

    `totals`: whether allocated and reserved bytes at the end are what the card reported.
    """
    from rich.table import Table
    from rich.text import Text

    table = Table(title="Snapshots replayed through the simulated allocator (MiB)")
    table.add_column("snapshot", overflow="fold")
    for title in ("addresses", "segments", "peak alloc.", "peak res.", "totals"):
        table.add_column(title, justify="right", no_wrap=True)
    for report in reports:
        table.add_row(
            Text(Path(report.file).name),  # not markup: a file name may hold brackets
            f"{report.addresses_exact}/{report.allocations}",
            f"{report.segments_exact}/{report.segments}",
            f"{report.peak_allocated / MIB:.1f}",
            f"{report.peak_reserved / MIB:.1f}",
            "exact" if report.totals_exact else "differ",
        )
    return table
