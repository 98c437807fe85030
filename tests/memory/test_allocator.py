"""The simulated allocator: each rule worked by hand, and its invariants."""

from __future__ import annotations

from contextlib import suppress
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lowmem_grpo.memory import AllocatorSettings, simulate
from lowmem_grpo.memory.allocator import MIB, CachingAllocator, Event, OutOfMemoryError
from lowmem_grpo.memory.expandable import ExpandableAllocator
from lowmem_grpo.memory.simulate import new_allocator

KIB = 1024


def fresh(**settings_given) -> CachingAllocator:
    return new_allocator(AllocatorSettings(**settings_given))


# --- the rules, worked by hand ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "rounded"), [(1, 512), (511, 512), (512, 512), (513, 1024), (MIB, MIB)]
)
def test_sizes_round_up_to_512(size, rounded):
    assert fresh().malloc(size).size == rounded


@pytest.mark.parametrize(
    ("size", "rounded"),
    [
        (2048, 2048),  # 512 x 4 is not above 512 x 4: plain rounding
        (2049, 2560),  # steps of 512 between 2048 and 4096
        (1200 * KIB, 1280 * KIB),  # 1024, 1280, 1536, 1792 KiB
        (1793 * KIB, 2048 * KIB),
        (2048 * KIB, 2048 * KIB),
    ],
)
def test_rounding_to_divisions_of_a_power_of_two(size, rounded):
    assert fresh(roundup_power2_divisions=4).rounded(size) == rounded


def test_divisions_are_chosen_by_the_interval_of_the_size():
    # Off below 2 MiB, halves of [2, 4) MiB, quarters from 4 MiB on.
    allocator = fresh(roundup_power2_divisions=(0, 2) + (4,) * 14)
    assert allocator.rounded(1025 * KIB) == 1025 * KIB
    assert allocator.rounded(2049 * KIB) == 3 * MIB
    assert allocator.rounded(4097 * KIB) == 5 * MIB
    assert allocator.rounded(200 * 1024 * MIB) == 224 * 1024 * MIB  # the last interval is open


@pytest.mark.parametrize(
    ("size", "segment"),
    [
        (1, 2 * MIB),
        (MIB, 2 * MIB),
        (MIB + 1, 20 * MIB),
        (10 * MIB - 512, 20 * MIB),
        (10 * MIB, 10 * MIB),
        (10 * MIB + 1, 12 * MIB),
    ],
)
def test_segment_sizes(size, segment):
    allocator = fresh()
    allocator.malloc(size)
    assert allocator.reserved == segment


def test_large_segment_size_is_a_setting():
    allocator = fresh(large_segment_size=12 * MIB)
    allocator.malloc(5 * MIB)
    assert allocator.reserved == 12 * MIB


def test_small_blocks_split_at_512_and_the_low_part_is_used():
    allocator = fresh()
    first, second = allocator.malloc(MIB), allocator.malloc(MIB - 512)
    assert (first.size, second.size) == (MIB, MIB - 512)
    assert second.address == first.address + MIB
    assert allocator.malloc(1).address == second.address + second.size
    assert allocator.reserved == 2 * MIB


def test_a_large_rest_of_one_mib_is_not_split_off_and_counts_as_allocated():
    allocator = fresh()
    assert allocator.malloc(11 * MIB).size == 12 * MIB  # rest 1 MiB: kept
    assert allocator.malloc(11 * MIB - 512).size == 11 * MIB - 512  # rest 1 MiB + 512: split
    assert allocator.allocated == 23 * MIB - 512


def test_best_fit_prefers_the_smallest_then_the_lowest():
    allocator = fresh()
    blocks = [allocator.malloc(size * MIB) for size in (14, 12, 12, 16)]
    for block in reversed(blocks):
        allocator.free(block)
    assert allocator.malloc(11 * MIB).address == blocks[1].address
    assert allocator.malloc(11 * MIB).address == blocks[2].address
    assert allocator.malloc(11 * MIB).address == blocks[0].address


def test_streams_and_pools_do_not_share():
    allocator = fresh()
    allocator.free(allocator.malloc(12 * MIB, stream=0))
    allocator.malloc(12 * MIB, stream=7)
    assert allocator.reserved == 24 * MIB
    allocator.malloc(512, stream=0)  # 12 MiB are free on the stream, but in the large pool
    assert allocator.reserved == 26 * MIB


def test_neighbours_merge():
    allocator = fresh()
    low, middle, high = (allocator.malloc(4 * MIB) for _ in range(3))
    for block in (low, high, middle):
        allocator.free(block)
    assert [(size, stream) for _, size, stream in allocator.free_blocks()] == [(20 * MIB, 0)]


def test_a_pending_block_is_not_counted_and_not_reused():
    allocator = fresh()
    block = allocator.malloc(12 * MIB)
    allocator.free_requested(block)
    assert allocator.allocated == 0
    assert allocator.malloc(12 * MIB).address != block.address
    address = block.address
    allocator.free_completed(block)
    assert allocator.malloc(12 * MIB).address == address


def test_empty_cache_keeps_split_segments():
    allocator = fresh()
    kept, whole = allocator.malloc(4 * MIB), allocator.malloc(30 * MIB)
    allocator.free(whole)
    allocator.empty_cache()
    assert allocator.reserved == 20 * MIB
    allocator.free(kept)
    allocator.empty_cache()
    assert (allocator.reserved, allocator.segments) == (0, {})


def test_max_split_size_keeps_large_blocks_whole_and_apart():
    allocator = fresh(max_split_size=40 * MIB)
    whole = allocator.malloc(60 * MIB)
    allocator.free(whole)
    assert allocator.malloc(30 * MIB).size == 30 * MIB  # below: does not touch the 60 MiB
    assert allocator.reserved == 90 * MIB
    assert allocator.malloc(40 * MIB).size == 40 * MIB  # 60 is longer by 20 MiB: refused
    assert allocator.malloc(41 * MIB).size == 60 * MIB  # longer by 19: taken, unsplit
    assert allocator.reserved == 130 * MIB


def test_refused_memory_comes_from_the_cache():
    allocator = fresh(card_memory=100 * MIB)
    allocator.free(allocator.malloc(40 * MIB))
    allocator.malloc(50 * MIB)
    allocator.malloc(44 * MIB)  # 90 + 44 do not fit; without the cached 40 they do
    assert (allocator.reserved, allocator.retries) == (94 * MIB, 1)


def test_refused_memory_comes_from_oversize_blocks_first():
    allocator = fresh(card_memory=200 * MIB, max_split_size=40 * MIB)
    blocks = [allocator.malloc(size * MIB) for size in (30, 50, 60)]
    for block in blocks:
        allocator.free(block)
    allocator.malloc(100 * MIB)  # 140 + 100: both oversize blocks go, the 30 MiB one stays
    assert (allocator.reserved, allocator.retries) == (130 * MIB, 0)


def test_the_smallest_sufficient_oversize_block_goes_alone():
    allocator = fresh(card_memory=200 * MIB, max_split_size=40 * MIB)
    for block in [allocator.malloc(size * MIB) for size in (90, 100)]:
        allocator.free(block)
    allocator.malloc(42 * MIB)  # too small to reuse 90 (longer by 48)
    assert sorted(allocator.segments.values()) == [42 * MIB, 100 * MIB]


def test_out_of_memory_tells_the_sizes():
    allocator = fresh(card_memory=100 * MIB, outside_bytes=10 * MIB)
    allocator.malloc(60 * MIB)
    with pytest.raises(OutOfMemoryError, match=r"32\.0 MiB more .* 60\.0 MiB reserved") as caught:
        allocator.malloc(31 * MIB)
    error = caught.value
    assert (error.requested, error.segment, error.limit) == (31 * MIB, 32 * MIB, 90 * MIB)
    assert (error.allocated, error.reserved, allocator.retries) == (60 * MIB, 60 * MIB, 1)
    allocator.malloc(30 * MIB)  # the allocator goes on


def test_the_process_fraction_caps_the_reserved_bytes():
    allocator = fresh(card_memory=100 * MIB, process_fraction=0.5)
    allocator.malloc(50 * MIB)
    with pytest.raises(OutOfMemoryError, match=r"of 50\.0"):
        allocator.malloc(1)


def test_garbage_collection_frees_what_has_waited_longest():
    allocator = fresh(card_memory=100 * MIB, process_fraction=1.0, garbage_collection_threshold=0.5)
    old, young = allocator.malloc(24 * MIB), allocator.malloc(22 * MIB)
    allocator.free(old)
    for _ in range(3):
        allocator.free(allocator.malloc(23 * MIB))  # three look-ups while the old one lies free
    assert allocator.segments.keys() == {old.address, young.address}
    keep = allocator.malloc(24 * MIB)
    allocator.free(young)
    allocator.free(keep)
    for _ in range(2):
        allocator.free(allocator.malloc(21 * MIB))  # reuses the 22, so the 24 grows older
    allocator.malloc(30 * MIB)  # 46 <= 50: no collection yet
    assert allocator.collected == 0
    allocator.malloc(32 * MIB, stream=1)  # 76 > 50: 26 to reclaim; mean age 2, then the rest
    assert allocator.collected == 2
    assert sorted(allocator.segments.values()) == [30 * MIB, 32 * MIB]


def test_expandable_segments_grow_in_place_by_pages():
    allocator = fresh(expandable_segments=True, card_memory=1024 * MIB)
    first = allocator.malloc(11 * MIB)
    assert (first.size, allocator.reserved) == (11 * MIB, 20 * MIB)  # no rounding to 2 MiB
    second = allocator.malloc(30 * MIB)  # 9 MiB are free before the unmapped rest
    assert (second.address, allocator.reserved) == (first.address + 11 * MIB, 60 * MIB)
    third = allocator.malloc(19 * MIB - 512)
    assert third.size == 19 * MIB - 512  # split at 512, in the large pool too
    assert allocator.reserved == 60 * MIB
    allocator.malloc(1)
    assert allocator.reserved == 62 * MIB  # small pages are 2 MiB


def test_expandable_segments_unmap_whole_free_pages():
    allocator = fresh(expandable_segments=True)
    blocks = [allocator.malloc(15 * MIB) for _ in range(6)]  # 90 MiB on five pages of 20
    allocator.free(blocks[1])
    allocator.free(blocks[2])  # 15 to 45 MiB: the page from 20 to 40 is whole
    allocator.empty_cache()
    assert allocator.reserved == 80 * MIB
    assert sorted(size for _, size, _ in allocator.free_blocks()) == [5 * MIB, 5 * MIB, 10 * MIB]
    # The lowest stretch: 5 free, 20 unmapped, 5 free. Mapping the page makes 30 MiB again.
    assert allocator.malloc(26 * MIB).address == blocks[0].address + 15 * MIB
    assert allocator.reserved == 100 * MIB


# --- simulate ----------------------------------------------------------------------------------


def test_simulate_reports_peaks_finals_and_the_timeline():
    events = [
        Event("alloc", 1, 12 * MIB, phase="load", component="base_weights"),
        Event("alloc", 2, 30 * MIB),
        Event("free", 2),
        Event("empty_cache"),
        Event("alloc", 2, 1),  # an id may come again
    ]
    usage = simulate(iter(events))
    assert (usage.peak_allocated, usage.peak_reserved) == (42 * MIB, 42 * MIB)
    assert (usage.final_allocated, usage.final_reserved) == (12 * MIB + 512, 14 * MIB)
    assert usage.timeline.reserved.tolist() == [12 * MIB, 42 * MIB, 42 * MIB, 12 * MIB, 14 * MIB]
    assert usage.timeline.allocated[2] == 12 * MIB
    assert usage.oom is None


def test_simulate_stops_where_memory_ends():
    events = [Event("alloc", i, 30 * MIB) for i in range(5)]
    usage = simulate(events, AllocatorSettings(card_memory=100 * MIB))
    assert (usage.oom_event, usage.oom.requested) == (3, 30 * MIB)
    assert (usage.peak_reserved, len(usage.timeline.reserved)) == (90 * MIB, 3)


@pytest.mark.parametrize(
    ("events", "message"),
    [
        ([Event("alloc", 1, 0)], "event 0: allocation of 0 bytes"),
        ([Event("alloc", 1, -5)], "event 0: allocation of -5 bytes"),
        ([Event("alloc", 1, 1), Event("alloc", 1, 1)], "event 1: id 1 is live already"),
        ([Event("alloc", 1, 1), Event("free", 2)], "event 1: id 2 is not live"),
        ([Event("grow", 1, 1)], "event 0: action 'grow'"),
    ],
)
def test_simulate_names_the_bad_event(events, message):
    with pytest.raises(ValueError, match=message):
        simulate(events)


@pytest.mark.parametrize("kind", [CachingAllocator, ExpandableAllocator])
def test_an_allocator_of_the_wrong_kind_is_refused(kind):
    with pytest.raises(ValueError, match="expandable_segments"):
        kind(AllocatorSettings(expandable_segments=not kind.expandable))


def test_a_block_is_freed_once():
    allocator = fresh()
    block = allocator.malloc(1)
    allocator.free(block)
    with pytest.raises(ValueError, match="was freed already"):
        allocator.free(block)


@pytest.mark.parametrize(
    "bad",
    [
        {"max_split_size": 19 * MIB},
        {"max_split_size": 40 * MIB + 1},
        {"large_segment_size": 10 * MIB},
        {"max_non_split_rounding_size": MIB},
        {"roundup_power2_divisions": 3},
        {"roundup_power2_divisions": (4, 4)},
        {"garbage_collection_threshold": 1.0},
        {"card_memory": 0},
        {"outside_bytes": -1},
        {"process_fraction": 0.5},
        {"process_fraction": 1.5, "card_memory": MIB},
    ],
)
def test_settings_that_torch_refuses(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        AllocatorSettings(**bad)


# --- properties --------------------------------------------------------------

SETTINGS = st.builds(
    AllocatorSettings,
    card_memory=st.sampled_from((None, 64 * MIB, 150 * MIB)),
    expandable_segments=st.booleans(),
    max_split_size=st.sampled_from((None, 20 * MIB, 25 * MIB, 40 * MIB)),
    roundup_power2_divisions=st.sampled_from((0, 2, 8)),
    large_segment_size=st.sampled_from((12 * MIB, 20 * MIB)),
) | st.builds(
    AllocatorSettings,
    card_memory=st.sampled_from((100 * MIB, 200 * MIB)),
    outside_bytes=st.sampled_from((0, 30 * MIB)),
    process_fraction=st.sampled_from((0.7, 0.9)),
    garbage_collection_threshold=st.sampled_from((0.2, 0.6)),
    expandable_segments=st.booleans(),
)
EDGES = (1, 512, MIB - 511, MIB, MIB + 1, 2 * MIB, 10 * MIB - 1, 10 * MIB, 20 * MIB, 25 * MIB)
SIZES = st.sampled_from(EDGES) | st.integers(1, 2 * MIB) | st.integers(1, 50 * MIB)
STEPS = st.lists(
    st.tuples(st.just("alloc"), SIZES, st.integers(0, 1))
    | st.tuples(st.just("free"), st.integers(0, 1000), st.just(0))
    | st.tuples(st.just("empty_cache"), st.just(0), st.just(0)),
    max_size=60,
)


@given(SETTINGS, STEPS)
@settings(max_examples=150, deadline=None)
def test_nothing_overlaps_and_sums_are_conserved(configuration, steps):
    allocator, live = new_allocator(configuration), []
    for action, number, stream in steps:
        if action == "alloc":
            with suppress(OutOfMemoryError):
                live.append(allocator.malloc(number, stream))
        elif action == "free" and live:
            allocator.free(live.pop(number % len(live)))
        elif action == "empty_cache":
            allocator.empty_cache()
        used = [(block.address, block.size) for block in live]
        free = [(address, size) for address, size, _ in allocator.free_blocks()]
        spans = sorted(used + free)
        assert all(low + size <= high for (low, size), (high, _) in pairwise(spans))
        assert all(size % 512 == 0 for _, size in spans)
        assert allocator.allocated == sum(size for _, size in used)
        assert allocator.reserved == sum(size for _, size in spans)
        assert allocator.allocated <= allocator.reserved <= allocator.peak_reserved
        assert allocator.allocated <= allocator.peak_allocated
        if configuration.limit is not None:
            assert allocator.reserved <= configuration.limit
        if not configuration.expandable_segments:
            assert allocator.reserved == sum(allocator.segments.values())
    for block in live:
        allocator.free(block)
    allocator.empty_cache()
    assert (allocator.allocated, allocator.reserved, list(allocator.free_blocks())) == (0, 0, [])
