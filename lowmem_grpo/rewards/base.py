"""What a reward is, and how completions are scored with several of them.

    total_i = sum over rewards of weight x value_i

A reward function is `function(completions, **fields) -> list[float]`: the texts of the completions
and, for each column of their problems, a list of the same length. The columns are those that every
problem of the call has, and

    answer          the reference answers, texts
    prompts         the chat messages of each prompt
    problems        the `Problem` objects themselves
    completion_ids  the tokens of each completion, its end token included

These names hide columns of the same name. Every function gets lists of its own. A value may be
None: this reward does not apply to that completion. It may have failed instead; then there is none
either, and it is counted. What there is none of adds nothing to the total.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from lowmem_grpo.errors import RewardError
from lowmem_grpo.isolation.worker import Failure
from lowmem_grpo.tasks.base import Problem

RewardFunction = Callable[..., list]
"""Returns, for each completion, a float, None, or a `Failure`."""
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Reward:
    """A reward function with its weight in the total and its name in the log. `told`: the kinds of
    failure that a person has been told of.
    """

    name: str
    weight: float
    function: RewardFunction
    told: set[str] = field(default_factory=set, compare=False)


@dataclass(frozen=True)
class Scores:
    """by_name: each reward's values, unweighted, one a completion, None where there is none; total:
    their weighted sum; failures: by name and completion, why there is none.
    """

    by_name: dict[str, list[float | None]]
    total: list[float]
    failures: dict[str, dict[int, Failure]] = field(default_factory=dict)

    @property
    def failed(self) -> set[int]:
        """The completions that lack a score of some reward which failed."""
        return {i for found in self.failures.values() for i in found}


def score(
    rewards: Sequence[Reward],
    completions: Sequence[str],
    problems: Sequence[Problem],
    completion_ids: Sequence[Sequence[int]],
    *,
    stop_on_failure: bool = False,
) -> Scores:
    """Scores `completions[i]`, an answer to `problems[i]`, with every reward, all at the same time.

    Raises `RewardError` where a function of our own cannot score an answer, and with
    `stop_on_failure` where any fails.
    """
    if len(completions) != len(problems):
        raise ValueError(f"{len(completions)} completions for {len(problems)} problems")
    if not completions:
        return Scores({reward.name: [] for reward in rewards}, [])

    def values_of(reward: Reward) -> list:
        return reward.function(completions=list(completions), **fields_of(problems, completion_ids))

    with ThreadPoolExecutor(max_workers=len(rewards)) as threads:
        returned = list(threads.map(values_of, rewards))
    by_name, failures = {}, {}
    for reward, values in zip(rewards, returned, strict=True):
        failures[reward.name] = {i: x for i, x in enumerate(values) if isinstance(x, Failure)}
        by_name[reward.name] = [None if isinstance(x, Failure) else x for x in values]
        _tell(reward, failures[reward.name], completions, problems, stop_on_failure)
    total = [
        math.fsum(reward.weight * (by_name[reward.name][i] or 0.0) for reward in rewards)
        for i in range(len(completions))
    ]
    return Scores(by_name, total, {name: found for name, found in failures.items() if found})


def fields_of(
    problems: Sequence[Problem], completion_ids: Sequence[Sequence[int]]
) -> dict[str, list[Any]]:
    """The columns that every one of `problems` has, and those of our own, as lists."""
    shared = [
        name for name in problems[0].fields if all(name in problem.fields for problem in problems)
    ]
    fields = {name: [problem.fields[name] for problem in problems] for name in shared}
    fields.pop("completions", None)  # the name of the texts themselves
    return fields | {
        "answer": [problem.answer for problem in problems],
        "prompts": [[dict(message) for message in problem.messages] for problem in problems],
        "problems": list(problems),
        "completion_ids": [list(ids) for ids in completion_ids],
    }


def _tell(
    reward: Reward,
    failures: dict[int, Failure],
    completions: Sequence[str],
    problems: Sequence[Problem],
    stop: bool,
) -> None:
    """Raise, or warn of each kind of failure once in a run: the metrics count them."""
    reasons = Counter(failure.reason for failure in failures.values())
    if not (reasons if stop else reasons.keys() - reward.told):
        return
    reward.told.update(reasons)
    first, failure = next(iter(failures.items()))
    words = ", ".join(f"{count} {reason}" for reason, count in reasons.items())
    text = (
        f"reward '{reward.name}' failed for {len(failures)} of {len(completions)} completions "
        f"({words}); the first: {failure.message}, for {_rollout(first, completions, problems)}"
    )
    if stop:
        raise RewardError(text)
    _log.warning("warning: %s", text)


def _rollout(i: int, completions: Sequence[str], problems: Sequence[Problem]) -> str:
    return f"rollout {i} of problem {problems[i].id}, completion {_short(completions[i])}"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
