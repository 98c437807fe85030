"""Timelines of made-up traces against the whole of it, added up naively; and their pictures."""

import random
import re

import pytest

from lowmem_grpo.memory.allocator import MIB, AllocatorSettings, Event
from lowmem_grpo.memory.components import COMPONENTS
from lowmem_grpo.memory.pictures import COLOURS, timeline_picture
from lowmem_grpo.memory.simulate import simulate
from lowmem_grpo.memory.timeline import stretches, thinned, timeline

PHASES = ("load", "rollout", "reference", "update", "optimizer")
TAGS = ("base_weights", "activations", "logits", "")


def a_trace(seed: int, length: int) -> list[Event]:
    """Allocations and frees in phases of very different length."""
    rng = random.Random(seed)
    events, live, number = [], [], 0
    for phase in (*PHASES, *PHASES[1:]):
        for _ in range(max(1, int(length * rng.random() ** 4))):
            if live and rng.random() < 0.5:
                made = live.pop(rng.randrange(len(live)))
                events.append(made._replace(action="free", phase=phase))
            elif rng.random() < 0.01:
                events.append(Event("empty_cache", phase=phase))
            else:
                number += 1
                size = int(2 ** rng.uniform(6, 24))
                made = Event("alloc", number, size, 0, phase, "", rng.choice(TAGS))
                live.append(made)
                events.append(made)
    return events


def naive(events: list[Event]) -> list[dict[str, int]]:
    """Live bytes by component after each event, counted anew each time from the blocks' sizes."""
    sizes, points, before = {}, [], 0
    for event, now in zip(events, simulate(events).timeline.allocated, strict=True):
        if event.action == "alloc":
            sizes[event.id] = now - before, event.component or "other"
        elif event.action == "free":
            del sizes[event.id]
        before = now
        point = {}
        for size, name in sizes.values():
            point[name] = point.get(name, 0) + size
        points.append(point)
    return points


@pytest.mark.parametrize("seed", range(8))
def test_nothing_is_lost_of_the_peaks(seed):
    events = a_trace(seed, 4000)
    usage = simulate(events)
    allocated, reserved = usage.timeline
    full = naive(events)
    found = timeline(events, allocated, reserved, most=150)
    points = len(found["phase"])
    assert points <= 150
    assert points == len(found["allocated"]) == len(found["reserved"])
    assert all(len(values) == points for values in found["components"].values())
    for phase in PHASES:
        whole = [place for place, event in enumerate(events) if event.phase == phase]
        here = [place for place, name in enumerate(found["phase"]) if name == phase]
        for key, values in (("allocated", allocated), ("reserved", reserved)):
            assert max(found[key][p] for p in here) == max(values[p] for p in whole)
        highest = max(whole, key=allocated.__getitem__)
        kept = max(here, key=found["allocated"].__getitem__)
        assert {n: v[kept] for n, v in found["components"].items() if v[kept]} == full[highest]
    # Every phase begins and ends where it did.
    names = [phase for phase, _ in _ends(found["phase"], found["allocated"])]
    assert names == [*PHASES, *PHASES[1:]]
    assert _ends(found["phase"], found["allocated"]) == _ends([e.phase for e in events], allocated)


def _ends(phases, values):
    return [(phases[s], (values[s], values[e - 1])) for s, e in stretches(phases)]


def test_components_add_up():
    events = a_trace(3, 2000)
    found = timeline(events, simulate(events).timeline.allocated)
    assert found["reserved"] is None
    assert "" not in found["components"]
    for place, allocated in enumerate(found["allocated"]):
        assert sum(values[place] for values in found["components"].values()) == allocated


def test_a_short_trace_is_kept_whole():
    events = a_trace(1, 30)
    usage = simulate(events)
    found = timeline(events, *usage.timeline)
    assert found["allocated"] == list(usage.timeline.allocated)
    assert found["phase"] == [event.phase for event in events]
    full = naive(events)
    for name, values in found["components"].items():
        assert values == [point.get(name, 0) for point in full]


def test_running_sums_and_ids_that_are_used_again():
    events = [
        Event("alloc", 7, 100, component="logits"),
        Event("free", 7),
        Event("alloc", 7, 300, component="activations"),
    ]
    found = timeline(events, [100, 0, 300])
    assert found["components"] == {"logits": [100, 0, 0], "activations": [0, 0, 300]}


def test_a_simulation_that_ran_out_of_memory_ends_early():
    events = [Event("alloc", n, 30 * MIB, phase="load", component="other") for n in range(4)]
    usage = simulate(events, AllocatorSettings(card_memory=70 * MIB))
    assert usage.oom is not None
    assert timeline(events, *usage.timeline)["allocated"] == [30 * MIB, 60 * MIB]


def test_more_phases_than_points_and_none_at_all():
    phases = [str(place) for place in range(100)]
    assert thinned(phases, range(100), None, most=20) == list(range(100))
    assert timeline([], [])["phase"] == []
    assert stretches([]) == []


def test_matplotlib_is_left_as_it_was():
    import matplotlib

    events = a_trace(5, 300)
    found = timeline(events, *simulate(events).timeline)
    before = dict(matplotlib.rcParams)
    picture = timeline_picture([("predicted", found)], 60 * MIB)
    assert dict(matplotlib.rcParams) == before
    assert picture == timeline_picture([("predicted", found)], 60 * MIB)


def test_pictures_of_uneven_phases():
    many = [f"phase {n}" for n in range(60) for _ in range(1 + 300 * (n == 7))]
    held = [n % 17 * MIB for n in range(len(many))]
    one = {"phase": ["load"], "allocated": [0], "reserved": [0], "components": {"logits": [0]}}
    lines = {"phase": many, "allocated": held, "reserved": held, "components": {}}
    picture = timeline_picture([("predicted", lines), ("measured", one)], 10 * 1024 * MIB)
    assert picture.png.startswith(b"\x89PNG")
    assert "(above the picture)" in re.sub(r"\s+", " ", picture.svg)


def test_every_component_has_a_colour_of_its_own():
    assert set(COMPONENTS) <= set(COLOURS)
    assert len({COLOURS[name] for name in COMPONENTS}) == len(COMPONENTS)
