"""The reward `math`: 1.0 where math-verify finds the completion mathematically equal to the answer,
else 0.0.

math-verify's own time limit is an alarm signal: it works in the main thread only, takes the alarm
away from anyone else, and cannot interrupt one long operation on integers. So it is switched off,
and the comparison runs in a child process (`isolation/worker.py`) that is ended after `LIMIT_S`
seconds; the completion then has no score.

An answer that is not mathematics ("Paris") is compared as text: with the whole completion, or with
what is in its last \\boxed{}.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from typing import Any

from lowmem_grpo.errors import ConfigError, RewardError
from lowmem_grpo.isolation.worker import Failure, Worker, WorkerSetupError
from lowmem_grpo.rewards.isolated import Values
from lowmem_grpo.tasks.answers import equals_text, final_answer, last_boxed, same_answer

LIMIT_S = 5.0


class MathReward:
    """The reward function. Raises `ConfigError` where math-verify is not installed."""

    def __init__(self) -> None:
        if importlib.util.find_spec("math_verify") is None:
            raise ConfigError(
                "reward 'math' needs the package math-verify: pip install \"lowmem-grpo[tasks]\""
            )
        self._worker = Worker("lowmem_grpo.rewards.math:make_comparison", {})

    def __call__(self, completions: list[str], answer: list[str], **_: Any) -> Values:
        """Raises `RewardError` where math-verify cannot be loaded."""
        try:
            self._worker.start()
        except WorkerSetupError as error:
            raise RewardError(f"reward 'math' could not start: {error}") from error
        return [
            self._one(completion, final_answer(wanted))
            for completion, wanted in zip(completions, answer, strict=True)
        ]

    def _one(self, completion: str, answer: str) -> float | Failure:
        boxed = last_boxed(completion)
        if equals_text(completion, answer) or (boxed is not None and same_answer(boxed, answer)):
            return 1.0
        return self._worker.score({"completion": completion, "answer": answer}, LIMIT_S)


def make_comparison() -> Callable[[str, str], float]:
    """The child's side: 1.0 where `completion` equals `answer`."""
    from math_verify import parse, verify

    read = functools.partial(parse, parsing_timeout=None)

    @functools.lru_cache(maxsize=64)
    def reference(answer: str) -> list:
        # Bare TeX is only read between dollar signs: without them 1+x^2 is its last number, 2.
        delimited = any(mark in answer for mark in ("$", r"\(", r"\[", r"\boxed"))
        return read(answer if delimited else f"${answer}$")

    def compare(completion: str, answer: str) -> float:
        return float(verify(reference(answer), read(completion), timeout_seconds=None))

    return compare
