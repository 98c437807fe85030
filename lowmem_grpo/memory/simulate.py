"""Run a trace of allocations through the simulated allocator: its peaks, and whether it fits.

Left out: where traces come from; that is `memory/trace.py` and `memory/snapshot.py`.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from lowmem_grpo.memory.allocator import (
    AllocatorSettings,
    Block,
    CachingAllocator,
    Event,
    OutOfMemoryError,
)
from lowmem_grpo.memory.expandable import ExpandableAllocator


class Timeline(NamedTuple):
    """Bytes after each event."""

    allocated: array
    reserved: array


@dataclass
class Usage:
    """What a trace needed, in bytes. `oom` is set, and the trace cut short, if it did not fit."""

    peak_allocated: int
    peak_reserved: int
    final_allocated: int
    final_reserved: int
    timeline: Timeline
    retries: int
    collected: int
    oom: OutOfMemoryError | None = None
    oom_event: int | None = None


def new_allocator(settings: AllocatorSettings | None = None) -> CachingAllocator:
    """An empty allocator of the kind that the settings ask for."""
    expandable = settings is not None and settings.expandable_segments
    return ExpandableAllocator(settings) if expandable else CachingAllocator(settings)


def simulate(events: Iterable[Event], settings: AllocatorSettings | None = None) -> Usage:
    """Run a trace through a fresh allocator.

    Raises `ValueError` for an unknown action, an id that is allocated twice or freed without being
    live, and sizes that are not positive; the message names the event. Running out of memory does
    not raise: it ends the simulation and is reported in `oom` and `oom_event`.
    """
    allocator = new_allocator(settings)
    live: dict[int, Block] = {}
    timeline = Timeline(array("q"), array("q"))
    oom = oom_event = None
    for number, event in enumerate(events):
        try:
            if event.action == "alloc":
                if event.id in live:
                    raise ValueError(f"id {event.id} is live already; free it first")
                live[event.id] = allocator.malloc(event.size, event.stream)
            elif event.action == "free":
                if event.id not in live:
                    raise ValueError(f"id {event.id} is not live; each alloc is freed at most once")
                allocator.free(live.pop(event.id))
            elif event.action == "empty_cache":
                allocator.empty_cache()
            else:
                raise ValueError(f"action {event.action!r}; use alloc, free or empty_cache")
        except OutOfMemoryError as error:
            oom, oom_event = error, number
            break
        except ValueError as error:
            raise ValueError(f"event {number}: {error}") from None
        timeline.allocated.append(allocator.allocated)
        timeline.reserved.append(allocator.reserved)
    return Usage(
        allocator.peak_allocated,
        allocator.peak_reserved,
        allocator.allocated,
        allocator.reserved,
        timeline,
        allocator.retries,
        allocator.collected,
        oom,
        oom_event,
    )


def add_up(events: Iterable[Event]) -> Usage:
    """The running sum of a trace's bytes: a device without a caching allocator, such as a CPU, on
    which what is allocated is what is reserved.
    """
    live: dict[int, int] = {}
    sums, total = array("q"), 0
    for event in events:
        if event.action == "alloc":
            live[event.id] = event.size
            total += event.size
        elif event.action == "free":
            total -= live.pop(event.id)
        sums.append(total)
    peak = max(sums, default=0)
    return Usage(peak, peak, total, total, Timeline(sums, sums), 0, 0)
