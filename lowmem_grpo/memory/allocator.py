"""The CUDA caching allocator of torch, simulated: plain numbers in, bytes out, no GPU and no torch.

The rules (torch 2.9 to 2.13; sizes in bytes, K = 1024, M = 1024 K):

1. A request is rounded up to 512, or to the next of d equal steps between two powers of two
   (`roundup_power2_divisions`) when d > 1 and the request is above 512 d.
2. Rounded sizes up to 1M live in the small pool, the others in the large pool.
3. The smallest free block that is long enough, on the same stream, lowest address first, is taken.
   With `max_split_size`, a size below it never takes a block at or above it, and a size at or above
   it refuses a block that is longer by `max_non_split_rounding_size` or more.
4. Otherwise a new segment comes from CUDA: 2M (small pool), `large_segment_size` (below 10M), else
   the size rounded up to 2M. If CUDA refuses: cached blocks of `max_split_size` and more go back,
   only as many as needed; then every cached segment that is not split; then out of memory.
5. The block is split and its low part returned when the rest is at least 512 (small pool), or above
   1M with a size below `max_split_size` (large pool). What is not split off counts as allocated.
6. A freed block merges with its free neighbours. Memory goes back to CUDA by `empty_cache`, by the
   refusal of rule 4, or by garbage collection: with a process fraction and a threshold, a miss that
   finds more reserved than threshold x fraction x card frees the unsplit blocks of the large pool
   that have waited at least the mean number of look-ups, until enough is back.

Rule 7, expandable segments, is a subclass (`memory/expandable.py`); `memory/simulate.py` chooses.

Left out: CUDA graphs' private pools, several devices, waiting for streams (whoever knows the times
calls `free_requested` and `free_completed`), memory outside the allocator (`outside_bytes`), and
the alignment to pages that CUDA adds to odd segment sizes. Addresses are invented, never reused.

Source: the behaviour of c10/core/AllocatorConfig.h and the caching allocator of torch 2.13,
restated; checked address by address against recorded snapshots (`memory/snapshot.py`).
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import NamedTuple

from sortedcontainers import SortedList

MIB = 1024**2
MIN_BLOCK = 512
SMALL_SIZE = MIB
SMALL_SEGMENT = ROUND_LARGE = 2 * MIB
MIN_LARGE_ALLOC = 10 * MIB
NUM_INTERVALS = 16  # of roundup_power2_divisions: [1M, 2M), [2M, 4M), ..., 32G and above
UNLIMITED = 2**63
FIRST_ADDRESS = 0x7F00_0000_0000
FREE, USED, PENDING = range(3)  # the states of a block


class Event(NamedTuple):
    """One line of a trace. The tags say whose memory it is; the simulator does not read them."""

    action: str
    """"alloc", "free" or "empty_cache"."""
    id: int = 0
    """Names the allocation; a `free` carries the id of its `alloc`. May be used again later."""
    size: int = 0
    """Requested bytes of an `alloc`."""
    stream: int = 0
    phase: str = ""
    module: str = ""
    component: str = ""


class OutOfMemoryError(MemoryError):
    """CUDA refused, and giving back the cached memory did not help. All fields are bytes.

    `requested`: the rounded request; `segment`: what was asked of CUDA; `allocated` and `reserved`
    after everything cached was given back; `limit`: what the process could have had.
    """

    def __init__(self, requested: int, segment: int, allocated: int, reserved: int, limit: int):
        self.requested, self.segment, self.limit = requested, segment, limit
        self.allocated, self.reserved = allocated, reserved
        super().__init__(
            f"out of memory: {segment / MIB:.1f} MiB more were asked of CUDA with "
            f"{reserved / MIB:.1f} MiB reserved ({allocated / MIB:.1f} allocated) of "
            f"{limit / MIB:.1f}; lower the request, or set expandable_segments if much is "
            "reserved but not allocated"
        )


@dataclass(frozen=True)
class AllocatorSettings:
    """What `PYTORCH_ALLOC_CONF` and the card decide. Sizes in bytes.

    Raises `ValueError` for the values that torch refuses as well.
    """

    card_memory: int | None = None
    """Memory of the card; None: CUDA never refuses."""
    outside_bytes: int = 0
    """What the CUDA context, other processes and the desktop hold of the card."""
    process_fraction: float | None = None
    """Caps the reserved bytes at this part of the card (`set_per_process_memory_fraction`)."""
    expandable_segments: bool = False
    """Grow one address range page by page instead of taking separate segments."""
    max_split_size: int | None = None
    """Blocks of this size or more are never split; None: all may be. Whole MiB."""
    max_non_split_rounding_size: int | None = None
    """How much longer than an unsplittable request its block may be; None: `large_segment_size`."""
    roundup_power2_divisions: int | tuple[int, ...] = 0
    """Steps between powers of two: one number, or 16 for [1M, 2M), [2M, 4M), ...; 0: off."""
    garbage_collection_threshold: float = 0.0
    """Collect garbage above this part of what the process fraction allows; 0: off."""
    large_segment_size: int = 20 * MIB
    """Segment (or page, when expandable) for large requests below 10 MiB. Whole MiB."""

    def __post_init__(self) -> None:
        large, split = self.large_segment_size, self.max_split_size
        fraction, threshold = self.process_fraction, self.garbage_collection_threshold
        divisions = self.divisions
        if large <= MIN_LARGE_ALLOC or large % MIB:
            raise ValueError(f"large_segment_size {large}: give whole MiB above 10 MiB")
        if split is not None and (split < large or split % MIB):
            raise ValueError(f"max_split_size {split}: give whole MiB, at least {large}")
        if (rounding := self.max_non_split_rounding_size) is not None and rounding < large:
            raise ValueError(f"max_non_split_rounding_size {rounding}: give at least {large}")
        if len(divisions) != NUM_INTERVALS or any(d < 0 or d & (d - 1) for d in divisions):
            given = self.roundup_power2_divisions
            raise ValueError(f"roundup_power2_divisions {given}: give a power of two, or 16, or 0")
        if not 0 <= threshold < 1:
            raise ValueError(f"garbage_collection_threshold {threshold}: give 0 (off) or below 1")
        if self.card_memory is not None and self.card_memory <= 0:
            raise ValueError(f"card_memory {self.card_memory}: give the card's bytes, or None")
        if self.outside_bytes < 0:
            raise ValueError(f"outside_bytes {self.outside_bytes}: give 0 or more")
        if fraction is not None and (not 0 <= fraction <= 1 or self.card_memory is None):
            raise ValueError(f"process_fraction {fraction}: give 0 to 1, together with card_memory")

    @property
    def divisions(self) -> tuple[int, ...]:
        """`roundup_power2_divisions`, one number for each of the 16 intervals."""
        given = self.roundup_power2_divisions
        return given if isinstance(given, tuple) else (given,) * NUM_INTERVALS

    @property
    def rounding(self) -> int:
        """`max_non_split_rounding_size`, or its default."""
        return self.max_non_split_rounding_size or self.large_segment_size

    @property
    def limit(self) -> int | None:
        """The most bytes that can be reserved at once; None without a card."""
        if self.card_memory is None:
            return None
        fraction = 1.0 if self.process_fraction is None else self.process_fraction
        return min(int(fraction * self.card_memory), self.card_memory - self.outside_bytes)


class Block:
    """A stretch of a segment, a chain of blocks; `address`, `size` in bytes.

    Neighbours that are both FREE are always merged; one that is USED or PENDING is never moved.
    """

    __slots__ = ("address", "born", "next", "pool", "prev", "size", "state", "stream")

    def __init__(self, address: int, size: int, stream: int, pool: Pool, state: int = USED):
        self.address, self.size, self.stream, self.pool = address, size, stream, pool
        self.state = state
        self.prev: Block | None = None
        self.next: Block | None = None
        self.born = 0  # the pool's count of look-ups when the block became free

    @property
    def whole(self) -> bool:
        """The block is alone in its segment."""
        return self.prev is None and self.next is None

    def cut(self, size: int, state: int) -> Block:
        """Shorten the block to `size` and return the rest as its next neighbour."""
        rest = Block(self.address + size, self.size - size, self.stream, self.pool, state)
        rest.prev, rest.next = self, self.next
        if self.next is not None:
            self.next.prev = rest
        self.next = rest
        self.size = size
        return rest

    def absorb(self, other: Block) -> None:
        """Grow over a neighbour, which is a block no more."""
        self.size += other.size
        if other is self.next:
            self.next = other.next
            if self.next is not None:
                self.next.prev = self
        else:
            self.address, self.prev = other.address, other.prev
            if self.prev is not None:
                self.prev.next = self


class Pool:
    """One size class: for each stream, its free blocks by (size, address).

    `segment`: bytes of its smallest segment. `least_rest`: the shortest rest that is split off.
    """

    def __init__(self, segment: int, least_rest: int):
        self.segment, self.least_rest = segment, least_rest
        self.free = defaultdict(SortedList)  # by stream, of (size, address, block)
        self.lookups = 0

    def add(self, block: Block) -> None:
        """Merge a FREE block with its free neighbours and list it."""
        for other in (block.prev, block.next):
            if other is not None and other.state == FREE:
                self.remove(other)
                block.absorb(other)
        block.born = self.lookups
        self.free[block.stream].add((block.size, block.address, block))

    def remove(self, block: Block) -> None:
        """Take a FREE block off its list."""
        self.free[block.stream].remove((block.size, block.address, block))

    def listed(self) -> list[Block]:
        """The free blocks by (stream, size, address)."""
        return [block for stream in sorted(self.free) for _, _, block in self.free[stream]]


class CachingAllocator:
    """One device's allocator, without expandable segments. All quantities in bytes.

    `allocated`, `reserved` and their peaks follow torch's `memory_allocated`, `memory_reserved`.
    `segments` maps address to size. `retries` counts the times that everything cached was given
    back because CUDA refused; `collected` counts segments that garbage collection freed.
    """

    expandable = False

    def __init__(self, settings: AllocatorSettings | None = None):
        self.settings = settings = settings or AllocatorSettings()
        if settings.expandable_segments != self.expandable:
            raise ValueError("expandable_segments: another class; use simulate.new_allocator")
        self.allocated = self.reserved = self.peak_allocated = self.peak_reserved = 0
        self.retries = self.collected = 0
        self.segments: dict[int, int] = {}
        self.small = Pool(SMALL_SEGMENT, MIN_BLOCK)
        self.large = Pool(settings.large_segment_size, SMALL_SIZE + 1)
        self._next_address = FIRST_ADDRESS
        self._divisions = settings.divisions if any(settings.divisions) else None
        self._max_split = self._split_below = settings.max_split_size or UNLIMITED
        self._room = self._allowed = self._collect_above = None
        if settings.card_memory is not None:
            self._room = settings.card_memory - settings.outside_bytes
            if settings.process_fraction is not None:
                self._allowed = int(settings.process_fraction * settings.card_memory)
                if threshold := settings.garbage_collection_threshold:
                    self._collect_above = int(threshold * self._allowed)

    def malloc(self, size: int, stream: int = 0) -> Block:
        """Serve a request of `size` bytes. Raises `ValueError`, `OutOfMemoryError`."""
        if size <= 0:
            raise ValueError(
                f"allocation of {size} bytes: sizes are positive; leave empty ones out"
            )
        size = self.rounded(size)
        pool = self.small if size <= SMALL_SIZE else self.large
        block = self._find(pool, size, stream) or self._new_segment(pool, size, stream)
        block.state = USED
        if block.size - size >= pool.least_rest and size < self._split_below:
            pool.add(block.cut(size, FREE))
        self.allocated += block.size
        if self.allocated > self.peak_allocated:
            self.peak_allocated = self.allocated
        return block

    def free(self, block: Block) -> None:
        """Take a block back. Raises `ValueError` if it is not in use."""
        self.free_requested(block)
        block.state = FREE
        block.pool.add(block)

    def free_requested(self, block: Block) -> None:
        """The owner is done, but another stream may still read: no longer counted, not reused."""
        if block.state != USED:
            raise ValueError(f"block at {block.address:#x} is not in use: it was freed already")
        block.state = PENDING
        self.allocated -= block.size

    def free_completed(self, block: Block) -> None:
        """The other streams are done as well: the block may be reused."""
        if block.state != PENDING:
            raise ValueError(f"block at {block.address:#x} does not wait: ask for its free first")
        block.state = FREE
        block.pool.add(block)

    def empty_cache(self) -> None:
        """Give every segment that one free block fills back to CUDA."""
        for block in self.cached_segments():
            self.release(block)

    def cached_segments(self) -> list[Block]:
        """The free blocks that fill a segment, in the order in which `empty_cache` frees them."""
        return [block for block in self.large.listed() + self.small.listed() if block.whole]

    def release(self, block: Block) -> None:
        """Give the segment that one free block fills back to CUDA."""
        block.pool.remove(block)
        del self.segments[block.address]
        self.reserved -= block.size

    def rounded(self, size: int) -> int:
        """The block size that serves a request of `size` bytes (rule 1)."""
        if self._divisions is not None and size >= MIN_BLOCK:
            index = size.bit_length() - MIB.bit_length()
            divisions = self._divisions[min(max(index, 0), NUM_INTERVALS - 1)]
            if divisions > 1 and size > MIN_BLOCK * divisions:
                step = 2 ** (size.bit_length() - 1) // divisions
                return (size + step - 1) // step * step
        return (size + MIN_BLOCK - 1) // MIN_BLOCK * MIN_BLOCK

    def free_blocks(self) -> list[tuple[int, int, int]]:
        """(address, size, stream) of every free block, large pool first."""
        return [(b.address, b.size, b.stream) for b in self.large.listed() + self.small.listed()]

    def _find(self, pool: Pool, size: int, stream: int) -> Block | None:
        """Rule 3: take the best free block off its list."""
        pool.lookups += 1
        free = pool.free.get(stream)
        entry = next(free.irange((size,)), None) if free else None
        if entry is None or not self._suits(entry[0], size):
            return None
        free.remove(entry)
        return entry[2]

    def _suits(self, length: int, size: int) -> bool:
        """Whether a block of `length` may serve `size` (the second sentence of rule 3)."""
        if size < self._max_split:
            return length < self._max_split
        return length < size + self.settings.rounding

    def _new_segment(self, pool: Pool, size: int, stream: int) -> Block:
        """Rule 4 and the collection of rule 6."""
        if self._collect_above is not None:
            self._collect_garbage(self.reserved - self._collect_above)
        whole = (size + ROUND_LARGE - 1) // ROUND_LARGE * ROUND_LARGE
        segment = pool.segment if size < MIN_LARGE_ALLOC else whole
        block = self._from_cuda(pool, size, segment, stream)
        if block is None and self._release_oversize(pool, size, stream):
            block = self._from_cuda(pool, size, segment, stream)
        if block is None:
            self.empty_cache()
            self.retries += 1
            block = self._from_cuda(pool, size, segment, stream)
        if block is None:
            limit = self.settings.limit
            raise OutOfMemoryError(size, segment, self.allocated, self.reserved, limit)
        return block

    def _from_cuda(self, pool: Pool, size: int, segment: int, stream: int) -> Block | None:
        if self._allowed is not None and self.reserved + segment > self._allowed:
            return None
        if not self._reserve(segment):
            return None
        address = self._new_address(segment)
        self.segments[address] = segment
        return Block(address, segment, stream, pool)

    def _reserve(self, size: int) -> bool:
        if self._room is not None and self.reserved + size > self._room:
            return False
        self.reserved += size
        self.peak_reserved = max(self.peak_reserved, self.reserved)
        return True

    def _new_address(self, size: int) -> int:
        """Where the next segment begins; a replay knows better."""
        self._next_address += size
        return self._next_address - size

    def _release_oversize(self, pool: Pool, size: int, stream: int) -> bool:
        """Rule 4: give back unsplittable blocks; False when they do not add up to the request."""
        free = pool.free.get(stream)
        if self.settings.max_split_size is None or not free:
            return False
        target = max(size, self._max_split)
        entry = next(free.irange((target,)), free[-1])
        while entry[0] >= self._max_split:
            self.release(entry[2])
            target -= entry[0]
            if target <= 0 or not free:
                break
            entry = free[-1]
        return target <= 0

    def _collect_garbage(self, target: int) -> None:
        pool = self.large
        blocks = [block for block in pool.listed() if block.whole]
        while blocks and target > 0:
            mean_age = sum(pool.lookups - b.born for b in blocks) / len(blocks)
            old = [b for b in blocks if pool.lookups - b.born >= mean_age]
            blocks = [b for b in blocks if pool.lookups - b.born < mean_age]
            for block in old:  # all of them, even past the target, so that this stays rare
                target -= block.size
                self.release(block)
            self.collected += len(old)
