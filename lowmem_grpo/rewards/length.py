"""Rewards of how long a completion is, and of how often it says the same.

    overlong:max=L,cache=C     0 up to L - C tokens, from there down to -1 at L, -1 beyond
                               (soft overlong punishment: DAPO, arXiv 2503.14476, eq. 13)
    cosine:max=L               falls with the length of what is right, rises with that of what is
                               wrong, in half a turn of a cosine (arXiv 2502.03373, section 4.1)
    repetition:ngram=n         -(1 - distinct / all) of the n-grams of words; 0 below n words
                               (after arXiv 2502.03373, section 4.3)

The first and the last are at most 0: penalties beside a reward that says what is right. `cosine`
says that itself, by the task's own scorer. Its ends can be set: right0=1,right1=0.5 at length 0 and
at L where the completion is right, wrong0=-1,wrong1=-0.5 where it is wrong, over=-1 where it is
longer than L.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import cos, pi
from typing import Any

from lowmem_grpo.errors import ConfigError
from lowmem_grpo.isolation.worker import Failure
from lowmem_grpo.rewards.base import RewardFunction
from lowmem_grpo.rewards.isolated import Values
from lowmem_grpo.tasks.base import Problem, Task

__all__ = ["Ends", "cosine_reward", "overlong_reward", "repetition_reward"]


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


def cosine_reward(most: int, ends: Ends, task: Task) -> RewardFunction:
    """Raises `ConfigError` unless `most` is positive."""
    if most < 1:
        raise ConfigError(f"reward 'cosine:max={most}': max must be 1 or more tokens")

    def cosine(
        completions: list[str], problems: list[Problem], completion_ids: list[list[int]], **_: Any
    ) -> Values:
        scores = [task.score(p, text) for p, text in zip(problems, completions, strict=True)]
        return [
            found if isinstance(found, Failure) else _on_the_curve(found >= 1.0, len(ids))
            for found, ids in zip(scores, completion_ids, strict=True)
        ]

    def _on_the_curve(right: bool, length: int) -> float:
        if length > most:
            return ends.over
        first, last = (ends.right0, ends.right1) if right else (ends.wrong0, ends.wrong1)
        return last + 0.5 * (first - last) * (1.0 + cos(pi * length / most))

    return cosine


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
