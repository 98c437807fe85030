"""The trace of a deep model from that of a shallow one, layer by layer.

A transformer's layers are alike, so what one in the middle allocates and frees, all of them do.
`TRACED` layers are traced, and the events of the middle one are repeated until the model has its
depth. Every run of events that belongs to one layer (its forward pass, its backward pass, the
frees of its cache or gradients) is a *run*; a free names an allocation of the same layer or of a
neighbour, and so does its copy.

Nothing is taken for granted: the three layers in the middle must have made the same events, free
for free, or the trace is refused and the caller traces every layer.

Left out: models whose layers differ; those are traced whole.
"""

from __future__ import annotations

from collections import defaultdict
from functools import cache
from itertools import groupby, pairwise

from lowmem_grpo.memory.allocator import Event
from lowmem_grpo.memory.trace import OUTSIDE

__all__ = ["TRACED", "alike", "base_id", "deepened", "shortened"]

TRACED = 5
BEFORE, MIDDLE, AFTER = 1, 2, 3  # layers of the short model; the middle one is repeated
STRIDE = 1 << 30  # between the ids of two copies of an allocation; a trace has fewer


def alike(model_config) -> bool:
    """Whether a model is deep and its configuration makes no difference between its layers."""
    depth = model_config.num_hidden_layers
    lists = (v for v in vars(model_config).values() if isinstance(v, (list, tuple)))
    return depth > TRACED and all(len(v) != depth or len(set(map(str, v))) == 1 for v in lists)


def shortened(model_config):
    """The same model with `TRACED` layers."""
    fields, depth = model_config.to_dict(), model_config.num_hidden_layers
    for name, value in fields.items():
        if isinstance(value, (list, tuple)) and len(value) == depth:
            fields[name] = value[:TRACED]
    own = model_config.attribute_map.get("num_hidden_layers", "num_hidden_layers")
    return type(model_config)(**{**fields, own: TRACED})


def base_id(number: int) -> int:
    """The id in the short trace of an allocation in the long one."""
    return number % STRIDE


def deepened(events: list[Event], layers: list[int], depth: int) -> list[Event] | None:
    """A trace of `TRACED` layers as one of `depth` layers; None where the layers do not agree.

    `layers`: the layer that each event belongs to, as `Recorder` tells it. An allocation keeps its
    id, that of a copy is higher by a multiple of a large number (see `base_id`).
    """
    trace = _Trace(events, layers)
    if not trace.agrees():
        return None
    copies, deep = depth - TRACED + 1, []
    for before, (layer, run) in zip(
        [OUTSIDE, *(n for n, _ in trace.runs)], trace.runs, strict=False
    ):
        if layer != MIDDLE:
            deep += [trace.edge(event, layer, copies) for event in run]
            continue
        for copy in range(copies) if before == BEFORE else reversed(range(copies)):
            deep += [trace.copy(event, copy, copies) for event in run]
    return deep


class _Trace:
    """A short trace, cut into runs."""

    def __init__(self, events: list[Event], layers: list[int]):
        self.runs = _runs(events, layers)
        self.made: dict[int, tuple[int, int, int]] = {}  # id: layer, number of the run, place
        counts: dict[int, int] = defaultdict(int)
        for layer, run in self.runs:
            made = [event.id for event in run if event.action == "alloc"]
            self.made |= {id: (layer, counts[layer], place) for place, id in enumerate(made)}
            counts[layer] += 1
        # The allocation of the middle layer that stands where one of its neighbours' does.
        self.middle = {
            (number, place): id
            for id, (layer, number, place) in self.made.items()
            if layer == MIDDLE
        }

    def agrees(self) -> bool:
        """Whether the layers around the middle do what it does, and others leave it alone."""
        told: dict[int, list[list[tuple]]] = {BEFORE: [], MIDDLE: [], AFTER: []}
        for layer, run in self.runs:
            others = {self.made[event.id][0] for event in run}
            if layer in told:
                if any(abs(other - layer) > 1 for other in others):
                    return False
                told[layer].append([self._told(event, layer) for event in run])
            elif MIDDLE in others:
                return False
        return bool(told[MIDDLE]) and all(
            len(told[layer]) == len(told[MIDDLE])
            and all(
                len(one) == len(other) and all(map(_same, one, other))
                for one, other in zip(told[layer], told[MIDDLE], strict=True)
            )
            for layer in (BEFORE, AFTER)
        )

    def _told(self, event: Event, layer: int) -> tuple:
        """An event in words that are the same for each layer."""
        other, number, place = self.made[event.id]
        # What an edge has allocated before it is its own affair.
        where = (number, place) if BEFORE <= other <= AFTER else None
        module = _numbered(event.module, 0)
        tags = event.phase, module, event.component, event.stream
        return where, event.action, other - layer, event.size, *tags

    def copy(self, event: Event, copy: int, copies: int) -> Event:
        """An event of the middle layer in one of its copies."""
        other, number, place = self.made[event.id]
        target = copy + other - MIDDLE
        if other == MIDDLE or 0 <= target < copies:
            return _moved(event, self.middle[number, place], target)
        return _beyond(event, other, copies)

    def edge(self, event: Event, layer: int, copies: int) -> Event:
        """An event outside of the middle layer, of whose copies a neighbour meets the nearest."""
        other = self.made[event.id][0]
        if other == MIDDLE:
            return _moved(event, event.id, 0 if layer == BEFORE else copies - 1)
        return _beyond(event, other, copies)


def _moved(event: Event, id: int, copy: int) -> Event:
    """An event of the allocation `id` of the middle layer, in that copy."""
    return event._replace(id=id + copy * STRIDE, module=_numbered(event.module, MIDDLE + copy))


def _beyond(event: Event, layer: int, copies: int) -> Event:
    """An event of an allocation of another layer, which the copies may have moved away."""
    if layer <= MIDDLE:
        return event
    return event._replace(module=_numbered(event.module, layer + copies - 1))


def _same(one: tuple, other: tuple) -> bool:
    return one[1:] == other[1:] and (one[0] == other[0] or None in (one[0], other[0]))


def _runs(events: list[Event], layers: list[int]) -> list[tuple[int, list[Event]]]:
    """(layer, events) of each run. A neighbour's run that has none of the middle layer beside it is
    no run of a pass over the layers, and so of no layer.
    """
    labels = _labels(events, layers)
    runs = [
        (layer, [event for _, event in pairs])
        for layer, pairs in groupby(zip(labels, events, strict=True), key=lambda pair: pair[0])
    ]
    around = zip(
        [OUTSIDE, *(n for n, _ in runs)], runs, [*(n for n, _ in runs[1:]), OUTSIDE], strict=False
    )
    return [
        (OUTSIDE if layer in (BEFORE, AFTER) and MIDDLE not in (a, b) else layer, run)
        for a, (layer, run), b in around
    ]


def _labels(events: list[Event], layers: list[int]) -> list[int]:
    """The layer whose run an event is in.

    What happens between a layer and the next is the first one's; elsewhere a free belongs to where
    its allocation was made.
    """
    labels = list(layers)
    inside = [place for place, layer in enumerate(layers) if layer != OUTSIDE]
    for a, b in pairwise(inside):
        if abs(layers[a] - layers[b]) == 1:
            labels[a + 1 : b] = [layers[a]] * (b - a - 1)
    made = {}
    for place, event in enumerate(events):
        if event.action == "alloc":
            made[event.id] = labels[place]
        elif labels[place] == OUTSIDE:
            labels[place] = made[event.id]
    return labels


@cache
def _numbered(module: str, layer: int) -> str:
    """A module's name with another layer's number; unchanged where it has none."""
    parts = module.split(".")
    place = next((i for i, part in enumerate(parts) if part.isdigit()), None)
    if place is None:
        return module
    return ".".join([*parts[:place], str(layer), *parts[place + 1 :]])
