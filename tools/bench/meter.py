"""Seconds, trunk tokens and resident memory of a process's steps, by phase: one meter for both
sides.

A trunk token is one position of one row that goes through the model's layers, padding included. It
is counted at the first norm of the first decoder layer, which whatever runs the layer calls: what
is computed twice counts twice.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import threading
import time
from collections import Counter
from typing import Any

import psutil

PHASES = ("rollout", "reward", "reference", "update")
OTHER = "other"
SAMPLED_EVERY = 0.02  # seconds between two looks at the resident memory


class Meter:
    """`steps`: one record a step, see `step`. `startup_seconds`: from the start of the process to
    that of training.
    """

    def __init__(self):
        self.steps: list[dict[str, Any]] = []
        self.startup_seconds = 0.0
        self._process = psutil.Process()
        self._begun: float | None = None
        self._stopped = threading.Event()
        self._running = OTHER
        self._clear()

    def watch(self, trunk) -> None:
        """Count the tokens that go through a transformers model's layers."""
        trunk.layers[0].input_layernorm.register_forward_pre_hook(self._forward)

    @property
    def started(self) -> bool:
        return self._begun is not None

    def start(self) -> None:
        """The model is loaded and training begins: memory is measured above what it is now."""
        _give_back()
        self.startup_seconds = time.time() - self._process.create_time()
        self._base = self._peak = self._resident()
        self._begun = self._ended = time.perf_counter()
        threading.Thread(target=self._look, daemon=True).start()

    def stop(self) -> None:
        """Training is over: memory is not looked at any more."""
        self._stopped.set()

    @contextlib.contextmanager
    def phase(self, name: str):
        """What runs within belongs to the phase; phases are not nested."""
        self.begin(name)
        try:
            yield
        finally:
            self.end()

    def begin(self, name: str) -> None:
        self._running, self._since = name, time.perf_counter()

    def end(self) -> None:
        """The running phase is over, if there is one."""
        if self._running != OTHER:
            self._seconds[self._running] += time.perf_counter() - self._since
            self._running = OTHER

    def note(self, **more: Any) -> None:
        """Something else for the record of the step in hand; it wins over what is measured here."""
        self._noted.update(more)

    def step(self) -> None:
        """A step is over. Its record: `seconds` since the one before, `phases` (seconds by phase),
        `tokens` and `largest` (trunk tokens by phase, and in one forward pass), `peak_bytes` above
        the loaded model, `ended` (seconds since training began), and what was noted.
        """
        now = time.perf_counter()
        peak, self._peak = max(self._peak, self._resident()), 0
        self.steps.append(
            {
                "seconds": now - self._ended,
                "phases": {name: self._seconds[name] for name in PHASES},
                "tokens": {name: self._tokens[name] for name in PHASES},
                "largest": {name: self._largest[name] for name in PHASES},
                "peak_bytes": peak - self._base,
                "ended": now - self._begun,
                **self._noted,
            }
        )
        self._ended = now
        self._clear()

    def _clear(self) -> None:
        self._seconds, self._tokens, self._largest = Counter(), Counter(), Counter()
        self._noted: dict[str, Any] = {}

    def _forward(self, norm, args) -> None:
        tokens = args[0].shape[:-1].numel()
        self._tokens[self._running] += tokens
        self._largest[self._running] = max(self._largest[self._running], tokens)

    def _resident(self) -> int:
        return self._process.memory_info().rss

    def _look(self) -> None:
        while not self._stopped.wait(SAMPLED_EVERY):
            self._peak = max(self._peak, self._resident())


def _give_back() -> None:
    """Return freed memory to the system. What malloc keeps of planning and loading would count as
    the model's, and be used again unseen.
    """
    gc.collect()
    with contextlib.suppress(AttributeError, OSError, TypeError):  # only glibc has it
        ctypes.CDLL(None).malloc_trim(0)
