"""A phase that ran out of memory, the card's or the host's, is repeated with less at once.

    for attempt in fitting.attempts("update"):
        with attempt as config: ...

What is lessened is how the work is cut, which the mathematics does not depend on: completions
decoded at once, tokens of a micro-batch. What was found to fit stays for the rest of the run.

The plan is to make this unnecessary; where it was wrong, or another program took memory that was
free at the start, a night's work is worth more than a step's time. Each time is said, with the
plan's number beside what was reached.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from types import TracebackType
from typing import Any

import torch

from lowmem_grpo.config import Config
from lowmem_grpo.errors import PlanError
from lowmem_grpo.out_of_memory import first_line, is_out_of_memory

__all__ = ["Attempt", "Fitting"]

MIB = 2**20
TRIES = 5  # of one phase: to a sixteenth
SETTINGS = {
    "rollout": "memory.rollout_batch_size",
    "evaluation": "eval.batch_size",
    "reference": "memory.micro_batch_tokens",
    "update": "memory.micro_batch_tokens",
}


class Attempt:
    """A context manager that ends an out-of-memory error, and keeps its first line."""

    def __init__(self, config: Config):
        self._config, self.error = config, None

    def __enter__(self) -> Config:
        return self._config

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> bool:
        if not is_out_of_memory(error):
            return False
        # The words alone: the error's frames hold the tensors that there was no room for.
        self.error = first_line(error)
        return True


class Fitting:
    """`config`: the run's, with what was lessened so far. `predicted`: the plan's peak of each
    phase in allocated bytes. `warn` is told.
    """

    def __init__(
        self, config: Config, policy, predicted: Mapping[str, int], warn: Callable[[str], None]
    ):
        self.config = config
        self._policy, self._predicted, self._warn = policy, predicted, warn
        self._events: list[dict[str, Any]] = []

    def attempts(
        self, phase: str, largest: int, undo: Callable[[], None] = lambda: None
    ) -> Iterator[Attempt]:
        """Attempts at a phase, until one is through. `largest`: the most completions, or tokens,
        that it can have at once. `undo` is called between two of them, and has to leave everything
        as it was before the phase.

        Raises PlanError where less does not help, or there is no less.
        """
        at_once = 0
        for left in reversed(range(TRIES)):
            attempt = Attempt(self.config)
            yield attempt
            if attempt.error is None:
                return
            reached = self._reached()
            undo()
            self._policy.release()
            was = getattr(*_split(self.config, SETTINGS[phase]))
            at_once = min(was, largest)
            if at_once == 1 or not left:
                break
            self._lessen(phase, at_once // 2, was, attempt.error, reached)
        raise PlanError(
            f"out of memory in the {phase}, with {SETTINGS[phase]} = {at_once} as well: "
            f"{attempt.error}"
        )

    def take_events(self) -> list[dict[str, Any]]:
        """What happened since this was last asked, for the record of a step."""
        taken, self._events = self._events, []
        return taken

    def _lessen(self, phase: str, now: int, was: int, error: str, reached: int | None) -> None:
        key, predicted = SETTINGS[phase], self._predicted.get(phase)
        origin = f"the {phase} ran out of memory with {was}"
        self.config = self.config.settled({key: now}, origin)
        event = {"phase": phase, "setting": key, "was": was, "now": now, "error": error}
        self._events.append({**event, "predicted_bytes": predicted, "reached_bytes": reached})
        sizes = {"planned": predicted, "reached": reached}
        known = [f"{name} {size / MIB:.0f} MiB" for name, size in sizes.items() if size is not None]
        plan = f" ({', '.join(known)})" if known else ""
        self._warn(
            f"out of memory in the {phase}{plan}: repeated with {key} = {now} instead of {was}"
        )

    def _reached(self) -> int | None:
        """The most that was allocated since the phase began; known on CUDA."""
        if self._policy.device.type != "cuda":
            return None
        return torch.cuda.max_memory_allocated(self._policy.device)


def _split(config: Config, key: str) -> tuple[Any, str]:
    section, name = key.split(".")
    return getattr(config, section), name
