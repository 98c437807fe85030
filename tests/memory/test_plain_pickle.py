"""The reader of plain pickles: containers survive, everything else is refused before it acts."""

from __future__ import annotations

import pickle

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lowmem_grpo.memory import plain_pickle

PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: (
        st.lists(inner)
        | st.tuples(inner, inner)
        | st.dictionaries(st.text() | st.integers(), inner)
    ),
)


@given(PLAIN, st.integers(0, pickle.HIGHEST_PROTOCOL))
@settings(deadline=None)
def test_plain_containers_survive(value, protocol):
    assert plain_pickle.load(pickle.dumps(value, protocol)) == value


def test_shared_and_cyclic_lists_survive():
    cycle = [1]
    cycle.append(cycle)
    read = plain_pickle.load(pickle.dumps({"cycle": cycle, "again": cycle}))
    assert read["cycle"] is read["again"] is read["cycle"][1]


@pytest.mark.parametrize(
    "data",
    [
        b"cos\nsystem\n(S'true'\ntR.",  # GLOBAL, REDUCE
        b"(ios\nsystem\n.",  # INST
        b"\x80\x02\x82\x01.",  # EXT1
        b"Psomething\n.",  # PERSID
        b"\x80\x04}\x86.",  # TUPLE2 with one object there
        b"\x80\x02}r\xff\xff\xff\xffr.",  # a memo index of 2^32 - 1, then a cut
        b"\x80\x04\x8d" + b"\xff" * 7 + b"\x7f" + b"x.",  # a text of 2^63 bytes
        b"\x80\x04}h\x05s.",  # a memo entry that is not there
        b"\x80\x04}]Ns.",  # a list as key
        b"\x80\x04NNa.",  # an item for None
        b"\x80\x04(.",  # nothing to return
        b"}",
        b"",
        b"\x00\x01\x02",
        b"PK\x03\x04 a zip file",
    ],
)
def test_strange_bytes_are_refused(data):
    with pytest.raises(ValueError, match="byte"):
        plain_pickle.load(data)


def test_a_huge_memo_index_takes_no_memory():
    assert plain_pickle.load(b"\x80\x02}r\xff\xff\xff\xff.") == {}


def test_deep_nesting_is_refused_and_does_not_crash():
    depth = 300_000
    keys = b"\x80\x04})" + b"\x85" * depth + b"Ns."  # the hash of such a key overflows the C stack
    with pytest.raises(ValueError, match="key"):
        plain_pickle.load(keys)
    with pytest.raises(ValueError, match="nested deeper"):
        plain_pickle.load(b"\x80\x04" + b"(" * depth + b"t" * depth + b".")
