"""Reports of what memory did: tables of replays, and a page with pictures of anything else.

A page is made from what `plan --json` or `memory profile --json` printed, from a run directory, or
from a torch.cuda memory snapshot. MiB or GiB for people, bytes in JSON.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    StrictBool,
    TypeAdapter,
    ValidationError,
    model_validator,
)

from lowmem_grpo.errors import UserError
from lowmem_grpo.memory import page as html
from lowmem_grpo.memory import plain_pickle, snapshot
from lowmem_grpo.memory.allocator import MIB
from lowmem_grpo.memory.pictures import Picture, compared_picture, steps_picture, timeline_picture
from lowmem_grpo.memory.replay import SnapshotError
from lowmem_grpo.memory.snapshot import ReplayReport, replay_snapshot
from lowmem_grpo.plain_json import parse_json

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["Report", "ReportError", "replay_json", "replay_table", "write_report"]

WANTED = "give what `plan --json` or `memory profile --json` printed, or a memory snapshot"
PICTURED = 4  # comparisons of a run that are drawn, the last ones


class ReportError(UserError):
    """There is nothing that can be reported on. The message names the file and a way out."""


# --- What is read. Fields as in interfaces.md; others are let through and not looked at.

Bytes = Annotated[int, Field(strict=True, ge=0, le=2**63)]


class _Input(BaseModel):
    model_config = ConfigDict(allow_inf_nan=False)


class _Timeline(_Input):
    phase: list[str] = Field(min_length=1)
    allocated: list[Bytes]
    reserved: list[Bytes] | None = None
    components: dict[str, list[Bytes]] = {}

    @model_validator(mode="after")
    def _of_one_length(self):
        lists = [self.allocated, *self.components.values(), self.reserved or self.allocated]
        if any(len(values) != len(self.phase) for values in lists):
            raise ValueError(f"lists of other lengths than {len(self.phase)}")
        return self


class _Phase(_Input):
    name: str
    peak_allocated_bytes: Bytes
    peak_reserved_bytes: Bytes | None = None
    components: dict[str, Bytes] | None = None


class _Card(_Input):
    name: str
    memory_bytes: Bytes


class _Plan(_Input):
    model: str
    profile: str | None = None
    card: _Card
    allocator: dict[str, Any] | None = None
    fits: StrictBool
    settings: dict[str, Any]
    reasons: dict[str, str]
    context_bytes: tuple[Bytes, Bytes]
    phases: list[_Phase] = Field(min_length=1)
    peak_reserved_bytes: Bytes
    headroom_bytes: Annotated[int, Field(strict=True, ge=-(2**63), le=2**63)]
    host_bytes: Bytes
    timeline: _Timeline | None = None


class _Measured(_Input):
    device: str
    how: str
    phases: list[_Phase]
    timeline: _Timeline | None = None
    snapshot: str | None = None


class _Comparison(_Input):
    phase: str
    predicted_allocated_bytes: Bytes | None = None
    measured_allocated_bytes: Bytes | None = None
    predicted_reserved_bytes: Bytes | None = None
    measured_reserved_bytes: Bytes | None = None
    allocated_deviation: float | None = None
    reserved_deviation: float | None = None


class _Profile(_Input):
    plan: _Plan
    measured: _Measured
    comparison: list[_Comparison]


class _Moment(_Input):
    step: int | None = None
    when: str
    comparison: list[_Comparison]
    measured: _Measured | None = None


class _Record(_Input):
    step: Annotated[int, Field(strict=True, ge=0, le=2**53)]
    memory: dict[str, dict[str, Bytes | None]] = {}


# --- Pages


@dataclass(frozen=True)
class Report:
    """The files of a report that was written."""

    page: Path
    pictures: list[Path]

    def to_json(self) -> dict[str, Any]:
        return {"page": str(self.page), "pictures": [str(path) for path in self.pictures]}


def write_report(target: Path, output: Path | None = None, device: int | None = None) -> Report:
    """Write `index.html` and its pictures (PNG and SVG) about a file or a run directory.

    `output`: a directory, by default "report" in the run, or beside the file with its name.
    `device`: which one's trace, where a snapshot has several. Raises ReportError and SnapshotError
    for what cannot be reported on, and ConfigError without matplotlib.
    """
    if target.is_dir():
        output = output or target / "report"
        sections, pictures, title = _run(target)
    else:
        output = output or target.with_name(f"{target.stem}-report")
        sections, pictures, title = _file(target, device)
    files = {f"{p.name}.{kind}": getattr(p, kind) for p in pictures for kind in ("png", "svg")}
    page = html.page(title, str(target), sections)
    try:
        output.mkdir(parents=True, exist_ok=True)
        for name, content in [*files.items(), ("index.html", page)]:
            data = content.encode() if isinstance(content, str) else content
            (output / name).write_bytes(data)
    except OSError as error:
        raise ReportError(
            f"cannot write in {output}: {error.strerror}; name another directory with --output"
        ) from None
    return Report(output / "index.html", [output / name for name in files])


Parts = tuple[list[str], list[Picture], str]  # sections, pictures, title


def _file(path: Path, device: int | None) -> Parts:
    data = _read(path)
    if path.suffix in (".pickle", ".pkl") or data.startswith(b"\x80"):
        return _recorded(path, data, device)
    document = _parsed(path, data)
    if isinstance(document, dict) and "measured" in document:
        read = _validated(_Profile, path, document)
        moments = [_Moment(when="", comparison=read["comparison"], measured=read["measured"])]
        return _planned(read["plan"], [moment.model_dump() for moment in moments], [])
    return _planned(_validated(_Plan, path, document), [], [])


def _run(run: Path) -> Parts:
    plan, moments, records = None, [], []
    if _there(file := run / "plan.json"):
        plan = _validated(_Plan, file, _parsed(file, _read(file)))
    if _there(file := run / "memory.json"):
        moments = _validated(list[_Moment], file, _parsed(file, _read(file)))
    if _there(file := run / "metrics.jsonl"):
        # A line without an end was cut off, or is being written.
        lines = [line for line in _read(file).splitlines(keepends=True) if line[-1:] == b"\n"]
        records = _validated(list[_Record], file, [_parsed(file, line) for line in lines])
    records = sorted((r for r in records if r["memory"]), key=lambda record: record["step"])
    if plan is None and not moments and not records:
        raise ReportError(
            f"{run}: neither plan.json, memory.json nor memory in metrics.jsonl; give a run's "
            "directory, or a file"
        )
    return _planned(plan, moments, records, of=f": run {run.resolve().name}")


def _there(path: Path) -> bool:
    """Also what cannot be read, which is then an error, and not taken for missing."""
    return path.is_symlink() or path.exists()


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ReportError(f"{path}: {error.strerror}; {WANTED}") from None


def _parsed(path: Path, data: bytes) -> Any:
    try:
        return parse_json(data)
    except ValueError as error:
        raise ReportError(f"{path}: not JSON ({error}); {WANTED}") from None


def _validated(kind: Any, path: Path, document: Any) -> Any:
    """The document as plain data, with every field of its kind."""
    adapter = TypeAdapter(kind)
    try:
        return adapter.dump_python(adapter.validate_python(document))
    except ValidationError as error:
        first = error.errors()[0]
        place = html.plain(".".join(str(part) for part in first["loc"]))[:80] or "the whole"
        raise ReportError(f"{path}: {place}: {first['msg']}; {WANTED}") from None


def _planned(plan: dict | None, moments: list[dict], records: list[dict], of: str = "") -> Parts:
    """Of a plan, what was measured against it, and a run's records, as far as each is there."""
    sections, pictures = [], []
    if plan is not None:
        sections.append(html.plan_summary(plan))
    panels = [("predicted", plan["timeline"])] if plan is not None and plan["timeline"] else []
    for moment in moments:
        if moment["measured"] and moment["measured"]["timeline"]:
            panels.append((_when(moment) or "measured", moment["measured"]["timeline"]))
    if panels:
        limit = None
        if plan is not None:
            limit = max(0, plan["peak_reserved_bytes"] + plan["headroom_bytes"])
        pictures.append(timeline_picture(panels, limit))
        sections.append(_pictured("Over the phases", pictures[-1]))
    if plan is not None:
        sections.append(html.section("Phases, predicted", html.phase_table(plan["phases"])))
    compared = [(_when(moment), moment["comparison"]) for moment in moments]
    compared = [(when, rows) for when, rows in compared if rows]
    if compared:
        pictures.append(compared_picture(compared[-PICTURED:]))
        tables = [
            (f"<h3>{html.escaped(when)}</h3>" if when else "") + html.comparison_table(rows)
            for when, rows in compared
        ]
        tables.append(html.comparison_note())
        sections.append(_pictured("Predicted and measured", pictures[-1], *tables))
    notes = {}
    for moment in moments:
        if (measured := moment["measured"]) is not None:
            name = f"measured, {_when(moment)}" if moment["when"] else "measured"
            title = f"Phases, {name}, on {measured['device']}"
            sections.append(html.section(title, html.phase_table(measured["phases"])))
            notes[name] = f"{measured['device']}: {measured['how']}"
            if measured["snapshot"]:
                notes[f"{name}: snapshot"] = measured["snapshot"]
    if records:
        pictures.append(steps_picture(records))
        sections.append(_pictured("Step by step", pictures[-1]))
    if plan is not None:
        settings, reasons = plan["settings"], plan["reasons"]
        sections.append(html.section("Settings", html.settings_table(settings, reasons)))
        notes = {key: why for key, why in reasons.items() if key not in settings} | notes
    if notes:
        sections.append(html.section("How it was counted", html.notes_list(notes)))
    title = f"Memory of {plan['model']} on {plan['card']['name']}" if plan else "Memory"
    return sections, pictures, title + of


def _when(moment: dict) -> str:
    step = "" if moment["step"] is None else f" (step {moment['step']})"
    return moment["when"] + step


def _pictured(heading: str, picture: Picture, *more: str) -> str:
    return html.section(heading, html.figure(picture.svg, picture.caption), *more)


def _recorded(path: Path, data: bytes, device: int | None) -> Parts:
    """Of a snapshot: its replay through the simulated allocator."""
    try:
        document = plain_pickle.load(data)
    except ValueError as error:
        raise SnapshotError(
            f"{path}: not a memory snapshot ({error}); give an undamaged file from "
            "torch.cuda.memory._dump_snapshot"
        ) from None
    try:
        report = replay_snapshot(document, device=device)
    except ValueError as error:
        raise SnapshotError(f"{path}: {error}") from None
    allocated, reserved = _held(document, report.device)
    timeline = {"phase": [""] * len(allocated), "allocated": allocated, "reserved": reserved}
    picture = timeline_picture([("recorded", {**timeline, "components": {}})])
    sections = [
        _pictured("Over the recorded events", picture),
        html.section(
            "Replayed through the simulated allocator", html.replay_list(report.to_json())
        ),
    ]
    return sections, [picture], f"Memory recorded in {path.name}"


def _held(document: dict, device: int) -> tuple[list[int], list[int]]:
    """Allocated and reserved bytes after each entry of a trace that can be replayed."""
    trace = document["device_traces"][device]
    state = snapshot._final_state(document["segments"], device)
    snapshot._run_backwards(trace, state)
    settings = snapshot._recorded_settings(document.get("allocator_settings"))
    run = snapshot._Run(settings, trace, state)
    allocated, reserved = [], []
    for entry in trace:
        run.trace = [entry]
        run.forward()
        allocated.append(run.allocator.allocated)
        reserved.append(run.allocator.reserved)
    return allocated, reserved


# --- Tables of replays


def replay_json(reports: Iterable[ReplayReport]) -> list[dict]:
    """One object for each report: its fields, "file" among them, `totals_exact` and `exact`."""
    return [report.to_json() for report in reports]


def comparison_table(rows: Iterable[dict], title: str) -> Table:
    """A row for each phase, predicted beside measured, in MiB; see `watch.compare`."""
    from rich.table import Table

    rows = list(rows)
    kinds = ["allocated"]
    if any(row["measured_reserved_bytes"] is not None for row in rows):
        kinds.append("reserved")
    table = Table(title=title)
    table.add_column("phase", no_wrap=True)
    for kind in kinds:
        for heading in (f"{kind}, predicted", "measured", "difference"):
            table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        cells = [row["phase"]]
        for kind in kinds:
            cells += [
                f"{row[f'{which}_{kind}_bytes'] / MIB:.1f}" for which in ("predicted", "measured")
            ]
            cells.append(f"{row[f'{kind}_deviation']:+.2%}")
        table.add_row(*cells)
    return table


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
