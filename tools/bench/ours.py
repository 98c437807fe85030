"""Our side: the product's own loop, watched from outside.

Phases are known by the progress that the loop shows, the end of a step by its line on the console.
"""

from __future__ import annotations

import contextlib
import signal
from typing import Any
from unittest import mock

import lowmem_grpo.train as loop
from lowmem_grpo.config import Config
from lowmem_grpo.policy.integrity import named_tensors
from lowmem_grpo.run.console import Console

from .curve import reached
from .meter import Meter

UPDATES = ("update", "optimizer")  # phases of the product that are one here


def run(config: Config, until: float | None = None) -> dict[str, Any]:
    """Train as configured. `until`: stop once the running mean reward is this high.

    Returns the meter's records (`steps`), with the product's own seconds where it takes them, the
    mean `reward`, and by phase the traced peaks of tensors in bytes (`allocated`, of the steps that
    were traced: on a CPU the first and the last). `loaded_bytes`: what the weights and adapters
    take of that, and of every peak.
    """
    console = _Watching(until)
    with mock.patch.object(loop, "open_models", console.watched(loop.open_models)):
        loop.train(config, resume=False, overwrite=False, console=console)
    console.meter.stop()
    return {
        "steps": console.meter.steps,
        "startup_seconds": console.meter.startup_seconds,
        "loaded_bytes": console.loaded_bytes,
    }


class _Watching(Console):
    """A silent console that measures."""

    def __init__(self, until: float | None):
        super().__init__(quiet=True)
        self.meter, self.loaded_bytes = Meter(), 0
        self._until = until

    def watched(self, open_models):
        """`open_models`, which also tells the meter of the policy."""

        def opened(*args, **kwargs):
            policy = open_models(*args, **kwargs)
            self.meter.watch(policy.trunk)
            storages = (t.untyped_storage() for _, t in named_tensors(policy.model))
            self.loaded_bytes = sum({s.data_ptr(): s.nbytes() for s in storages}.values())
            return policy

        return opened

    @contextlib.contextmanager
    def progress(self, name: str, total: int | None):
        if name == "rollout" and not self.meter.started:
            self.meter.start()
        with super().progress(name, total) as advance, self.meter.phase(name):
            yield advance

    def step(self, record: dict[str, Any], steps: int) -> None:
        seconds, memory = record["seconds"], record["memory"]
        self.meter.note(
            seconds=seconds["total"],
            phases={
                **{name: seconds.get(name, 0.0) for name in ("rollout", "reward", "reference")},
                "update": sum(seconds[name] for name in UPDATES),
            },
            reward=record["reward_mean"],
            allocated={n: m["allocated"] for n, m in memory.items() if "allocated" in m},
        )
        self.meter.step()
        rewards = [step["reward"] for step in self.meter.steps]
        if self._until is not None and reached(rewards, self._until) is not None:
            signal.raise_signal(signal.SIGINT)  # the loop's own way of stopping early
