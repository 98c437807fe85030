"""What a reward is, and how completions are scored with several of them.

    total_i = sum over rewards of weight x value_i

A reward function is `function(completions, **fields) -> list[float]`: the texts of the completions
and, for each column of their problems, a list of the same length. The columns are those that every
problem of the call has, and

    answer          the reference answers, texts
    prompts         the chat messages of each prompt
    problems        the `Problem` objects themselves
    completion_ids  the tokens of each completion, its end token included

These names hide columns of the same name. Every function gets lists of its own. A function
that fails stops the scoring: a wrong reward is worse than none.
"""

from __future__ import annotations

import math
import numbers
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowmem_grpo.errors import RewardError
from lowmem_grpo.tasks.base import Problem

RewardFunction = Callable[..., list[float]]


@dataclass(frozen=True)
class Reward:
    """A reward function with its weight in the total and its name in the log."""

    name: str
    weight: float
    function: RewardFunction


@dataclass(frozen=True)
class Scores:
    """by_name: each reward's values, unweighted, one a completion; total: their weighted sum."""

    by_name: dict[str, list[float]]
    total: list[float]


def score(
    rewards: Sequence[Reward],
    completions: Sequence[str],
    problems: Sequence[Problem],
    completion_ids: Sequence[Sequence[int]],
) -> Scores:
    """Scores `completions[i]`, an answer to `problems[i]`, with every reward.

    Raises `RewardError` where a function raises, returns anything but one finite real number for
    each completion, or calls `exit()`.
    """
    if len(completions) != len(problems):
        raise ValueError(f"{len(completions)} completions for {len(problems)} problems")
    if not completions:
        return Scores({reward.name: [] for reward in rewards}, [])
    by_name = {}
    for reward in rewards:
        returned = _call(reward, completions, fields_of(problems, completion_ids), problems)
        by_name[reward.name] = _checked(reward.name, returned, completions, problems)
    total = [
        sum(reward.weight * by_name[reward.name][i] for reward in rewards)
        for i in range(len(completions))
    ]
    return Scores(by_name, total)


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


def _call(
    reward: Reward,
    completions: Sequence[str],
    fields: dict[str, list[Any]],
    problems: Sequence[Problem],
) -> Any:
    try:
        return reward.function(completions=list(completions), **fields)
    except RewardError:
        raise
    except (Exception, SystemExit) as error:  # exit() in a reward must not end the run unsaved
        frame = traceback.extract_tb(error.__traceback__)[-1]
        raise RewardError(
            f"reward '{reward.name}' raised {type(error).__name__}: {error} "
            f"({Path(frame.filename).name}, line {frame.lineno}), scoring "
            f"{len(completions)} completions; the first: {_rollout(0, completions, problems)}"
        ) from error


def _checked(
    name: str, returned: Any, completions: Sequence[str], problems: Sequence[Problem]
) -> list[float]:
    # Arrays and tensors turn themselves into lists of plain numbers; no package is needed to ask.
    values = returned.tolist() if hasattr(returned, "tolist") else returned
    if not isinstance(values, (list, tuple)):
        raise RewardError(
            f"reward '{name}' returned {_short(returned)} ({type(returned).__name__}), "
            "not a list of numbers"
        )
    if len(values) != len(completions):
        raise RewardError(
            f"reward '{name}' returned {len(values)} values for {len(completions)} completions: "
            "it must return one for each"
        )
    for i, value in enumerate(values):
        value = value.item() if hasattr(value, "item") else value
        if not isinstance(value, numbers.Real) or not math.isfinite(value):
            raise RewardError(
                f"reward '{name}' returned {_short(value)} ({type(value).__name__}), "
                f"not a finite number, for {_rollout(i, completions, problems)}"
            )
    return [float(value) for value in values]


def _rollout(i: int, completions: Sequence[str], problems: Sequence[Problem]) -> str:
    return f"rollout {i} of problem {problems[i].id}, completion {_short(completions[i])}"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
