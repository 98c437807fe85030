"""Rewards of how long a completion is, and of how often it says the same.

    overlong:max=L,cache=C     0 up to L - C tokens, from there down to -1 at L, -1 beyond
                               (soft overlong punishment: DAPO, arXiv 2503.14476, eq. 13)
    repetition:ngram=n         -(1 - distinct / all) of the n-grams of words; 0 below n words
                               (after arXiv 2502.03373, section 4.3)

Both are at most 0: penalties beside a reward that says what is right.
"""

from __future__ import annotations

from typing import Any

from lowmem_grpo.errors import ConfigError
from lowmem_grpo.rewards.base import RewardFunction

__all__ = ["overlong_reward", "repetition_reward"]


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
