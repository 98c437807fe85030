"""The simulated allocator against torch's own, event by event, for the options of its environment.

`recordings.jsonl.gz`: what torch 2.13.0+cu130 held, out of memory now and then, on a stand-in for
CUDA with 1,100 MiB of address space (`tools/record_allocator.py`, seeds 1 to 9).
"""

import gzip
import json
from pathlib import Path

import pytest

from lowmem_grpo.allocator_options import read_options
from lowmem_grpo.memory.allocator import MIB, AllocatorSettings, OutOfMemoryError
from lowmem_grpo.memory.simulate import new_allocator

with gzip.open(Path(__file__).with_name("recordings.jsonl.gz"), "rt") as _lines:
    RECORDINGS = {each["conf"]: each for each in map(json.loads, _lines)}


def differing(recording, **changed):
    """The first event after which the simulation holds something else, or None."""
    options = read_options({"PYTORCH_ALLOC_CONF": recording["conf"]}).settings() | changed
    total = recording["total"]
    outside = total - recording["free"]
    allocator = new_allocator(
        AllocatorSettings(card_memory=total, outside_bytes=outside, **options)
    )
    live = {}
    for place, (action, name, size, stream, *held) in enumerate(recording["rows"]):
        refused = 0
        try:
            if action == "alloc":
                live[name] = allocator.malloc(size, stream)
            elif action == "free":
                allocator.free(live.pop(name))
            else:
                allocator.empty_cache()
        except OutOfMemoryError:
            refused = 1
        if [allocator.allocated, allocator.reserved, refused] != held:
            return place
    return None if allocator.retries == recording["retries"] else len(recording["rows"])


@pytest.mark.parametrize("conf", RECORDINGS)
def test_every_event_leaves_what_torch_held(conf):
    assert differing(RECORDINGS[conf]) is None


@pytest.mark.parametrize(
    ("option", "other"),
    [
        ("expandable_segments", False),
        ("max_split_size", None),
        ("max_non_split_rounding_size", 20 * MIB),
        ("large_segment_size", 20 * MIB),
        ("roundup_power2_divisions", 0),
        ("garbage_collection_threshold", 0.0),
        ("process_fraction", None),
    ],
)
def test_no_option_could_be_left_out(option, other):
    """Each option decides something in at least one of the recordings that were made with it."""
    made_with = [
        each for each in RECORDINGS.values()
        if option in read_options({"PYTORCH_ALLOC_CONF": each["conf"]}).settings()
    ]  # fmt: skip
    changed = {option: other}
    if option == "large_segment_size":
        changed["max_non_split_rounding_size"] = 40 * MIB
    if option == "max_non_split_rounding_size":
        changed["large_segment_size"] = 20 * MIB
    assert any(differing(each, **changed) is not None for each in made_with)
