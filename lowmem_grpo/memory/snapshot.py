"""Replay a recorded `torch.cuda.memory._snapshot()` through the simulated allocator.

A snapshot holds the segments as they were when it was taken, and the allocator's last events (the
trace, a ring: it starts anywhere). The start is found by running the trace backwards from the final
segments: an `alloc` frees, a `free_completed` occupies, a `segment_alloc` removes its segment, and
so on. What is in use at the start and freed within the trace is known by its requested size only;
its block is the rounded size, plus what rule 5 of `memory/allocator.py` would not have split off
before the next block (or before the free block that an `alloc` in between shows).

Then the trace runs forward. The simulator is told the addresses of new segments, and when memory
went back to CUDA (the trace cannot tell why); everything else it must find by itself: every
address, whether and how large a new segment is needed, which segments a release frees, and the
final totals.

Left out: files (`memory/replay.py`), expandable segments, private pools of CUDA graphs (both are
refused by name), and the events that blocks waited for, whose times the trace holds as
`free_completed`.

Source: torch 2.13, torch/cuda/memory.py (`_snapshot`) for the format.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace

from lowmem_grpo.memory.allocator import (
    FREE,
    PENDING,
    SMALL_SEGMENT,
    SMALL_SIZE,
    USED,
    AllocatorSettings,
    Block,
    CachingAllocator,
)

STATES = {
    "active_allocated": USED,
    "active_pending_free": PENDING,
    "active_awaiting_free": PENDING,
    "inactive": None,
}
UNSEEN_ADDRESS = 2**60  # for segments that only the simulator wants; above every real address


@dataclass(kw_only=True)
class ReplayReport:
    """What agreed between a recorded trace and the simulator. Sizes in bytes, the rest counts."""

    file: str = ""
    """Where the snapshot came from; empty for one that was never in a file."""
    device: int
    entries: int
    """Events in the trace."""
    allocations: int
    addresses_exact: int
    """Allocations that got the recorded address."""
    segments: int
    segments_exact: int
    """New segments that the simulator asked for at the same moment, in the same size."""
    releases: int
    releases_exact: int
    """Segments given back to CUDA; those whose release freed exactly what the rules say."""
    start_allocated: int
    start_reserved: int
    peak_allocated: int
    peak_reserved: int
    final_allocated: int
    final_reserved: int
    recorded_final_allocated: int
    recorded_final_reserved: int

    @property
    def totals_exact(self) -> bool:
        """The final allocated and reserved bytes are the recorded ones."""
        return (
            self.final_allocated == self.recorded_final_allocated
            and self.final_reserved == self.recorded_final_reserved
        )

    @property
    def exact(self) -> bool:
        """Every address, every new segment, every release and both totals agree."""
        return (
            self.addresses_exact == self.allocations
            and self.segments_exact == self.segments
            and self.releases_exact == self.releases
            and self.totals_exact
        )

    def to_json(self) -> dict:
        """The fields, with `totals_exact` and `exact`."""
        return {**asdict(self), "totals_exact": self.totals_exact, "exact": self.exact}


@dataclass
class _Use:
    """A block in use: its size is None while only the request is known."""

    requested: int
    size: int | None
    state: int


@dataclass
class _State:
    """Segments as address -> (size, stream), and the blocks in use by address."""

    segments: dict[int, tuple[int, int]]
    used: dict[int, _Use]


def replay_snapshot(
    snapshot: dict, settings: AllocatorSettings | None = None, device: int | None = None
) -> ReplayReport:
    """Replay the trace of one device in a snapshot, as `torch.cuda.memory._snapshot()` gives it.

    `settings`: how the allocator was configured; by default what the snapshot says (older ones say
    nothing: torch's defaults). Card size and garbage collection play no part, since the trace says
    when memory was refused and given back. `device`: needed only when several have a trace.
    Raises `ValueError` that says what is wrong and names a way out.
    """
    try:
        return _replay(snapshot, settings, device)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"not a memory snapshot (missing or misplaced: {error}); give a file from "
            "torch.cuda.memory._dump_snapshot"
        ) from None


def _replay(snapshot: dict, settings: AllocatorSettings | None, device: int | None) -> ReplayReport:
    traces = {number: trace for number, trace in enumerate(snapshot["device_traces"]) if trace}
    if not traces:
        raise ValueError(
            "the snapshot has no trace; call torch.cuda.memory._record_memory_history() before the "
            "run that is to be recorded"
        )
    if device is None and len(traces) == 1:
        device = next(iter(traces))
    if device not in traces:
        given = "no device was given" if device is None else f"device {device} has none"
        raise ValueError(f"{given}; the devices with a trace are {sorted(traces)}")
    trace = traces[device]
    settings = settings or _recorded_settings(snapshot.get("allocator_settings"))
    # The trace says when memory was refused and given back; a limit would release it twice.
    settings = replace(settings, card_memory=None, outside_bytes=0, process_fraction=None)
    settings = replace(settings, garbage_collection_threshold=0.0)
    final = _final_state(snapshot["segments"], device)
    actions = {entry["action"] for entry in trace}
    if settings.expandable_segments or actions & {"segment_map", "segment_unmap"}:
        raise ValueError("expandable segments cannot be replayed; record the run without them")
    recorded_reserved = sum(size for size, _ in final.segments.values())
    recorded_allocated = sum(use.size for use in final.used.values() if use.state == USED)
    _run_backwards(trace, final)
    run = _Run(settings, trace, final)
    start = run.allocator.allocated, run.allocator.reserved
    run.forward()
    allocator = run.allocator
    return ReplayReport(
        device=device,
        entries=len(trace),
        allocations=run.allocations,
        addresses_exact=run.addresses_exact,
        segments=run.segments,
        segments_exact=allocator.segments_exact,
        releases=run.releases,
        releases_exact=run.releases_exact,
        start_allocated=start[0],
        start_reserved=start[1],
        peak_allocated=allocator.peak_allocated,
        peak_reserved=allocator.peak_reserved,
        final_allocated=allocator.allocated,
        final_reserved=allocator.reserved,
        recorded_final_allocated=recorded_allocated,
        recorded_final_reserved=recorded_reserved,
    )


def _recorded_settings(recorded: dict | None) -> AllocatorSettings:
    """What the snapshot says; `large_segment_size` is not in it."""
    if recorded is None:
        return AllocatorSettings()
    max_split, divisions = recorded["max_split_size"], recorded["roundup_power2_divisions"]
    return AllocatorSettings(
        expandable_segments=recorded["expandable_segments"],
        max_split_size=None if max_split < 0 else max_split,
        roundup_power2_divisions=tuple(divisions[key] for key in sorted(divisions, key=int)),
    )


def _final_state(segments: list, device: int) -> _State:
    state = _State({}, {})
    for segment in segments:
        if segment["device"] != device:
            continue
        if tuple(segment.get("segment_pool_id", (0, 0))) != (0, 0):
            raise ValueError("private pools of CUDA graphs cannot be replayed; record without them")
        if segment.get("is_expandable"):
            raise ValueError("expandable segments cannot be replayed; record the run without them")
        address = segment["address"]
        state.segments[address] = (segment["total_size"], segment["stream"])
        for block in segment["blocks"]:
            # Blocks lie end to end; older snapshots do not give their addresses.
            if (use := STATES[block["state"]]) is not None:
                state.used[address] = _Use(block["size"], block["size"], use)
            address += block["size"]
    return state


def _run_backwards(trace: list, state: _State) -> None:
    """Turn the state after the trace into the one before it."""
    segments, used = state.segments, state.used
    for number in range(len(trace) - 1, -1, -1):
        entry = trace[number]
        action, address = entry["action"], entry.get("addr")
        if action == "alloc":
            fits = used.pop(address, None) is not None
        elif action == "free_completed":
            fits = address not in used
            used[address] = _Use(entry["size"], None, PENDING)
        elif action == "free_requested":
            fits = address in used and used[address].state == PENDING
            if fits:
                used[address].state = USED
        elif action == "segment_alloc":
            fits = segments.pop(address, None) is not None
        elif action == "segment_free":
            fits = address not in segments
            segments[address] = (entry["size"], entry["stream"])
        else:
            fits = True
        if not fits:
            raise ValueError(
                f"entry {number} ({action} at {address:#x}) does not lead to the segments that the "
                "snapshot shows; record and dump in one process, without clearing the history"
            )


def _rests(trace: list, gaps: list[tuple[int, int, int]]) -> dict[int, int]:
    """The unsplit rests of blocks whose end is unknown, by block address, where the trace tells.

    `gaps`: (start, end, block address), by start: what follows the rounded size of each such block.
    The first `alloc` that lands in a gap while its block is in use lands where the free block
    begins, since a free block is used from its low end.
    """
    starts = [start for start, _, _ in gaps]
    waiting = {block for _, _, block in gaps}
    rests = {}
    for entry in trace:
        action, address = entry["action"], entry.get("addr")
        if action == "alloc":
            number = bisect_right(starts, address) - 1
            if number >= 0:
                start, end, block = gaps[number]
                if address < end and block in waiting:
                    waiting.remove(block)
                    if address - start <= SMALL_SIZE:
                        rests[block] = address - start
        elif action == "free_completed":
            waiting.discard(address)
    return rests


class _ReplayAllocator(CachingAllocator):
    """The simulated allocator, told where the segments lie."""

    def __init__(self, settings: AllocatorSettings):
        super().__init__(settings)
        self.announced: tuple[int, int] | None = None  # (address, size) of a recorded new segment
        self.next_unseen = UNSEEN_ADDRESS
        self.segments_exact = 0

    def add_segment(
        self, address: int, size: int, stream: int, pieces: Iterable[tuple[int, int, int]]
    ) -> dict[int, Block]:
        """Put a segment with a known layout in place; its blocks in use come back by address.

        `pieces`: (address, size, state) of the blocks in use (USED or PENDING), by address; what
        lies between them is free.
        """
        pool = self.small if size == SMALL_SEGMENT else self.large
        self.segments[address] = size
        self._reserve(size)
        edge, before, used = address, None, {}
        for start, length, state in [*pieces, (address + size, 0, FREE)]:
            gap = (edge, start - edge, FREE)
            for where, long, what in (gap, (start, length, state)):
                if long:
                    block = Block(where, long, stream, pool, what)
                    block.prev = before
                    if before is not None:
                        before.next = block
                    before = block
                    if what == FREE:
                        pool.add(block)
                    else:
                        used[where] = block
                        self.allocated += long if what == USED else 0
            edge = start + length
        self.peak_allocated = max(self.peak_allocated, self.allocated)
        return used

    def _new_address(self, size: int) -> int:
        if self.announced is not None and self.announced[1] == size:
            address = self.announced[0]
            self.announced = None
            self.segments_exact += 1
            return address
        self.next_unseen += size
        return self.next_unseen - size


class _Run:
    """The forward pass, and what it counts."""

    def __init__(self, settings: AllocatorSettings, trace: list, start: _State):
        self.trace = trace
        self.allocator = _ReplayAllocator(settings)
        self.allocations = self.addresses_exact = 0
        self.segments = self.releases = self.releases_exact = 0
        self.blocks: dict[int, Block] = {}  # by recorded address
        self._lay_out(start)

    def _lay_out(self, start: _State) -> None:
        """Put the segments and blocks of the start in place, finding the sizes not yet known."""
        addresses = sorted(start.used)
        limit = self.allocator.settings.max_split_size
        ends, gaps, inside = {}, [], {}
        for address, (size, _) in sorted(start.segments.items()):
            low, high = bisect_left(addresses, address), bisect_left(addresses, address + size)
            inside[address] = blocks = addresses[low:high]
            for block, end in zip(blocks, [*blocks, address + size][1:], strict=True):
                ends[block] = end
                use = start.used[block]
                if use.size is not None:
                    continue
                use.size = self.allocator.rounded(use.requested)
                rest = end - block - use.size
                unsplittable = limit is not None and use.size >= limit
                if size != SMALL_SEGMENT and (rest <= SMALL_SIZE or unsplittable):
                    use.size += rest
                elif size != SMALL_SEGMENT:
                    gaps.append((block + use.size, end, block))
        for block, rest in _rests(self.trace, gaps).items():
            start.used[block].size += rest
        for block, use in start.used.items():
            if block not in ends or not 0 < use.size <= ends[block] - block:
                raise ValueError(
                    f"the block at {block:#x} ({use.requested} bytes) does not fit the segments; "
                    "give the settings that the run had"
                )
        for address, (size, stream) in start.segments.items():
            uses = [(block, start.used[block]) for block in inside[address]]
            pieces = [(block, use.size, use.state) for block, use in uses]
            self.blocks |= self.allocator.add_segment(address, size, stream, pieces)

    def forward(self) -> None:
        released: set[int] = set()
        for entry in self.trace:
            action, address = entry["action"], entry.get("addr")
            if action == "segment_free":
                released.add(address)
                continue
            if released:
                self._release(released)
                released = set()
            if action == "alloc":
                block = self.allocator.malloc(entry["size"], entry["stream"])
                self.allocations += 1
                self.addresses_exact += block.address == address
                self.blocks[address] = block
                self.allocator.announced = (
                    None  # what the simulator did not ask for now, it never will
                )
            elif action == "free_requested":
                self.allocator.free_requested(self.blocks[address])
            elif action == "free_completed":
                self.allocator.free_completed(self.blocks.pop(address))
            elif action == "segment_alloc":
                self.segments += 1
                self.allocator.announced = (address, entry["size"])
        if released:
            self._release(released)

    def _release(self, recorded: set[int]) -> None:
        """Release what was released, and compare it with what the rules would have released."""
        cached = {block.address: block for block in self.allocator.cached_segments()}
        self.releases += len(recorded)
        if recorded == set(cached):
            self.releases_exact += len(recorded)
        for address in recorded & set(cached):
            self.allocator.release(cached[address])
