"""Rewards of how long a completion is, and of how often it says the same.

    overlong:max=L,cache=C     0 up to L - C tokens, from there down to -1 at L, -1 beyond
                               (soft overlong punishment: DAPO, arXiv 2503.14476, eq. 13)
    cosine:max=L               falls with the length of what is right, rises with that of what is
                               wrong, in half a turn of a cosine (arXiv 2502.03373, section 4.1)
    repetition:ngram=n         -(1 - distinct / all) of the n-grams of words; 0 below n words
                               (after arXiv 2502.03373, section 4.3)

The first and the last are at most 0: penalties beside a reward that says what is right. `cosine`
says that itself: by the reward that the task has by default, where that compares answers, else by
the task's own score. Its ends can be set: right0=1,right1=0.5 at length 0 and at L where the
completion is right, wrong0=-1,wrong1=-0.5 where it is wrong, over=-1 where it is longer than L.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import cos, pi
from typing import Any

from lowmem_grpo.errors import ConfigError
from lowmem_grpo.isolation.worker import Failure
from lowmem_grpo.rewards.base import RewardFunction
from lowmem_grpo.rewards.isolated import Values
from lowmem_grpo.tasks.base import Problem

__all__ = ["CosineReward", "Ends", "overlong_reward", "repetition_reward"]


def overlong_reward(most: int, cache: int) -> RewardFunction:
    """Raises `ConfigError` unless 0 < `cache` <= `most`."""
    if not 0 < cache <= most:
        raise ConfigError(
            f"reward 'overlong:max={most},cache={cache}': cache must be from 1 to max, the length "
            "in tokens over which the reward falls"
        )

    def overlong(completion_ids: list[list[int]], **_: Any) -> list[float]:
        return [min(0.0, max(-1.0, (most - cache - len(ids)) / cache)) for ids in completion_ids]

    return overlong


@dataclass(frozen=True)
class Ends:
    """What `cosine` gives, see the module."""

    right0: float = 1.0
    right1: float = 0.5
    wrong0: float = -1.0
    wrong1: float = -0.5
    over: float = -1.0


class CosineReward:
    """The reward function `cosine`. `right` has a score of 1 for a completion that is right, and
    explains it. Raises `ConfigError` unless `most` is positive.
    """

    def __init__(self, most: int, ends: Ends, right: Any) -> None:
        if most < 1:
            raise ConfigError(f"reward 'cosine:max={most}': max must be 1 or more tokens")
        self._most, self._ends, self._right = most, ends, right

    def __call__(
        self, completions: list[str], completion_ids: list[list[int]], **columns: Any
    ) -> Values:
        scores = self._right(completions=completions, completion_ids=completion_ids, **columns)
        return [
            found if isinstance(found, Failure) else self._on_the_curve(found >= 1.0, len(ids))
            for found, ids in zip(scores, completion_ids, strict=True)
        ]

    def explain(self, completion: str, problem: Problem) -> str:
        """What was read out of a completion and what was wanted, in one line."""
        return self._right.explain(completion, problem)

    def _on_the_curve(self, right: bool, length: int) -> float:
        if length > self._most:
            return self._ends.over
        ends = self._ends
        first, last = (ends.right0, ends.right1) if right else (ends.wrong0, ends.wrong1)
        return last + 0.5 * (first - last) * (1.0 + cos(pi * length / self._most))


def repetition_reward(ngram: int) -> RewardFunction:
    """Raises `ConfigError` unless `ngram` is positive."""
    if ngram < 1:
        raise ConfigError(f"reward 'repetition:ngram={ngram}': ngram must be 1 or more")

    def repetition(completions: list[str], **_: Any) -> list[float]:
        return [_repeated(text.lower().split(), ngram) for text in completions]

    return repetition


def _repeated(words: list[str], ngram: int) -> float:
    grams = [tuple(words[i : i + ngram]) for i in range(len(words) - ngram + 1)]
    return len(set(grams)) / len(grams) - 1.0 if grams else 0.0
