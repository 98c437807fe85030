"""Which of the next problems a step takes: those whose pass rate so far is nearest to a half.

A group teaches by the differences between its completions; of 0 and 1 rewards with pass rate p
their variance is p (1 - p) (sampling by it: arXiv 2502.12272). The rate is estimated from the
rewards that a problem's groups had before, as shares of the range of all rewards so far, the latest
counting most; of a problem that is new, from those of its level, where a field of the problem says
one; of what nothing is known about, it is a half, so what is new comes first. Ties keep the task's
order.

Pure: the same rates and problems give the same choice, so a run that is resumed makes the same one.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import fmean

from lowmem_grpo.rollout.types import Group
from lowmem_grpo.tasks.base import Problem

__all__ = ["Rates", "chosen"]

KEPT = 0.8  # of what was known, at each new group: the policy changes
PRIOR = 1.0  # groups that a rate of a half is worth, where there is nothing


@dataclass
class Rates:
    """What is known of problems and levels: by key, [sum of shares, weight]; `low` and `high`: the
    range of all rewards so far.
    """

    known: dict[str, list[float]] = field(default_factory=dict)
    low: float | None = None
    high: float | None = None

    def learn(self, groups: Sequence[Group], level_field: str | None) -> None:
        """Take in scored groups, but for rollouts that were dropped."""
        counted = [(group.problem, group.counted_rewards) for group in groups]
        rewards = [reward for _, of_group in counted for reward in of_group]
        if not rewards:
            return
        self.low = min(rewards if self.low is None else [self.low, *rewards])
        self.high = max(rewards if self.high is None else [self.high, *rewards])
        span = self.high - self.low
        for problem, of_group in counted:
            if not of_group:
                continue
            share = (fmean(of_group) - self.low) / span if span else 0.5
            for key in _keys(problem, level_field):
                total, weight = self.known.get(key, (0.0, 0.0))
                self.known[key] = [KEPT * total + share, KEPT * weight + 1.0]

    def of(self, problem: Problem, level_field: str | None) -> float:
        """The estimated pass rate."""
        for key in _keys(problem, level_field):
            if key in self.known:
                total, weight = self.known[key]
                return (total + PRIOR / 2) / (weight + PRIOR)
        return 0.5


def chosen(
    problems: Sequence[Problem], count: int, rates: Rates, level_field: str | None
) -> list[int]:
    """The places of `count` of the `problems`, in their order."""
    variances = []
    for problem in problems:
        rate = rates.of(problem, level_field)
        variances.append(rate * (1.0 - rate))
    best = sorted(range(len(problems)), key=lambda place: (-variances[place], place))[:count]
    return sorted(best)


def _keys(problem: Problem, level_field: str | None) -> list[str]:
    """From the nearest to the most general."""
    if level_field is None:
        return [problem.id]
    level = json.dumps(problem.fields.get(level_field), sort_keys=True)
    return [problem.id, f"{level_field}: {level}"]
