"""Expandable segments: address ranges that the simulated allocator maps page by page.

Rule 7, after the six of `memory/allocator.py`: one address range of 1.125 x card for each stream
and pool (a second one only when no stretch of the first is long enough), mapped in pages (2 MiB
small, `large_segment_size` large) that are counted from the start of the range. A miss takes the
lowest unmapped stretch, with the free block just before it, that is long enough, and maps only what
is missing. The rest is split at 512 in both pools; `empty_cache` unmaps the whole pages of free
blocks. Mapping turns UNMAPPED blocks into FREE ones and costs reserved bytes; both kinds merge with
their like neighbours. No garbage is collected.

Left out: where CUDA places a range. A second one here lies above the first;
ranges that are made again later may lie anywhere, which decides whose unmapped addresses come
first and moves what is reserved by a page or two. One range is as it is in torch.

Source: the behaviour of torch 2.13 read in its source, and checked against recordings of it
(`tests/memory/test_recorded.py`).
"""

from __future__ import annotations

from collections import defaultdict

from sortedcontainers import SortedList

from lowmem_grpo.memory.allocator import (
    FREE,
    MIN_BLOCK,
    PENDING,
    SMALL_SEGMENT,
    UNLIMITED,
    AllocatorSettings,
    Block,
    CachingAllocator,
    Pool,
)

UNMAPPED = PENDING + 1  # the state of addresses without memory
UNKNOWN_CARD = 2**40  # bytes; decides the length of a range when the card's memory is not given


class MappedPool(Pool):
    """A pool with, for each stream, its unmapped blocks by address; `segment` is its page."""

    def __init__(self, page: int):
        super().__init__(page, MIN_BLOCK)
        self.unmapped = defaultdict(SortedList)  # by stream, of (address, block)

    def add(self, block: Block) -> None:
        """Merge a FREE or UNMAPPED block with its like neighbours and list it."""
        if block.state == FREE:
            super().add(block)
            return
        for other in (block.prev, block.next):
            if other is not None and other.state == UNMAPPED:
                self.remove(other)
                block.absorb(other)
        self.unmapped[block.stream].add((block.address, block))

    def remove(self, block: Block) -> None:
        """Take a FREE or UNMAPPED block off its list."""
        if block.state == FREE:
            super().remove(block)
        else:
            self.unmapped[block.stream].remove((block.address, block))


class ExpandableAllocator(CachingAllocator):
    """One device's allocator with expandable segments; `segments` stays empty."""

    expandable = True

    def __init__(self, settings: AllocatorSettings | None = None):
        super().__init__(settings or AllocatorSettings(expandable_segments=True))
        self.small = MappedPool(SMALL_SEGMENT)
        self.large = MappedPool(self.settings.large_segment_size)
        self._split_below = UNLIMITED
        self._collect_above = None
        self._range_size = (self.settings.card_memory or UNKNOWN_CARD) * 9 // 8

    def empty_cache(self) -> None:
        """Give every whole page of the free blocks back to CUDA."""
        for block in self.large.listed() + self.small.listed():
            self._unmap(block)

    def _find(self, pool: Pool, size: int, stream: int) -> Block | None:
        """Rule 3, where a block before unmapped addresses counts as long as it can grow."""
        pool.lookups += 1
        free = pool.free.get(stream)
        entries = free.irange((size,)) if free else iter(())
        best = next(entries, None)
        if best is None:
            return None
        # torch stops at the first one that is no better, so this is not the minimum over the list.
        for entry in entries:
            if reach(entry[2]) >= reach(best[2]):
                break
            best = entry
        if not self._suits(best[0], size):
            return None
        free.remove(best)
        return best[2]

    def _from_cuda(self, pool: Pool, size: int, segment: int, stream: int) -> Block | None:
        """Map pages until a free block of `size` exists and take it; None when CUDA refuses.

        Pages that were mapped before the refusal stay, as free blocks. The fraction is tested
        against the rounded segment even if fewer pages would be mapped.
        """
        if self._allowed is not None and self.reserved + segment > self._allowed:
            return None
        block = self._stretch(pool, size, stream)
        if block.state == UNMAPPED and not self._map(block, min(block.size, size)):
            return None
        while block.size < size:
            gap = block.next
            if not self._map(gap, min(size - block.size, gap.size)):
                return None
            block = gap  # it has merged with the free block before it
        pool.remove(block)
        return block

    def _release_oversize(self, pool: Pool, size: int, stream: int) -> bool:
        return False  # every block can be split

    def _new_address(self, size: int) -> int:
        # Pages are counted from address 0, so a range starts at a multiple of either page (large
        # ones are whole MiB, so twice that is a multiple of the small ones' 2 MiB).
        step = 2 * self.settings.large_segment_size
        self._next_address = (self._next_address + step - 1) // step * step
        return super()._new_address(size)

    def _stretch(self, pool: Pool, size: int, stream: int) -> Block:
        """The first block of the lowest stretch of free and unmapped ones that is long enough."""
        for _, block in pool.unmapped.get(stream, ()):
            if block.prev is not None and block.prev.state == FREE:
                block = block.prev
            length, end = 0, block
            while end is not None and length < size and end.state in (FREE, UNMAPPED):
                length += end.size
                end = end.next
            if length >= size:
                return block
        length = -(-max(self._range_size, size) // pool.segment) * pool.segment
        block = Block(self._new_address(length), length, stream, pool, UNMAPPED)
        pool.add(block)
        return block

    def _map(self, block: Block, size: int) -> bool:
        pool = block.pool
        mapped = -(-size // pool.segment) * pool.segment
        if not self._reserve(mapped):
            return False
        pool.remove(block)
        block.state = FREE  # before the cut, or the rest would merge with it again
        if mapped < block.size:
            pool.add(block.cut(mapped, UNMAPPED))
        pool.add(block)
        return True

    def _unmap(self, block: Block) -> None:
        """Give back the whole pages inside a free block."""
        pool, page = block.pool, block.pool.segment
        low = -(-block.address // page) * page
        high = (block.address + block.size) // page * page
        if low >= high:
            return
        pool.remove(block)
        block.state = UNMAPPED  # before the cuts, or the ends would merge with it again
        if high < block.address + block.size:
            pool.add(block.cut(high - block.address, FREE))
        if low > block.address:
            head, block = block, block.cut(low - block.address, UNMAPPED)
            head.state = FREE
            pool.add(head)
        pool.add(block)
        if block.whole:
            pool.remove(block)  # nothing mapped is left: the address range goes back as well
        self.reserved -= high - low


def reach(block: Block) -> int:
    """The size that a block can grow to in place."""
    after = block.next
    return block.size + (after.size if after is not None and after.state == UNMAPPED else 0)
