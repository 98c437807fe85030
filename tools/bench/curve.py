"""Rewards over the steps of a run."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

WINDOW = 5  # steps of a running mean


def running_mean(rewards: Sequence[float]) -> list[float]:
    """The mean of each step and the `WINDOW - 1` before it, from step `WINDOW` on."""
    ends = range(WINDOW, len(rewards) + 1)
    return [fmean(rewards[end - WINDOW : end]) for end in ends]


def reached(rewards: Sequence[float], wanted: float) -> int | None:
    """The first step, from 1, whose running mean is `wanted` or more; None: there is none."""
    for step, mean in enumerate(running_mean(rewards), WINDOW):
        if mean >= wanted:
            return step
    return None
