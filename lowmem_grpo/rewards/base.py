"""What a reward is, and how completions are scored with several of them.

    total_i = sum over rewards of weight x value_i

A reward function is `function(completions, **fields) -> list[float]`: the texts of the completions
and, for each column of their problems, a list of the same length. The columns are those that every
problem of the call has, and

    answer          the reference answers, texts
    prompts         the chat messages of each prompt
    problems        the `Problem` objects themselves
    completion_ids  the tokens of each completion, its end token included
    steps           the steps of each completion, texts, where a separator of steps is given

These names hide columns of the same name. Every function gets lists of its own. A value may be
None: this reward does not apply to that completion. It may have failed instead; then there is none
either, and it is counted. What there is none of adds nothing to the total.

Where there is a separator of steps, a value may be a list with one for each step (process
supervision: DeepSeekMath, arXiv 2402.03300, section 4.1.3). Their mean is what is logged and adds
to the total; the advantages are made of them, and of the `outcomes` without them.
"""

from __future__ import annotations

import logging
import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

from lowmem_grpo.errors import RewardError
from lowmem_grpo.isolation.worker import Failure
from lowmem_grpo.rollout.steps import step_texts
from lowmem_grpo.tasks.base import Problem

RewardFunction = Callable[..., list]
"""Returns, for each completion, a float, None, or a `Failure`."""
_log = logging.getLogger(__name__)
_READS_MESSAGES = re.compile(
    r"string indices must be integers|'str' object has no attribute '(get|content|items)'"
)
_FOR_TEXTS = 'completions are texts here: where TRL\'s are messages, write c for c[0]["content"]'
MOST = 1e30
"""Of a weighted value; there is no reason for one, and its square is to be a number."""


@dataclass
class Reward:
    """A reward function with its weight in the total and its name in the log. `here`: it computes
    in this process, and is called in its caller's thread. `told`: the kinds of failure that a
    person has been told of. `asked`: how often it has been called.
    """

    name: str
    weight: float
    function: RewardFunction
    here: bool = False
    told: set[str] = field(default_factory=set, compare=False)
    asked: int = field(default=0, compare=False)


@dataclass(frozen=True)
class Scores:
    """by_name: each reward's values, unweighted, one a completion, None where there is none; total:
    their weighted sum; failures: by name and completion, why there is none. steps: of each
    completion the weighted sum for each step, empty where no reward has values for steps; outcomes:
    the totals without those.
    """

    by_name: dict[str, list[float | None]]
    total: list[float]
    failures: dict[str, dict[int, Failure]] = field(default_factory=dict)
    steps: list[list[float]] = field(default_factory=list)
    outcomes: list[float] = field(default_factory=list)

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
    check_first: bool = False,
    separator: str | None = None,
) -> Scores:
    """Scores `completions[i]`, an answer to `problems[i]`, with every reward, all at the same time.
    `separator`: what ends a step of a completion, if rewards may have values for steps.

    Raises `RewardError` where a function of our own cannot score an answer, with `stop_on_failure`
    where any fails, and with `check_first` where the first call of one brings no value at all.
    """
    if len(completions) != len(problems):
        raise ValueError(f"{len(completions)} completions for {len(problems)} problems")
    if not completions:
        return Scores({reward.name: [] for reward in rewards}, [])

    steps = [step_texts(text, separator) for text in completions] if separator else None

    def values_of(reward: Reward) -> list:
        fields = fields_of(problems, completion_ids)
        if steps is not None:
            fields["steps"] = [list(texts) for texts in steps]
        return reward.function(completions=list(completions), **fields)

    with ThreadPoolExecutor(max_workers=len(rewards)) as threads:
        # What the device does belongs to this thread: modes of torch are a thread's own, and CUDA's
        # libraries keep a workspace for each.
        away = {r.name: threads.submit(values_of, r) for r in rewards if not r.here}
        here = {r.name: values_of(r) for r in rewards if r.here}
        returned = [here[r.name] if r.here else away[r.name].result() for r in rewards]
    by_name, failures = {}, {}
    of_steps: list[list[float]] = [[] for _ in completions]
    outcomes = [0.0] * len(completions)
    for reward, values in zip(rewards, returned, strict=True):
        checked = [
            _of_a_size(_for_steps(x, steps and steps[i]), reward.weight)
            for i, x in enumerate(values)
        ]
        failures[reward.name] = {i: x for i, x in enumerate(checked) if isinstance(x, Failure)}
        by_name[reward.name] = [None if isinstance(x, Failure) else _logged(x) for x in checked]
        if (
            check_first
            and not reward.asked
            and not any(x is not None for x in by_name[reward.name])
        ):
            raise RewardError(without_values(reward.name, checked))
        reward.asked += 1
        _tell(reward, failures[reward.name], completions, problems, stop_on_failure)
        for i, value in enumerate(checked):
            if isinstance(value, list):
                before = of_steps[i] or [0.0] * len(value)
                of_steps[i] = [s + reward.weight * v for s, v in zip(before, value, strict=True)]
            elif isinstance(value, float):
                outcomes[i] += reward.weight * value
    total = [
        math.fsum(reward.weight * (by_name[reward.name][i] or 0.0) for reward in rewards)
        for i in range(len(completions))
    ]
    failures = {name: found for name, found in failures.items() if found}
    return Scores(by_name, total, failures, of_steps, outcomes)


def _for_steps(value: Any, steps: list[str] | None) -> Any:
    """The value, or a failure where it has not one for each step."""
    if not isinstance(value, list):
        return value
    if steps is None:
        words = "it returned a list for a completion, and rewards.step_separator is not set"
    elif len(value) != len(steps):
        words = f"it returned {len(value)} values for {len(steps)} steps of a completion"
    else:
        return value
    return Failure("invalid", words)


def _of_a_size(value: Any, weight: float) -> Any:
    """The value, or a failure where sums and squares of such values would not be finite."""
    numbers = value if isinstance(value, list) else [value] if isinstance(value, float) else []
    for number in numbers:
        if abs(weight * number) > MOST:
            return Failure("invalid", f"{number:.3g}, with its weight, is above {MOST:.0e}")
    return value


def _logged(value: float | list[float] | None) -> float | None:
    return fmean(value) if isinstance(value, list) else value


def fields_of(
    problems: Sequence[Problem], completion_ids: Sequence[Sequence[int]]
) -> dict[str, list[Any]]:
    """The columns that any of `problems` has, with None for those that lack it, and those of our
    own, as lists.
    """
    names = dict.fromkeys(name for problem in problems for name in problem.fields)
    fields = {name: [problem.fields.get(name) for problem in problems] for name in names}
    fields.pop("completions", None)  # the name of the texts themselves
    return fields | {
        "answer": [problem.answer for problem in problems],
        "prompts": [[dict(message) for message in problem.messages] for problem in problems],
        "problems": list(problems),
        "completion_ids": [list(ids) for ids in completion_ids],
    }


def without_values(name: str, values: Sequence[Failure | None]) -> str:
    """What to say of a function that has no value for any completion of the first step."""
    failures = [value for value in values if value is not None]
    count = "the only completion" if len(values) == 1 else f"all {len(values)} completions"
    go_on = "to go on all the same, --set rewards.check_first_step=false"
    if not failures:
        return (
            f"reward '{name}' returned None for {count} of the first step: it has to return a "
            "number for each completion that it is for; where it is for some problems only, "
            f"{go_on}"
        )
    kinds = Counter(failure.message for failure in failures).most_common(2)
    others = "" if len(kinds) == 1 else f" (and others: {kinds[1][0]})"
    message = kinds[0][0]
    hint = f"; {_FOR_TEXTS}" if _READS_MESSAGES.search(message) else ""
    return f"reward '{name}' failed for {count} of the first step: {message}{others}{hint}; {go_on}"


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
