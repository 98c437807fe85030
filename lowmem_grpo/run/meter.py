"""Seconds and memory of each phase of a step."""

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator

import psutil
import torch

from lowmem_grpo.memory.simulate import add_up
from lowmem_grpo.memory.trace import Recorder

__all__ = ["Meter"]


class Meter:
    """Collects, by phase: wall-clock seconds, resident host memory at its end, and the peaks of
    what tensors take in bytes: on CUDA as the allocator counts them, elsewhere by a trace, if one
    is asked for.

    `alive`: tells the tensors that live through a phase, by name; a CPU's phases are then traced,
    which costs time (decoding takes about twice as long) and changes no number.
    """

    def __init__(
        self,
        device: torch.device,
        alive: Callable[[], Iterable[tuple[str, torch.Tensor]]] | None = None,
    ):
        self.device = device
        self.seconds: dict[str, float] = {}
        self.memory: dict[str, dict[str, int]] = {}
        self._process = psutil.Process()
        self._alive = alive

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Measure what runs within. A phase that is entered twice adds up its seconds and keeps the
        higher peaks.
        """
        cuda = self.device.type == "cuda"
        if cuda:
            torch.cuda.reset_peak_memory_stats(self.device)
        start = time.perf_counter()
        now = {}
        if self._alive is not None and not cuda:
            with Recorder() as recorder:
                recorder.adopt(self._alive())
                yield
            now["allocated"] = add_up(recorder.events).peak_allocated
        else:
            yield
        if cuda:
            torch.cuda.synchronize(self.device)
            now["allocated"] = torch.cuda.max_memory_allocated(self.device)
            now["reserved"] = torch.cuda.max_memory_reserved(self.device)
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start
        now["host_rss"] = self._process.memory_info().rss
        before = self.memory.get(name, {})
        self.memory[name] = {key: max(value, before.get(key, 0)) for key, value in now.items()}
