"""Pictures of what tools/bench_vs_trl.py --curves and tools/growth.py have measured.

python tools/plot_performance.py curves curves.json curves.png
python tools/plot_performance.py growth growth.json growth.png
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from statistics import fmean
from typing import Any

from bench.curve import WINDOW, running_mean
from matplotlib.figure import Figure

# Paul Tol's muted scheme, as in the reports on memory.
SIDES = {"ours": ("ours", "#332288"), "trl": ("TRL", "#cc6677")}
PHASES = {
    "rollout": "#88ccee", "reference": "#44aa99", "update": "#cc6677", "step": "#222222",
}  # fmt: skip
SIZES = {
    "group": "completions of a problem, G",
    "problems": "problems of a step, B",
    "completion": "completion, tokens",
    "prompt": "prompt, tokens",
}
MIB = 2**20


def curves(record: dict[str, Any]) -> Figure:
    """Reward over the steps: every seed thin, its running mean less so, their mean over seeds
    bold.
    """
    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.subplots()
    for side, (name, colour) in SIDES.items():
        runs = [run for run in record["runs"] if run["side"] == side]
        for run in runs:
            steps = range(1, len(run["reward"]) + 1)
            axes.plot(steps, run["reward"], color=colour, linewidth=0.7, alpha=0.45)
        means = [running_mean(run["reward"]) for run in runs]
        for mean in means:
            axes.plot(_steps(mean), mean, color=colour, linewidth=1.3, alpha=0.7)
        if means and all(means):
            over_seeds = [fmean(values) for values in zip(*means, strict=False)]
            label = f"{name}, mean of {len(runs)} seeds"
            axes.plot(_steps(over_seeds), over_seeds, color=colour, linewidth=3, label=label)
    axes.set_xlabel("step")
    axes.set_ylabel("mean reward")
    axes.set_ylim(-0.02, 1.02)
    axes.set_title(f"One-digit sums: reward of each step (thin), mean over {WINDOW} steps (bold)")
    axes.legend(loc="lower right", frameon=False)
    _plain(axes)
    return figure


def growth(record: dict[str, Any]) -> Figure:
    """A column for each sweep. From above: seconds of a step by phase, peaks of memory of reference
    and update, and that of the rollout.
    """
    sweeps = record["sweeps"]
    size = (3.6 * len(sweeps), 8.5)
    figure = Figure(figsize=size, layout="constrained")
    rows = figure.subplots(3, len(sweeps), squeeze=False, sharex="col", sharey="row")
    for column, (name, points) in enumerate(sweeps.items()):
        seconds, scored, sampled = (row[column] for row in rows)
        values = [point[name] for point in points]
        for phase, colour in PHASES.items():
            style = {"color": colour, "marker": "o", "markersize": 4, "label": phase}
            seconds.plot(values, [point["seconds"][phase] for point in points], **style)
            if phase == "step":
                continue
            peaks = [point["peak_bytes"][phase] / MIB for point in points]
            (sampled if phase == "rollout" else scored).plot(values, peaks, **style)
        seconds.set_title(_held(points[0], name), fontsize="small")
        sampled.set_xlabel(SIZES[name])
        for axes in (seconds, scored, sampled):
            axes.set_xscale("log", base=2)
            axes.set_xticks(values, [str(value) for value in values])
            axes.minorticks_off()
            _plain(axes)
    units = ("seconds of a step", "peak of scoring, MiB", "peak of the rollout, MiB")
    for (first, *_), unit in zip(rows, units, strict=True):
        first.set_ylim(bottom=0)  # the others share its scale
        first.set_ylabel(unit)
        first.legend(frameon=False, fontsize="small")
    figure.suptitle("Memory is that of tensors above the loaded model", fontsize="small")
    return figure


def _held(point: dict[str, Any], size: str) -> str:
    fixed = [
        f"{symbol} {point[name]}"
        for name, symbol in (
            ("group", "G"), ("problems", "B"), ("prompt", "prompt"), ("completion", "completion"),
        )
        if name != size
    ]  # fmt: skip
    return ", ".join(fixed) + f"\n{point['budget']} tokens at once, {point['rows']} rows"


def _steps(means: list[float]) -> range:
    return range(WINDOW, WINDOW + len(means))


def _plain(axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kind", choices=["curves", "growth"])
    parser.add_argument("file", type=Path, help="what was measured, JSON")
    parser.add_argument("picture", type=Path, help="OUT.png, or .svg or .pdf")
    options = parser.parse_args()
    try:
        record = json.loads(options.file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        parser.error(f"{options.file}: {error}; measure it first, see tools/")
    wanted = {"curves": "runs", "growth": "sweeps"}[options.kind]
    if wanted not in record:
        parser.error(f"{options.file} is not a file of {options.kind}: it has no '{wanted}'")
    figure = {"curves": curves, "growth": growth}[options.kind](record)
    figure.savefig(options.picture, dpi=150)
    print(json.dumps({"picture": str(options.picture)}))


if __name__ == "__main__":
    sys.exit(main())
