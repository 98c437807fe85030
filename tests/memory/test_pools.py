"""A pool's free blocks against one sorted list, and the links of a segment when it is cut."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from lowmem_grpo.memory.allocator import FREE, MIB, USED, Block, CachingAllocator, Pool


@given(st.lists(st.tuples(st.integers(1, 12), st.integers(0, 10**6)), max_size=80))
def test_the_free_blocks_of_a_pool_are_a_sorted_list(steps):
    allocator, plain = CachingAllocator(), []
    pool = allocator.small
    for number, (size, choice) in enumerate(steps):
        if choice % 3 == 0 and plain:
            _, _, block = plain.pop(choice % len(plain))
            pool.remove(block)
        else:
            block = Block(number, size, 0, pool, FREE)
            pool.add(block)
            plain = sorted([*plain, (size, number, block)], key=lambda entry: entry[:2])
        expected = [block for _, _, block in plain]
        assert pool.listed() == expected
        assert list(pool.free[0].irange((size,))) == [e for e in plain if e[0] >= size]
        found = allocator._find(pool, size, 0)
        assert found is next((b for b in expected if b.size >= size), None)
        if found is not None:
            pool.add(found)


@given(st.lists(st.integers(1, 20), min_size=1, max_size=20), st.randoms())
def test_a_cut_segment_merges_again_in_any_order(sizes, random):
    pool = Pool(2 * MIB, 512)
    blocks = [Block(1000, sum(sizes), 0, pool)]
    for size in sizes[:-1]:
        blocks.append(blocks[-1].cut(size, USED))
    assert [block.size for block in blocks] == sizes
    assert [block.prev for block in blocks] == [None, *blocks[:-1]]
    assert [block.next for block in blocks] == [*blocks[1:], None]
    pieces, freed = list(zip(blocks, sizes, strict=True)), 0
    random.shuffle(pieces)
    for block, size in pieces:
        block.state = FREE
        pool.add(block)
        freed += size
        assert sum(b.size for b in pool.listed()) == freed
    (whole,) = pool.listed()
    assert (whole.address, whole.size, whole.whole) == (1000, sum(sizes), True)
