"""A run held against its plan: what was measured beside what was predicted for the same shapes.

A plan is made for the longest step. One that was taken is mostly shorter, so it is planned once
more, for the lengths that it had: only then does a difference say something about the prediction.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

from lowmem_grpo.config import Config
from lowmem_grpo.errors import DamageError, PlanError
from lowmem_grpo.memory.allocator import MIB
from lowmem_grpo.memory.measure import Gauge, alive, measure
from lowmem_grpo.memory.plan import MemoryPlan, PhasePlan, Planner
from lowmem_grpo.memory.shapes import Shapes, longest
from lowmem_grpo.out_of_memory import first_line, is_out_of_memory
from lowmem_grpo.plain_json import parse_json
from lowmem_grpo.run.directory import write_atomic
from lowmem_grpo.run.meter import Meter

__all__ = ["DEVIATION", "Watch", "compare", "deviations", "record"]

DEVIATION = 0.05
"""From here on a difference is a warning."""


def compare(plan: MemoryPlan, measured: dict[str, dict[str, int]]) -> list[dict[str, Any]]:
    """A row for each phase that was planned and measured; `measured`: {phase: {"allocated": bytes,
    "reserved": bytes}}, of which a CPU has the first only. Deviations are measured / predicted - 1.
    """
    return [
        _row(phase, measured[phase.name], plan.card.cuda)
        for phase in plan.phases
        if "allocated" in measured.get(phase.name, {})
    ]


def _row(phase: PhasePlan, measured: dict[str, int], cuda: bool) -> dict[str, Any]:
    reserved = measured.get("reserved")
    return {
        "phase": phase.name,
        "predicted_allocated_bytes": phase.peak_allocated_bytes,
        "measured_allocated_bytes": measured["allocated"],
        "allocated_deviation": measured["allocated"] / phase.peak_allocated_bytes - 1,
        "predicted_reserved_bytes": phase.peak_reserved_bytes if cuda else None,
        "measured_reserved_bytes": reserved,
        "reserved_deviation": None
        if reserved is None
        else reserved / phase.peak_reserved_bytes - 1,
    }


def deviations(rows: Iterable[dict[str, Any]]) -> list[str]:
    """A sentence for each number that is off by more than `DEVIATION`."""
    found = []
    for row in rows:
        for kind in ("allocated", "reserved"):
            off = row[f"{kind}_deviation"]
            if off is not None and abs(off) > DEVIATION:
                measured, predicted = row[f"measured_{kind}_bytes"], row[f"predicted_{kind}_bytes"]
                found.append(
                    f"{row['phase']}: {measured / MIB:.0f} MiB {kind}, predicted "
                    f"{predicted / MIB:.0f} for these shapes ({off:+.1%})"
                )
    return found


class Watch:
    """Compares the first step of a process, and at its end the step that took most; on a CPU, where
    measuring is a trace that costs time, the first and the last.

    `file`: where comparisons are kept, a list of objects. `say` and `warn` are told. `rewards`: the
    run's, of which models are loaded.
    """

    def __init__(self, planner: Planner, config: Config, file: Path, say, warn, rewards=()):
        self.planner, self.config, self.file = planner, config, file
        self.say, self.warn = say, warn
        self.models = [reward.function for reward in rewards if reward.here]
        self._first = self._fresh = True
        self._kept: list[tuple] = []
        self._keeping = False
        self._most: tuple[int, int, dict, Shapes] | None = None

    def meter(self, policy, optimizer, *, last: bool) -> Meter:
        """What measures the next step, which may be the run's last."""
        living = partial(alive, policy, optimizer, self.models) if self._first or last else None
        for model in self.models:
            model.met.clear()
        self._fresh = not optimizer.state
        return Meter(policy.device, living)

    def step(self, number: int, memory: dict[str, dict[str, int]], shapes: Shapes) -> None:
        """A step was taken; `memory` as a meter has it."""
        shapes = shapes._replace(scored=tuple(tuple(model.met) for model in self.models))
        taken = max((phase.get("allocated", 0) for phase in memory.values()), default=0)
        if not taken or not shapes.batches:
            return
        if self._first:
            self._first = False
            self._compare(number, "first step", memory, shapes)
        elif self._most is None or taken >= self._most[0]:
            self._most = taken, number, memory, shapes

    def end(self) -> None:
        """The run has ended: compare the largest step after the first."""
        if self._most is not None:
            _, number, memory, shapes = self._most
            self._compare(number, "at the end", memory, shapes)

    def rehearse(self, policy, optimizer, advance=lambda tokens: None) -> None:
        """Run the longest planned shapes, and throw away what comes of it.

        Raises PlanError where the device runs out of memory.
        """
        # An evaluation is planned beside moments, which a rehearsal does not have.
        shapes = longest(self.config, self.planner.padded)._replace(evaluation=None)
        gauge = Gauge(policy.device)
        self._fresh = not optimizer.state
        try:
            with gauge:
                gauge.adopt(alive(policy, optimizer, self.models), policy.model)
                how = {"models": self.models, "advance": advance}
                measure(policy, self.config, shapes, gauge, **how)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            raise PlanError(
                f"the rehearsal ran out of memory, in {gauge.running}: {first_line(error)}"
            ) from error
        measured = gauge.measured()
        measured.peaks.pop("load", None)  # which was over before this began
        self._compare(0, "rehearsal", measured.peaks, shapes, measured)

    def keep(self) -> None:
        """The run's directory is its own now: write what was compared, and do so from here on."""
        self._keeping = True
        while self._kept:
            record(self.file, *self._kept.pop(0))

    def _compare(self, number: int, when: str, memory, shapes: Shapes, measured=None) -> None:
        """Whatever goes wrong here must not end a run that goes well."""
        try:
            self._compared(number, when, memory, shapes, measured)
        except Exception as error:
            self.warn(f"memory, {when}: not compared, {type(error).__name__}: {error}")

    def _compared(self, number: int, when: str, memory, shapes: Shapes, measured) -> None:
        steps = 1 if self._fresh else 2
        rows = compare(self.planner.plan(self.config, shapes, steps), memory)
        self.planner.forget()
        self._kept.append((rows, number, when, measured))
        if self._keeping:
            self.keep()
        found = deviations(rows)
        if not found:
            off = max((abs(row["allocated_deviation"]) for row in rows), default=0.0)
            self.say(f"memory, {when}: as predicted, within {off:.1%}")
        for text in found:
            self.warn(f"memory, {when}: {text}")


def record(file: Path, rows: list[dict[str, Any]], step: int, when: str, measured=None) -> None:
    """Add a comparison to the file that keeps them. `measured`: a `measure.Measured`, if there is
    one.
    """
    try:
        known = parse_json(file.read_bytes()) if file.exists() else []
    except (OSError, ValueError) as error:
        raise DamageError(f"cannot read {file}: {error}: remove it") from error
    if not isinstance(known, list):
        raise DamageError(f"{file} is no list of comparisons: remove it")
    entry = {"step": step, "when": when, "comparison": rows}
    known.append(entry if measured is None else {**entry, "measured": measured.to_json()})
    write_atomic(file, json.dumps(known))
