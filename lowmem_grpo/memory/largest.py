"""The largest run that fits a card: the longest completions, or the most in a group."""

from __future__ import annotations

from collections.abc import Callable

from lowmem_grpo.config import Config
from lowmem_grpo.errors import ConfigError
from lowmem_grpo.memory.plan import Planner
from lowmem_grpo.memory.settle import AUTO, Search

__all__ = ["SOLVABLE", "largest", "least_value"]

SOLVABLE = ("max_completion_length", "num_generations")
MOST_GENERATIONS = 1024


def largest(planner: Planner, config: Config, name: str) -> int | None:
    """The largest value of a setting of `SOLVABLE` that fits the card; None if not even 1 does.

    Settings that are "auto" go as low as it takes, but for `num_generations` a whole group decodes
    at once: cut into pieces, a group of any size would fit.
    """
    key = f"rollout.{name}"
    window = getattr(planner.model_config, "max_position_embeddings", None) or 1 << 20
    most, least = MOST_GENERATIONS, least_value(config, name)
    if name == "max_completion_length":
        most = window - config.rollout.max_prompt_length
    if most < least:
        raise ConfigError(
            f"rollout.max_prompt_length = {config.rollout.max_prompt_length} leaves nothing of the "
            f"model's window of {window} tokens"
        )

    def share(value: int) -> float:
        tried = config.settled({key: value}, "solve")
        search = Search(planner, tried)
        if name == "num_generations" and tried.memory.rollout_batch_size == AUTO:
            search.set("memory.rollout_batch_size", value)
        return search.smallest_share()

    return _last_below_one(share, least, most)


def least_value(config: Config, name: str) -> int:
    """The smallest legal value of a setting of `SOLVABLE`."""
    return 2 if name == "num_generations" else max(1, config.rollout.min_completion_length)


def _last_below_one(share: Callable[[int], float], low: int, high: int) -> int | None:
    """The largest of low..high, to about a hundredth, at which an ascending function is at most 1.

    Memory is all but linear in lengths, so the next value to try is where the line meets 1.
    """
    if (below := share(low)) > 1:
        return None
    if (above := share(high)) <= 1:
        return high
    slow = False
    while (step := _round(low)) < (width := high - low):
        line = (1 - below) / (above - below)
        # Not so close to either end that nothing is learnt; half-way where the line led astray.
        part = 0.5 if slow else min(max(line - 0.002, 0.05), 0.95)
        middle = max(int(low + width * part) // step * step, low + step)
        if middle >= high:
            break
        found = share(middle)
        if found <= 1:
            low, below = middle, found
        else:
            high, above = middle, found
        slow = not slow and high - low > width / 2
    return low


def _round(value: int) -> int:
    """A power of two of about a hundredth of a value, at least 1."""
    return 1 << max(value.bit_length() - 8, 0)
