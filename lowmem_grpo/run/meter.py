"""Seconds and memory of each phase of a step."""

import contextlib
import time
from collections.abc import Iterator

import psutil
import torch

__all__ = ["Meter"]


class Meter:
    """Collects, by phase: wall-clock seconds, resident host memory at its end, and on CUDA the
    peaks in bytes.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.seconds: dict[str, float] = {}
        self.memory: dict[str, dict[str, int]] = {}
        self._process = psutil.Process()

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Measure what runs within. A phase that is entered twice adds up its seconds and keeps the
        higher peaks.
        """
        cuda = self.device.type == "cuda"
        if cuda:
            torch.cuda.reset_peak_memory_stats(self.device)
        start = time.perf_counter()
        yield
        if cuda:
            torch.cuda.synchronize(self.device)
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start
        now = {"host_rss": self._process.memory_info().rss}
        if cuda:
            now["allocated"] = torch.cuda.max_memory_allocated(self.device)
            now["reserved"] = torch.cuda.max_memory_reserved(self.device)
        before = self.memory.get(name, {})
        self.memory[name] = {key: max(value, before.get(key, 0)) for key, value in now.items()}
