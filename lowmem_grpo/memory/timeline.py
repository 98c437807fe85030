"""What was alive after each event of a trace, thinned out for a picture: plain numbers, no torch.

A stretch is a run of events of one phase. Of each stretch the first and the last event are kept,
and where most is reserved; of each bucket within it, the event after which most is allocated. So
every phase keeps its peaks and the level it ends at. What falls between, lows above all, is lost.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

from lowmem_grpo.memory.allocator import Event

__all__ = ["stretches", "thinned", "timeline"]


def timeline(
    events: Sequence[Event],
    allocated: Sequence[int],
    reserved: Sequence[int] | None = None,
    most: int = 2000,
) -> dict:
    """The phase and the bytes at about `most` events or less, in order: `phase`, `allocated`,
    `reserved` (or None) and `components`, which add up to `allocated` if that began at 0.

    `allocated` and `reserved` are the bytes after each event; where they end early (a simulation
    that ran out of memory), the timeline ends too. A block's size is the difference in allocated
    bytes, and not the bytes asked for. More than `most` are kept only of a trace that changes its
    phase more than `most` / 4 times.
    """
    events = events[: len(allocated)]
    phases = [event.phase for event in events]
    kept = thinned(phases, allocated, reserved, most)
    wanted = set(kept)
    live: dict[str, int] = {}
    owner: dict[int, str] = {}
    found: list[dict[str, int]] = []
    before = 0
    for place, event in enumerate(events):
        if event.action == "alloc":
            owner[event.id] = event.component or "other"
        if event.action in ("alloc", "free"):
            name = owner[event.id]
            live[name] = live.get(name, 0) + allocated[place] - before
        before = allocated[place]
        if place in wanted:
            found.append(dict(live))
    return {
        "phase": [phases[place] for place in kept],
        "allocated": [allocated[place] for place in kept],
        "reserved": None if reserved is None else [reserved[place] for place in kept],
        "components": {name: [point.get(name, 0) for point in found] for name in live},
    }


def thinned(
    phases: Sequence[str],
    allocated: Sequence[int],
    reserved: Sequence[int] | None,
    most: int,
) -> list[int]:
    """The places that stay of `phases`, in order; all of them when there are at most `most`."""
    if len(phases) <= most:
        return list(range(len(phases)))
    runs = stretches(phases)
    # Each stretch takes three places besides its buckets, and rounds their number up.
    width = -(-len(phases) // max(1, most - 4 * len(runs)))
    kept: set[int] = set()
    for start, end in runs:
        kept |= {start, end - 1}
        if reserved is not None:
            kept.add(max(range(start, end), key=reserved.__getitem__))
        for low in range(start, end, width):
            kept.add(max(range(low, min(low + width, end)), key=allocated.__getitem__))
    return sorted(kept)


def stretches(phases: Sequence[str]) -> list[tuple[int, int]]:
    """(first place, place after the last) of each run of one phase."""
    found, start = [], 0
    for _, run in groupby(phases):
        end = start + len(list(run))
        found.append((start, end))
        start = end
    return found
