"""The HTML of a memory report: one page without scripts, fonts or anything else from elsewhere.

Plain data in (the objects that interfaces.md gives), HTML out. Every text that comes from a file
passes `escaped`. Sizes are shown in MiB or GiB, with the exact bytes in the title.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from lowmem_grpo import __version__
from lowmem_grpo.memory.allocator import MIB

__all__ = [
    "OFF", "amount", "comparison_note", "comparison_table", "deviation", "escaped", "figure",
    "notes_list", "page", "phase_table", "plain", "plan_summary", "replay_list", "section",
    "settings_table",
]  # fmt: skip

GIB = 1024 * MIB
HIGHER, LOWER = "\N{BLACK UP-POINTING TRIANGLE}", "\N{BLACK DOWN-POINTING TRIANGLE}"
OFF = 0.05
"""A measurement is marked when it differs from the prediction by more than this part."""

STYLE = """
:root { color-scheme: light dark; --page: #ffffff; --text: #1c1e21; --soft: #5b6168;
  --line: #d7dade; --band: #f4f5f7; --off: #a01845; --good: #0b6b3a; }
@media (prefers-color-scheme: dark) { :root { --page: #16181b; --text: #e6e8ea; --soft: #a3a9b0;
  --line: #3a3f45; --band: #1f2226; --off: #ff8fae; --good: #6fd19b; } }
body { background: var(--page); color: var(--text); font: 16px/1.5 system-ui, sans-serif;
  max-width: 70rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; line-height: 1.25; margin-bottom: .3rem; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 2.2rem 0 .6rem; }
h3 { font-size: 1rem; margin: 1.2rem 0 .4rem; }
p, figcaption, footer { max-width: 46rem; }
figcaption, footer, .note { color: var(--soft); font-size: .9rem; }
.verdict { font-size: 1.1rem; font-weight: 600; }
.good { color: var(--good); }
.off { color: var(--off); font-weight: 600; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .92rem; }
th, td { padding: .3rem .8rem .3rem 0; border-bottom: 1px solid var(--line); text-align: left;
  vertical-align: top; }
tbody tr:hover { background: var(--band); }
td { overflow-wrap: break-word; }
.number { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums; }
th[scope=row] { font-weight: 500; white-space: nowrap; }
figure { margin: 1rem 0; }
figure svg { display: block; width: 100%; height: auto; background: #ffffff; border-radius: 4px; }
figcaption { margin-top: .4rem; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .3rem 1.2rem; font-size: .95rem; }
dt { color: var(--soft); } dd { margin: 0; overflow-wrap: anywhere; }
@media print { :root { --page: #ffffff; --text: #000000; --soft: #444444; --line: #bbbbbb;
  --off: #a01845; --good: #0b6b3a; } body { max-width: none; margin: 0; font-size: 11px; }
  figure, tr { break-inside: avoid; } h2, h3 { break-after: avoid; } }
""".strip()


def plain(text: object) -> str:
    """Text without control characters and halves of characters, which neither page nor picture can
    hold.
    """
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in str(text))


def amount(size: int) -> str:
    """Bytes for a person: `812.5 MiB`, `17.40 GiB`."""
    if abs(size) >= GIB:
        return f"{size / GIB:.2f} GiB"
    return f"{size / MIB:.1f} MiB" if abs(size) >= MIB or not size else f"{size / MIB:.3f} MiB"


def deviation(part: float) -> str:
    """A part as signed percent."""
    return f"{100 * part:+.1f}%"


def page(title: str, source: str, sections: Iterable[str]) -> str:
    """The whole document. `sections` are HTML; `source` names what it was made from."""
    return "\n".join(
        [
            "<!DOCTYPE html>",
            '<html lang="en">',
            "<head>",
            '<meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{escaped(title)}</title>",
            f"<style>\n{STYLE}\n</style>",
            "</head>",
            "<body>",
            f"<h1>{escaped(title)}</h1>",
            *sections,
            f"<footer><p>Made by lowmem-grpo {__version__} from {escaped(source)}. 1 MiB is 1024"
            " KiB; the exact bytes show when the pointer rests on a size.</p></footer>",
            "</body>",
            "</html>",
            "",
        ]
    )


def section(heading: str, *parts: str) -> str:
    return "\n".join(["<section>", f"<h2>{escaped(heading)}</h2>", *parts, "</section>"])


def figure(svg: str, caption: str) -> str:
    """A picture (SVG without XML prolog) and the sentence under it."""
    return f"<figure>\n{svg}\n<figcaption>{escaped(caption)}</figcaption>\n</figure>"


def plan_summary(plan: Mapping[str, Any]) -> str:
    """Whether it fits, and the numbers that say so."""
    headroom, reserved = plan["headroom_bytes"], plan["peak_reserved_bytes"]
    low, high = (reserved + size for size in plan["context_bytes"])
    if plan["fits"]:
        verdict = f'<p class="verdict good">Fits: {_size(headroom)} are left at the peak.</p>'
    else:
        verdict = f'<p class="verdict off">Does not fit: {_size(-headroom)} are missing.</p>'
    peak = max(plan["phases"], key=lambda phase: phase["peak_allocated_bytes"])
    facts = {
        "model": escaped(plan["model"]),
        "card": f"{escaped(plan['card']['name'])}, {_size(plan['card']['memory_bytes'])}",
        "profile": escaped(plan["profile"] or "none"),
        "allocated at the peak": f"{_size(peak['peak_allocated_bytes'])} (tensors), in "
        f"{escaped(peak['name'])}",
        "reserved at the peak": f"{_size(reserved)} (what the allocator holds for them)",
        "device use at the peak": f"{_size(low)} to {_size(high)} (reserved, and the CUDA context)",
        "for the allocator": f"{_size(max(0, reserved + headroom))} (the card without its context "
        "at the largest, and without the desktop)",
        "host memory": f"{_size(plan['host_bytes'])}",
    }
    if plan.get("allocator"):
        facts["allocator's options"] = escaped(str(plan["allocator"].get("source", "")))
    return verdict + _list(facts)


def phase_table(phases: Sequence[Mapping[str, Any]]) -> str:
    """A row for each phase: its peaks, and the largest components at the first, where known."""
    known = any(phase["components"] for phase in phases)
    rows = []
    for phase in phases:
        cells = [
            _named(phase["name"]),
            _number(phase["peak_allocated_bytes"]),
            _number(phase["peak_reserved_bytes"]),
        ]
        if known:
            parts = sorted((phase["components"] or {}).items(), key=lambda item: -item[1])
            largest = [f"{escaped(name)} {_size(size)}" for name, size in parts if size][:5]
            cells.append(f"<td>{', '.join(largest)}</td>")
        rows.append(cells)
    columns = ["phase", "allocated", "reserved"]
    if known:
        columns.append("largest components when most is allocated")
    return _table(columns, rows, numbers=(1, 2))


def comparison_table(comparison: Sequence[Mapping[str, Any]]) -> str:
    """A row for each phase: predicted, measured and their difference, allocated and reserved."""
    kinds = ["allocated"]
    if any(row["measured_reserved_bytes"] is not None for row in comparison):
        kinds.append("reserved")
    rows = []
    for row in comparison:
        cells = [_named(row["phase"])]
        for kind in kinds:
            cells += [
                _number(row[f"predicted_{kind}_bytes"]),
                _number(row[f"measured_{kind}_bytes"]),
                _deviation_cell(row[f"{kind}_deviation"]),
            ]
        rows.append(cells)
    columns = ["phase"]
    for kind in kinds:
        columns += [f"{kind}: predicted", "measured", "difference"]
    return _table(columns, rows, numbers=range(1, len(columns)))


def comparison_note() -> str:
    """How to read `comparison_table`."""
    return (
        f'<p class="note">The difference is measured / predicted - 1. Above {OFF:.0%} it is marked '
        f"with {HIGHER} (more than predicted) or {LOWER} (less).</p>"
    )


def settings_table(settings: Mapping[str, Any], reasons: Mapping[str, str]) -> str:
    """A row for each setting: its value, and where it came from."""
    rows = [
        [
            _named(key),
            f"<td>{escaped(_value(value))}</td>",
            f"<td>{escaped(reasons.get(key, ''))}</td>",
        ]
        for key, value in settings.items()
    ]
    return _table(("setting", "value", "why"), rows)


def notes_list(notes: Mapping[str, str]) -> str:
    """What the numbers rest on, by the name of the number."""
    return _list({escaped(name): escaped(text) for name, text in notes.items()})


def replay_list(report: Mapping[str, Any]) -> str:
    """A replayed snapshot (`ReplayReport.to_json`): what agreed with the recording, and its sizes.

    Sizes that the snapshot gives too are compared with it.
    """

    def agreed(part: int, whole: int) -> str:
        text = f"{part:,} of {whole:,}"
        return text if part == whole else f'<span class="off">{text}</span>'

    def final(kind: str) -> str:
        here, there = report[f"final_{kind}"], report[f"recorded_final_{kind}"]
        if here == there:
            return f"{_size(here)}, as recorded"
        return f'{_size(here)}, <span class="off">recorded: {_size(there)}</span>'

    return _list(
        {
            "device": str(report["device"]),
            "recorded events": f"{report['entries']:,}",
            "addresses exact": agreed(report["addresses_exact"], report["allocations"]),
            "new segments exact": agreed(report["segments_exact"], report["segments"]),
            "released segments exact": agreed(report["releases_exact"], report["releases"]),
            "allocated at the start": _size(report["start_allocated"]),
            "reserved at the start": _size(report["start_reserved"]),
            "peak allocated": _size(report["peak_allocated"]),
            "peak reserved": _size(report["peak_reserved"]),
            "allocated at the end": final("allocated"),
            "reserved at the end": final("reserved"),
        }
    )


def escaped(text: object) -> str:
    return escape(plain(text))


def _value(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _size(size: int) -> str:
    return f'<span title="{size:,} bytes">{amount(size)}</span>'


def _named(name: str) -> str:
    return f'<th scope="row">{escaped(name)}</th>'


def _number(size: int | None) -> str:
    if size is None:
        return '<td class="number">-</td>'
    return f'<td class="number" title="{size:,} bytes">{amount(size)}</td>'


def _deviation_cell(part: float | None) -> str:
    if part is None:
        return '<td class="number">-</td>'
    if abs(part) <= OFF:
        return f'<td class="number">{deviation(part)}</td>'
    return f'<td class="number off">{HIGHER if part > 0 else LOWER} {deviation(part)}</td>'


def _list(facts: Mapping[str, str]) -> str:
    lines = [f"<dt>{name}</dt><dd>{text}</dd>" for name, text in facts.items()]
    return "\n".join(["<dl>", *lines, "</dl>"])


def _table(
    columns: Sequence[str], rows: Sequence[Sequence[str]], numbers: Iterable[int] = ()
) -> str:
    """`rows` of whole cells; `numbers`: the columns whose heads stand to the right."""
    right = set(numbers)
    kinds = [' class="number"' if place in right else "" for place in range(len(columns))]
    head = "".join(
        f'<th scope="col"{kind}>{escaped(name)}</th>'
        for name, kind in zip(columns, kinds, strict=True)
    )
    lines = [f"<tr>{''.join(row)}</tr>" for row in rows]
    return "\n".join(
        [
            '<div class="scroll"><table>',
            f"<thead><tr>{head}</tr></thead>",
            "<tbody>",
            *lines,
            "</tbody>",
            "</table></div>",
        ]
    )
