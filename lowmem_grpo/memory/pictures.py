"""Pictures of what memory held: over a trace, predicted against measured, and by step.

Plain data in (the objects that interfaces.md gives), PNG and SVG out. Drawn with matplotlib's
objects only, without its global state of figures; matplotlib is an extra and imported when the
first picture is drawn. Colours: Paul Tol's muted scheme, which the colour-blind can tell apart.
"""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lowmem_grpo.errors import ConfigError
from lowmem_grpo.memory.page import GIB, MIB, OFF, amount, deviation, plain
from lowmem_grpo.memory.timeline import stretches, thinned

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["Picture", "compared_picture", "steps_picture", "timeline_picture"]

COLOURS = {
    "base_weights": "#332288", "adapters": "#117733", "optimizer": "#44aa99",
    "kv_cache": "#88ccee", "checkpoints": "#999933", "activations": "#ddcc77",
    "logits": "#cc6677", "workspace": "#882255", "other": "#aa4499", "reward_model": "#661100",
    "allocated": "#88ccee",  # where components are not known
}  # fmt: skip
PHASES = {
    "load": "#332288", "rollout": "#88ccee", "reward": "#999933", "reference": "#44aa99",
    "update": "#cc6677", "optimizer": "#117733", "save": "#ddcc77",
}  # fmt: skip
SPARE = ("#dd99bb", "#5577cc", "#99bb55", "#664422", "#bbbbbb", "#777777")
DARK, SOFT, ALARM = "#222222", "#666666", "#a01845"
WIDTH = 11.0  # inches
DRAWN = 800  # points of a timeline: about one for each pixel


@dataclass(frozen=True)
class Picture:
    """A picture's name (of its files, without suffix) and its contents."""

    name: str
    caption: str
    png: bytes
    svg: str
    """Can stand in an HTML page: no prolog, and its ids begin with the picture's name."""


def timeline_picture(panels: Sequence[tuple[str, Mapping]], limit: int | None = None) -> Picture:
    """Components stacked over the events, a panel for each (title, timeline); all have one scale.

    `limit`: bytes that the card has for the allocator. It is drawn unless it is so far above that
    nothing else could be seen; then only the legend has it.
    """
    with _style():
        panels = [(title, _thin(timeline)) for title, timeline in panels]
        every = [v for _, t in panels for v in [*t["allocated"], *(t["reserved"] or ())]]
        top = max(1, *every)
        shown = limit is not None and limit <= 2 * top
        ceiling = 1.06 * max(top, limit if shown else 0)
        most = max(len(stretches(timeline["phase"])) for _, timeline in panels)
        named = any(phase for _, timeline in panels for phase in timeline["phase"])
        # More labels than ten may have to stand upright.
        above = (0.5 if most <= 10 else 1.3) if named else 0.15
        figure, rows = _rows(len(panels), height=4.2, right=2.4, above=above, between=above + 0.1)
        handles: dict[str, Any] = {}
        highest: dict[str, int] = {}
        for axes, (title, timeline) in zip(rows, panels, strict=True):
            for name, values in _stack(axes, timeline, handles).items():
                highest[name] = max(highest.get(name, 0), values)
            scale = _scale(axes.yaxis, ceiling)
            axes.set_ylim(0, ceiling)
            axes.set_ylabel(f"{plain(title)[:40]} ({scale})")
            if shown:
                handles["limit"] = axes.axhline(limit, color=ALARM, linestyle="--", linewidth=1.4)
        widened = " (short phases are widened)" if most > 1 else ""
        rows[-1].set_xlabel(f"allocations and frees in order, not in time{widened}")
        names = list(highest)[::-1]
        entries = [(handles[n], f"{_label(n)}  {amount(highest[n])}") for n in names]
        if "reserved" in handles:
            peak = max(max(t["reserved"]) for _, t in panels if t["reserved"])
            entries.append((handles["reserved"], f"reserved  {amount(peak)}"))
        if limit is not None:
            note = "" if shown else "\n(above the picture)"
            mark = handles.get("limit") or _nothing()
            entries.append((mark, f"for the allocator  {amount(limit)}{note}"))
        _legend(rows[0], entries, "highest of each")
        caption = "What was allocated after each event, and what the allocator held for it."
        if named:
            caption += " Above each phase: the most that was allocated in it."
        return _rendered("timeline", caption, figure)


def compared_picture(entries: Sequence[tuple[str, Sequence[Mapping]]]) -> Picture:
    """Bars of each phase's peaks, predicted and measured, a row for each (title, comparison)."""
    kinds = ["allocated"]
    if any(row["measured_reserved_bytes"] is not None for _, rows in entries for row in rows):
        kinds.append("reserved")
    with _style():
        from matplotlib.figure import Figure

        bars = [len(rows) for _, rows in entries]
        heights = [0.55 * number + 0.9 for number in bars]
        figure = Figure(figsize=(WIDTH, sum(heights) + 0.3), layout="constrained")
        grid = figure.subplots(
            len(entries), len(kinds), squeeze=False, gridspec_kw={"height_ratios": heights}
        )
        top = max(
            1,
            *(row[f"{side}_{kind}_bytes"] or 0 for _, rows in entries for row in rows
              for side in ("predicted", "measured") for kind in kinds),
        )  # fmt: skip
        for line, (title, rows) in zip(grid, entries, strict=True):
            for axes, kind in zip(line, kinds, strict=True):
                _bars(axes, rows, kind, top)
                axes.set_title(f"{plain(title)[:40]}: {kind}" if title else kind, loc="left")
        for axes in grid[-1]:
            axes.set_xlabel(_scale(axes.xaxis, top))
        handles, labels = grid[0][0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper right", ncols=2, frameon=False)
        caption = (
            "The peaks of each phase, predicted and measured, and by how much the measured one "
            f"differs; bold where that is more than {OFF:.0%}."
        )
        return _rendered("compared", caption, figure)


def steps_picture(records: Sequence[Mapping]) -> Picture:
    """A run's memory by step, a line for each phase, from its records (`step` and `memory`)."""
    titles = {"allocated": "allocated", "reserved": "reserved", "host_rss": "host memory"}
    with _style():
        from matplotlib.ticker import MaxNLocator

        lines: dict[str, dict[str, list[tuple[int, int]]]] = {}
        for record in records:
            for phase, sizes in record["memory"].items():
                for key, size in sizes.items():
                    if key in titles and size is not None:
                        of_key = lines.setdefault(key, {})
                        of_key.setdefault(phase, []).append((record["step"], size))
        keys = [key for key in titles if key in lines]
        figure, rows = _rows(len(keys), height=2.1, right=1.6, above=0.25, between=0.25)
        colours = _colours([p for key in keys for p in lines[key]], PHASES)
        handles: dict[str, Any] = {}
        for axes, key in zip(rows, keys, strict=True):
            for number, (phase, points) in enumerate(lines[key].items()):
                # Lines that lie on each other are told apart by their width.
                style = {"linewidth": max(1.2, 4 - 0.6 * number), "color": colours[phase]}
                marker = "o" if len(points) <= 40 else None
                steps, sizes = zip(*points, strict=True)
                (handles[phase],) = axes.plot(steps, sizes, marker=marker, markersize=3.5, **style)
            sizes = [size for points in lines[key].values() for _, size in points]
            low, high = min(sizes), max(1, *sizes)
            margin = max(0.1 * (high - low), 0.01 * high)
            axes.set_ylim(low - margin if low > high / 2 else 0, high + margin)
            axes.set_ylabel(f"{titles[key]} ({_scale(axes.yaxis, high)})")
            axes.grid(axis="y")
            axes.set_xlim(records[0]["step"] - 0.5, records[-1]["step"] + 0.5)
            axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
            axes.tick_params(labelbottom=axes is rows[-1])
        rows[-1].set_xlabel("step")
        _legend(rows[0], [(handle, _label(phase)) for phase, handle in handles.items()], "phase")
        caption = "Memory in each phase, step by step" + (
            ": the peak of what was allocated and reserved on the card, and the host memory at the "
            "phase's end."
            if "reserved" in keys
            else ": the host memory at its end."
        )
        caption += " The axes need not begin at 0."
        return _rendered("steps", caption, figure)


def _stack(axes: Axes, timeline: Mapping, handles: dict[str, Any]) -> dict[str, int]:
    """Draw one timeline; returns the highest bytes of each component that is drawn."""
    runs = stretches(timeline["phase"])
    bands, edges = _bands(runs, timeline["phase"], axes)
    parts = timeline["components"] or {"allocated": timeline["allocated"]}
    order = [n for n in COLOURS if n in parts] + [n for n in parts if n not in COLOURS]
    order = [name for name in order if any(parts[name])]
    colours = _colours(order, COLOURS)
    low = [0] * len(edges)
    for name in order:
        values = parts[name]
        high = [a + b for a, b in zip(low, [*values, values[-1]], strict=True)]
        handles[name] = axes.fill_between(
            edges, low, high, step="post", color=colours[name], linewidth=0
        )
        low = high
    if timeline["reserved"] is not None:
        held = timeline["reserved"]
        (handles["reserved"],) = axes.step(
            edges, [*held, held[-1]], where="post", color=DARK, linewidth=1.4
        )
    for number, ((start, end), (left, right)) in enumerate(zip(runs, bands, strict=True)):
        if number % 2:
            axes.axvspan(left, right, color="#000000", alpha=0.05, linewidth=0, zorder=0)
        if number:
            axes.axvline(left, color=SOFT, linewidth=0.6, linestyle=":")
        name = timeline["phase"][start]
        if name:
            peak = max(timeline["allocated"][start:end])
            _band_label(axes, (left + right) / 2, right - left, _label(name), peak)
    axes.set_xlim(0, 1)
    axes.set_xticks([])
    axes.grid(axis="y")
    return {name: max(parts[name]) for name in order}


def _bands(runs, phases, axes: Axes) -> tuple[list[tuple[float, float]], list[float]]:
    """Each stretch's (left, right) and each point's left edge, in parts of the axes' width.

    Every stretch has room for its label as far as that can be; what is left is shared out by the
    number of points.
    """
    needed = [_room(axes, max(10, len(_label(phases[start])) + 2)) for start, _ in runs]
    scale = min(1.0, 0.8 / sum(needed))
    least = [scale * part for part in needed]
    rest, total = 1 - sum(least), len(phases)
    bands, edges, left = [], [], 0.0
    for (start, end), part in zip(runs, least, strict=True):
        right = left + part + rest * (end - start) / total
        bands.append((left, right))
        edges += [left + (right - left) * i / (end - start) for i in range(end - start)]
        left = right
    return bands, [*edges, 1.0]


def _band_label(axes: Axes, middle: float, width: float, name: str, peak: int) -> None:
    """The phase's name above its band, with its peak if there is room, upright if there is less."""
    at = {"transform": axes.get_xaxis_transform(), "ha": "center", "va": "bottom", "fontsize": 8.5}
    if width >= _room(axes, max(9, len(name))):
        axes.text(middle, 1.015, f"{name}\n{amount(peak)}", color=DARK, **at)
    elif width >= _room(axes, 2):
        axes.text(middle, 1.015, name, color=DARK, rotation=90, **at)


def _room(axes: Axes, characters: int) -> float:
    """The part of the axes' width that so many characters of a band's label take."""
    inches = axes.get_position().width * axes.get_figure().get_figwidth()
    return 0.072 * characters / inches


def _bars(axes: Axes, rows: Sequence[Mapping], kind: str, top: int) -> None:
    for place, row in enumerate(rows):
        predicted, measured = row[f"predicted_{kind}_bytes"], row[f"measured_{kind}_bytes"]
        part = row[f"{kind}_deviation"]
        off = part is not None and abs(part) > OFF
        for shift, side, size, colour in (
            (-0.2, "predicted", predicted, "#88ccee"),
            (0.2, "measured", measured, "#332288"),
        ):
            label = side if place == 0 else None
            axes.barh(place + shift, size or 0, height=0.36, color=colour, label=label)
            if size is None:
                text = "not known"
            elif side == "measured" and part is not None:
                text = f"{amount(size)} ({deviation(part)})"
            else:
                text = amount(size)
            bold = off and side == "measured"
            axes.annotate(
                text, (size or 0, place + shift), (4, 0), textcoords="offset points",
                va="center", fontsize=8.5, color=ALARM if bold else DARK,
                fontweight="bold" if bold else "normal",
            )  # fmt: skip
    axes.set_yticks(range(len(rows)), [_label(row["phase"]) for row in rows])
    axes.set_ylim(len(rows) - 0.45, -0.55)
    axes.set_xlim(0, 1.42 * top)  # room for the numbers
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x")
    _scale(axes.xaxis, top)


def _rows(
    number: int, *, height: float, right: float, above: float, between: float
) -> tuple[Figure, list[Axes]]:
    """A figure of `number` axes one above the other; `right` inches are left for a legend."""
    from matplotlib.figure import Figure

    below, left = 0.45, 0.85
    total = above + number * height + (number - 1) * between + below
    figure = Figure(figsize=(WIDTH, total))
    rows = []
    for place in range(number):
        bottom = total - above - (place + 1) * height - place * between
        box = (left / WIDTH, bottom / total, (WIDTH - left - right) / WIDTH, height / total)
        rows.append(figure.add_axes(box))
    return figure, rows


def _legend(axes: Axes, entries: Sequence[tuple[Any, str]], title: str) -> None:
    axes.legend(
        [handle for handle, _ in entries], [label for _, label in entries], title=title,
        loc="upper left", bbox_to_anchor=(1.01, 1.0), borderaxespad=0, frameon=False,
        alignment="left",
    )  # fmt: skip


def _nothing():
    from matplotlib.lines import Line2D

    return Line2D([], [], color=ALARM, linestyle="--", linewidth=1.4)


def _scale(axis, top: float) -> str:
    """Let an axis of bytes show MiB or GiB, at round numbers; returns which."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    unit, name = (GIB, "GiB") if top >= 2 * GIB else (MIB, "MiB")
    ticks = MaxNLocator(nbins=7, steps=[1, 2, 2.5, 5, 10]).tick_values

    class Locator(MaxNLocator):
        def tick_values(self, low, high):
            return [unit * tick for tick in ticks(low / unit, high / unit)]

    axis.set_major_locator(Locator())
    axis.set_major_formatter(FuncFormatter(lambda size, _: f"{size / unit:,.6g}"))
    return name


def _colours(names: Sequence[str], known: Mapping[str, str]) -> dict[str, str]:
    others = [name for name in dict.fromkeys(names) if name not in known]
    return {**known, **{n: SPARE[i % len(SPARE)] for i, n in enumerate(others)}}


def _label(name: str) -> str:
    """A name as the pictures show it: at most 14 characters."""
    # matplotlib leaves labels that begin with an underscore out of a legend.
    name = plain(name).lstrip("_")
    return name if len(name) <= 14 else f"{name[:13]}\N{HORIZONTAL ELLIPSIS}"


def _thin(timeline: Mapping) -> dict:
    kept = thinned(timeline["phase"], timeline["allocated"], timeline["reserved"], DRAWN)

    def at(values):
        return None if values is None else [values[place] for place in kept]

    parts = {name: at(values) for name, values in (timeline["components"] or {}).items()}
    found = {key: at(timeline[key]) for key in ("phase", "allocated", "reserved")}
    return {**found, "components": parts}


@contextlib.contextmanager
def _style() -> Iterator[None]:
    """matplotlib as these pictures want it. Raises ConfigError where it is not installed."""
    try:
        import matplotlib
    except ImportError:
        raise ConfigError(
            "pictures of memory need matplotlib: pip install 'lowmem-grpo[report]'"
        ) from None
    settings = {
        "font.family": "DejaVu Sans", "font.size": 9.5, "legend.fontsize": 9,
        "axes.titlesize": 10, "axes.spines.top": False, "axes.spines.right": False,
        "axes.edgecolor": SOFT, "axes.axisbelow": True, "axes.labelcolor": DARK,
        "grid.color": "#dddddd", "grid.linewidth": 0.6, "xtick.color": DARK, "ytick.color": DARK,
        "text.parse_math": False,  # names come from files, and may hold dollars
        "svg.hashsalt": "lowmem-grpo", "svg.fonttype": "path",
    }  # fmt: skip
    with matplotlib.rc_context(settings):
        yield


def _rendered(name: str, caption: str, figure: Figure) -> Picture:
    png, svg = io.BytesIO(), io.StringIO()
    figure.savefig(png, format="png", dpi=150, metadata={"Software": None})
    empty = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    figure.savefig(svg, format="svg", metadata=empty)
    text = svg.getvalue()
    text = text[text.index("<svg") :]
    # A hundredth of a point is enough, and half the size.
    text = re.sub(r' d="[^"]*"', lambda path: re.sub(r"(\.\d\d)\d+", r"\1", path[0]), text)
    text = re.sub(r'( id="|href="#|url\(#)', rf"\g<1>{name}-", text)
    return Picture(name, caption, png.getvalue(), text)
