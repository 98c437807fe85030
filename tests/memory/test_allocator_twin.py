"""The simulated allocator against its naive twin: no sorted lists, no links, every rule a scan.

A segment is a list of pieces [address, size, state, born]; searches look at every piece of every
segment, and neighbours are merged by rebuilding the list.
"""

from __future__ import annotations

import random
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lowmem_grpo.memory.allocator import (
    FIRST_ADDRESS,
    MIB,
    AllocatorSettings,
    OutOfMemoryError,
)
from lowmem_grpo.memory.expandable import UNKNOWN_CARD
from lowmem_grpo.memory.simulate import new_allocator

FREE, USED, UNMAPPED = "free", "used", "unmapped"


class Segment:
    def __init__(self, address, size, stream, small, state):
        self.stream, self.small = stream, small
        self.pieces = [[address, size, state, 0]]

    def merge(self):
        merged = []
        for piece in self.pieces:
            if merged and merged[-1][2] == piece[2] != USED:
                merged[-1][1] += piece[1]
                merged[-1][3] = max(merged[-1][3], piece[3])  # the younger one was just freed
            elif piece[1]:
                merged.append(piece)
        self.pieces = merged

    def set(self, low, high, state, born=0):
        """Give the bytes from `low` to `high` another state."""
        pieces = []
        for address, size, old, age in self.pieces:
            cuts = sorted(
                {address, address + size} | {c for c in (low, high) if 0 < c - address < size}
            )
            for start, end in pairwise(cuts):
                inside = low <= start and end <= high
                pieces.append([start, end - start, *((state, born) if inside else (old, age))])
        self.pieces = pieces


class Naive:
    def __init__(self, options: AllocatorSettings):
        self.options, self.segments = options, []
        self.next_address, self.retries, self.lookups = FIRST_ADDRESS, 0, 0
        self.expandable = options.expandable_segments
        fraction = options.process_fraction
        self.allowed = None if fraction is None else int(fraction * options.card_memory)

    def pieces(self, state):
        return [(s, p) for s in self.segments for p in s.pieces if p[2] == state]

    @property
    def reserved(self):
        return sum(p[1] for s in self.segments for p in s.pieces if p[2] != UNMAPPED)

    @property
    def allocated(self):
        return sum(p[1] for _, p in self.pieces(USED))

    def free_blocks(self):
        return sorted((p[0], p[1], s.stream) for s, p in self.pieces(FREE))

    def page(self, small):
        return 2 * MIB if small else self.options.large_segment_size

    def room(self, size):
        card = self.options.card_memory
        return card is None or self.reserved + size <= card - self.options.outside_bytes

    def rounded(self, size):
        power = 1
        while power * 2 <= size:
            power *= 2
        interval = 0
        while interval < 15 and (MIB << (interval + 1)) <= power:
            interval += 1
        divisions = self.options.divisions[interval]
        unit = power // divisions if divisions > 1 and size > 512 * divisions else 512
        while size % unit:
            size += unit - size % unit
        return size

    def malloc(self, request, stream):
        size = self.rounded(request)
        small = size <= MIB
        found = self.find(size, stream, small) or self.grow(size, stream, small)
        if found is None:
            return None
        segment, piece = found
        address, length = piece[0], piece[1]
        if small or self.expandable:
            split = length - size >= 512
        else:
            limit = self.options.max_split_size
            split = length - size > MIB and (limit is None or size < limit)
        end = address + (size if split else length)
        segment.set(address, address + length, FREE, self.lookups if small is False else 0)
        segment.set(address, end, USED)
        segment.merge()
        return address, end - address

    def find(self, size, stream, small):
        if not small:
            self.lookups += 1
        fits = [
            (p[1], p[0], s, p)
            for s, p in self.pieces(FREE)
            if s.stream == stream and s.small == small and p[1] >= size
        ]
        fits.sort(key=lambda fit: fit[:2])
        if not fits:
            return None
        best = fits[0]
        if self.expandable:
            for other in fits[1:]:
                if self.reach(other) >= self.reach(best):
                    break
                best = other
        limit = self.options.max_split_size
        if limit is not None:
            if size < limit <= best[0]:
                return None
            rounding = self.options.max_non_split_rounding_size
            rounding = self.options.large_segment_size if rounding is None else rounding
            if size >= limit and best[0] >= size + rounding:
                return None
        return best[2], best[3]

    def reach(self, fit):
        size, address, segment, _ = fit
        after = [p for p in segment.pieces if p[0] == address + size and p[2] == UNMAPPED]
        return size + sum(p[1] for p in after)

    def grow(self, size, stream, small):
        if self.allowed is not None and self.options.garbage_collection_threshold:
            self.collect()
        wanted = self.page(small) if size < 10 * MIB else -(-size // (2 * MIB)) * 2 * MIB
        found = self.ask(size, wanted, stream, small)
        if found is None and self.give_oversize(size, stream, small):
            found = self.ask(size, wanted, stream, small)
        if found is None:
            self.empty_cache()
            self.retries += 1
            found = self.ask(size, wanted, stream, small)
        return found

    def ask(self, size, wanted, stream, small):
        if self.allowed is not None and self.reserved + wanted > self.allowed:
            return None
        if self.expandable:
            return self.extend(size, stream, small)
        if not self.room(wanted):
            return None
        segment = Segment(self.next_address, wanted, stream, small, FREE)
        self.next_address += wanted
        self.segments.append(segment)
        return segment, segment.pieces[0]

    def extend(self, size, stream, small):
        page = self.page(small)
        for segment in sorted(self.segments, key=lambda s: s.pieces[0][0]):
            if (segment.stream, segment.small) != (stream, small):
                continue
            for i, piece in enumerate(segment.pieces):
                if piece[2] == UNMAPPED:
                    start = i - 1 if i and segment.pieces[i - 1][2] == FREE else i
                    length = 0
                    for other in segment.pieces[start:]:
                        if other[2] == USED:
                            break
                        length += other[1]
                    if length >= size:
                        return self.fill(segment, segment.pieces[start][0], size, page)
        length = (self.options.card_memory or UNKNOWN_CARD) * 9 // 8
        length = -(-max(length, size) // page) * page
        align = 2 * self.options.large_segment_size
        address = -(-self.next_address // align) * align
        self.next_address = address + length
        segment = Segment(address, length, stream, small, UNMAPPED)
        self.segments.append(segment)
        return self.fill(segment, address, size, page)

    def fill(self, segment, start, size, page):
        """Map what is missing from `start` on, one unmapped stretch after the other."""
        while True:
            have = [p for p in segment.pieces if p[0] == start and p[2] == FREE]
            reached = have[0][1] if have else 0
            if reached >= size:
                return segment, have[0]
            edge = start + reached
            gap = next(p for p in segment.pieces if p[0] == edge)
            length = -(-min(size - reached, gap[1]) // page) * page
            if not self.room(length):
                return None
            segment.set(edge, edge + length, FREE)
            segment.merge()

    def free(self, address):
        for segment in self.segments:
            for piece in segment.pieces:
                if piece[0] == address and piece[2] == USED:
                    born = 0 if segment.small else self.lookups
                    segment.set(address, address + piece[1], FREE, born)
                    segment.merge()
                    return

    def empty_cache(self):
        for segment, (address, size, _, _) in self.pieces(FREE):
            if self.expandable:
                pages = range(-(-address // self.page(segment.small)), 2**62)
                for number in pages:
                    low = number * self.page(segment.small)
                    high = low + self.page(segment.small)
                    if high > address + size:
                        break
                    segment.set(low, high, UNMAPPED)
                segment.merge()
                if segment.pieces[0][2] == UNMAPPED and len(segment.pieces) == 1:
                    self.segments.remove(segment)
            elif len(segment.pieces) == 1:
                self.segments.remove(segment)

    def give_oversize(self, size, stream, small):
        limit = self.options.max_split_size
        if limit is None or self.expandable:
            return False
        wanted = max(size, limit)
        cached = [s for s, _ in self.pieces(FREE) if (s.stream, s.small) == (stream, small)]
        cached = [s for s in cached if len(s.pieces) == 1 and s.pieces[0][1] >= limit]
        cached.sort(key=lambda s: (s.pieces[0][1], s.pieces[0][0]))
        enough = [s for s in cached if s.pieces[0][1] >= wanted]
        if enough:
            self.segments.remove(enough[0])
            return True
        given = 0
        while cached and given < wanted:
            given += cached[-1].pieces[0][1]
            self.segments.remove(cached.pop())
        return given >= wanted

    def collect(self):
        threshold = int(self.options.garbage_collection_threshold * self.allowed)
        missing = self.reserved - threshold
        while missing > 0 and not self.expandable:
            whole = [s for s, _ in self.pieces(FREE) if not s.small and len(s.pieces) == 1]
            if not whole:
                break
            ages = [self.lookups - s.pieces[0][3] for s in whole]
            for segment, age in zip(whole, ages, strict=True):
                if age >= sum(ages) / len(ages):
                    missing -= segment.pieces[0][1]
                    self.segments.remove(segment)


CONFIGURATIONS = [
    {},
    {"card_memory": 150 * MIB},
    {"card_memory": 150 * MIB, "max_split_size": 20 * MIB},
    {"card_memory": 150 * MIB, "max_split_size": 25 * MIB, "large_segment_size": 12 * MIB},
    {"roundup_power2_divisions": (8, 4, 0, 2) + (4,) * 12},
    {"card_memory": 200 * MIB, "process_fraction": 0.8, "garbage_collection_threshold": 0.3},
    {"expandable_segments": True},
    {"expandable_segments": True, "card_memory": 150 * MIB, "outside_bytes": 11 * MIB},
    {"expandable_segments": True, "card_memory": 170 * MIB, "process_fraction": 0.9},
    {"expandable_segments": True, "card_memory": 150 * MIB, "max_split_size": 25 * MIB},
    {"expandable_segments": True, "large_segment_size": 13 * MIB},
]


@pytest.mark.parametrize("options", CONFIGURATIONS, ids=lambda o: "-".join(o) or "defaults")
@given(seed=st.integers(0, 2**32), free_share=st.floats(0.3, 0.6))
@settings(max_examples=15, deadline=None)
def test_the_twin_agrees(options, seed, free_share):
    rng = random.Random(seed)
    configuration = AllocatorSettings(**options)
    fast, naive, live = new_allocator(configuration), Naive(configuration), []
    for _ in range(120):
        choice = rng.random()
        if live and choice < free_share:
            block = live.pop(rng.randrange(len(live)))
            naive.free(block.address)
            fast.free(block)
        elif choice > 0.98:
            fast.empty_cache()
            naive.empty_cache()
        else:
            size, stream = int(2 ** rng.uniform(4, 25.5)), rng.choice((0, 0, 3))
            expected = naive.malloc(size, stream)
            try:
                block = fast.malloc(size, stream)
                live.append(block)
                assert (block.address, block.size) == expected
            except OutOfMemoryError:
                assert expected is None
        assert (fast.allocated, fast.reserved) == (naive.allocated, naive.reserved)
        assert sorted(fast.free_blocks()) == naive.free_blocks()
        assert fast.retries == naive.retries
