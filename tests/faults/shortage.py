"""A device that runs out of memory: `torch.OutOfMemoryError` at a chosen allocation, or where more
bytes would be alive than a limit allows.
"""

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lowmem_grpo.memory.trace import Recorder

WORDS = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 23.64 GiB"


class AtOperation(TorchDispatchMode):
    """Raises at the n-th operation on tensors within."""

    def __init__(self, number: int):
        super().__init__()
        self.left = number

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.left -= 1
        if self.left == 0:
            raise torch.OutOfMemoryError(WORDS)
        return function(*args, **(kwargs or {}))


def failing(function, *, times: int, operation: int):
    """The same function, whose first `times` calls run out of memory at that operation."""
    calls = []

    def called(*args, **kwargs):
        calls.append(None)
        if len(calls) > times:
            return function(*args, **kwargs)
        with AtOperation(operation):
            return function(*args, **kwargs)

    return called


class _Limited(list):
    """Events, of which the allocations and frees may not add up to more than `limit` bytes."""

    def __init__(self, limit: int):
        super().__init__()
        self.limit, self.alive, self.sizes, self.most = limit, 0, {}, 0

    def append(self, event):
        super().append(event)
        if event.action == "alloc":
            self.sizes[event.id] = event.size
            self.alive += event.size
            self.most = max(self.most, self.alive)
            if self.alive > self.limit:
                raise torch.OutOfMemoryError(WORDS)
        elif event.action == "free":
            self.alive -= self.sizes.pop(event.id)

    def __delitem__(self, place):  # autograd moved a tensor that is being watched: no allocation
        event = self[place]
        super().__delitem__(place)
        self.alive -= event.size
        self.sizes[event.id] = 0


def limited(function, limit: int, peaks: list[int]):
    """The same function, in which no more than `limit` bytes may be allocated at once, beside what
    was there before; the most that there was in each call is put into `peaks`.
    """

    def called(*args, **kwargs):
        recorder = Recorder()
        recorder.events = events = _Limited(limit)
        try:
            with recorder:
                return function(*args, **kwargs)
        finally:
            peaks.append(events.most)

    return called
