"""Two sides' measurements beside each other: medians, and ratios with their spread."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

from .curve import reached
from .meter import OTHER, PHASES

SIDES = ("ours", "trl")
GIB = 2**30

Result = dict[str, Any]
"""What a side's `run` returns; `counted`: the numbers of the steps that are timed, from 0."""
Value = Callable[[Result], float]


def compare(rounds: Sequence[dict[str, Result]]) -> dict[str, dict[str, dict[str, Any]]]:
    """{"seconds" | "tokens" | "memory": {row: {"ours", "trl", "ratio", "spread"}}} of rounds of one
    process of each side.

    Of a process the median over its counted steps is taken (memory: the peak of all steps, GiB),
    then the median over the rounds. `ratio` is TRL / ours: the median over the rounds, and `spread`
    its least and greatest; None for what is less than a hundredth of our step in any round.
    """
    seconds: dict[str, Value] = {n: _over_steps(_phase(n)) for n in PHASES}
    seconds[OTHER] = _over_steps(lambda step: step["seconds"] - sum(step["phases"].values()))
    seconds["step"] = _over_steps(lambda step: step["seconds"])
    tokens = {name: _over_steps(_tokens(name)) for name in PHASES if name != "reward"}
    tokens["step"] = _over_steps(lambda step: sum(step["tokens"].values()))
    groups = {"seconds": seconds, "tokens": tokens, "memory": {"peak": peak_gib}}
    found = {}
    for group, rows in groups.items():
        *_, whole = rows.values()
        found[group] = {name: _row(rounds, value, whole) for name, value in rows.items()}
    return found


def peak_gib(result: Result) -> float:
    """The highest resident memory of a process above the loaded model."""
    return max(step["peak_bytes"] for step in result["steps"]) / GIB


def table(compared: dict[str, dict[str, dict[str, Any]]]) -> str:
    """`compare`'s numbers as text."""
    lines = [f"{'':25}{'ours':>10}{'TRL':>10}{'TRL / ours':>12}  (least .. most)"]
    units = {"seconds": "seconds", "tokens": "trunk tokens", "memory": "GiB above model"}
    for group, rows in compared.items():
        digits = {"seconds": 2, "tokens": 0, "memory": 2}[group]
        for name, row in rows.items():
            ratio, spread = "", ""
            if row["ratio"] is not None:
                ratio, spread = f"{row['ratio']:.2f}", "{:.2f} .. {:.2f}".format(*row["spread"])
            sides = "".join(f"{row[side]:>10,.{digits}f}" for side in SIDES)
            lines.append(f"{units[group] + ', ' + name:25}{sides}{ratio:>12}  {spread}".rstrip())
    return "\n".join(lines)


def time_to_reward(runs: Sequence[dict[str, Any]], wanted: float) -> list[dict[str, Any]]:
    """By seed and side, the steps and minutes (of training, without loading) until the running mean
    reward was `wanted`, None where it was not reached; `ratio` is TRL's minutes / ours.
    """
    found = []
    for seed in sorted({run["seed"] for run in runs}):
        row: dict[str, Any] = {"seed": seed}
        for run in (run for run in runs if run["seed"] == seed):
            step = reached(run["reward"], wanted)
            row[run["side"]] = {
                "steps": step,
                "minutes": None if step is None else run["ended"][step - 1] / 60,
            }
        minutes = [row.get(side, {}).get("minutes") for side in SIDES]
        row["ratio"] = minutes[1] / minutes[0] if all(minutes) else None
        found.append(row)
    return found


def time_line(row: dict[str, Any]) -> str:
    """A row of `time_to_reward` as text."""
    parts = []
    for side, name in zip(SIDES, ("ours", "TRL"), strict=True):
        one = row[side]
        taken = f"{one['steps']} steps, {one['minutes']:.2f} minutes" if one["steps"] else "never"
        parts.append(f"{name} {taken}")
    ratio = "" if row["ratio"] is None else f"; ratio {row['ratio']:.2f}"
    return f"seed {row['seed']}: {'; '.join(parts)}{ratio}"


def _over_steps(value: Callable[[dict[str, Any]], float]) -> Value:
    return lambda result: median(value(result["steps"][i]) for i in result["counted"])


def _phase(name: str) -> Callable[[dict[str, Any]], float]:
    return lambda step: step["phases"][name]


def _tokens(name: str) -> Callable[[dict[str, Any]], float]:
    return lambda step: step["tokens"][name]


def _row(rounds: Sequence[dict[str, Result]], value: Value, whole: Value) -> dict[str, Any]:
    pairs = [tuple(value(pair[side]) for side in SIDES) for pair in rounds]
    ours, trl = (median(side) for side in zip(*pairs, strict=True))
    row: dict[str, Any] = {"ours": ours, "trl": trl, "ratio": None, "spread": None}
    if all(value(pair["ours"]) > whole(pair["ours"]) / 100 for pair in rounds):
        ratios = [b / a for a, b in pairs]
        row |= {"ratio": median(ratios), "spread": [min(ratios), max(ratios)]}
    return row
