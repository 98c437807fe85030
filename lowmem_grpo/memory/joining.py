"""The traces of single phases, put together to those of a step, and of two."""

from __future__ import annotations

from typing import NamedTuple

from lowmem_grpo.memory.allocator import Event
from lowmem_grpo.memory.simulate import add_up
from lowmem_grpo.memory.trace import OUTSIDE, layer_number
from lowmem_grpo.memory.unreal import HOST

__all__ = ["Part", "again", "layers_by_name", "together", "without_host"]

PART, STEP = 1 << 40, 1 << 50  # between the ids of two parts of a step, and of two steps


class Part(NamedTuple):
    """Events that are put together with others'. `gradients`: ids of those that are left alive, or
    that are met, in the order of the parameters. `kept`: bytes of what is left; `host`: the most
    that lay on the host.
    """

    events: list[Event]
    workspaces: dict[tuple[str, bool], int]
    gradients: tuple[int, ...] = ()
    kept: int = 0
    host: int = 0


def together(parts: list[Part], score: Part, optimizer: Part) -> list[Event]:
    """The parts' events one after another; a workspace is made once, gradients go from one part to
    the next, and cached memory is given back in between, as `train.py` does.
    """
    events: list[Event] = []
    seen: set[tuple[str, bool]] = set()
    left: tuple[int, ...] = ()
    for number, part in enumerate(parts):
        first = number * PART
        there = {id for key, id in part.workspaces.items() if key in seen}
        seen |= part.workspaces.keys()
        names = dict(zip(part.gradients, left, strict=True)) if part is optimizer else {}
        events += [
            event._replace(id=names.get(event.id, event.id + first))
            for event in part.events
            if event.id not in there
        ]
        if part is not score:  # whose gradients the optimizer needs at once
            events.append(Event("empty_cache", phase=part.events[-1].phase))
        if part is score:
            left = tuple(id + first for id in part.gradients)
    return events


def without_host(events: list[Event]) -> tuple[list[Event], int]:
    """The events of the device alone, and the most bytes that lay on the host."""
    host = [event for event in events if event.component == HOST]
    if not host:
        return events, 0
    return [event for event in events if event.component != HOST], add_up(host).peak_allocated


def again(step: list[Event]) -> list[Event]:
    """The step once more. What it left alive (moments, workspaces) is found, not made again."""
    ended = {event.id for event in step if event.action == "free"}
    made = {event.id for event in step if event.action == "alloc"} & ended
    return [
        event._replace(id=event.id + STEP) if event.id else event
        for event in step
        if event.id in made or event.action == "empty_cache"
    ]


def layers_by_name(events: list[Event]) -> list[int]:
    """The layers that were being loaded. What has no name is the 16-bit form of the weight that
    comes next.
    """
    made, found, following = {}, [], OUTSIDE
    for event in reversed(events):
        if event.action == "alloc":
            following = layer_number(event.module) if event.module else following
            made[event.id] = following
    for event in events:
        found.append(made[event.id])
    return found
