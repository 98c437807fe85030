"""Several tasks as one: `2*arithmetic:digits=2 + reasoning_gym:leg_counting`, specifications with
" + " between them and weights before a `*` where they are not 1.

Which task an index belongs to depends on the index alone. The tasks take turns in a fixed cycle, as
evenly as their weights allow: with weights 2 and 1, two of any three problems in a row are the
first one's. Every task is read in its own order, so the k-th problem that a mixture takes of a task
is the k-th that the task has under the same seed. Held-out problems take the same turns, and the
others go on where a task has no more.

Each task judges its own problems, which name it in the field `mixture_task`. What is held out
depends on the content: a problem that one task holds out is not trained on through another of the
same kind.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from fractions import Fraction

from lowmem_grpo.errors import TaskError
from lowmem_grpo.isolation.worker import Failure
from lowmem_grpo.tasks.base import Problem, Task

FIELD = "mixture_task"
_PLUS = re.compile(r"\s\+\s")
_WEIGHT = re.compile(r"\s*([0-9.]+)\s*\*\s*(.*)", re.DOTALL)
# Turns in a cycle: weights of three digits that add up to 1 or to 100 take no more.
_LONGEST_CYCLE = 10_000


def split_mixture(spec: str) -> list[tuple[int, str]]:
    """(weight, specification) of each task in `spec`, the weights as the smallest whole numbers in
    their proportion. Raises `TaskError` for weights that are not positive or too fine, and for a
    task that is given twice.
    """
    weights: list[Fraction] = []
    specs: list[str] = []
    for part in _PLUS.split(spec):
        match = _WEIGHT.fullmatch(part)
        weights.append(_weight(match[1]) if match else Fraction(1))
        specs.append((match[2] if match else part).strip())
        if specs[-1] in specs[:-1]:
            raise TaskError(f"task '{specs[-1]}' is given twice: give it once, as 2*{specs[-1]}")
    scale = math.lcm(*(weight.denominator for weight in weights))
    whole = [int(weight * scale) for weight in weights]
    divisor = math.gcd(*whole)
    whole = [weight // divisor for weight in whole]
    if sum(whole) > _LONGEST_CYCLE:
        raise TaskError(
            f"the weights of '{spec}' are {' : '.join(map(str, whole))} in whole numbers: "
            f"use ones that add up to {_LONGEST_CYCLE} at most"
        )
    return list(zip(whole, specs, strict=True))


class Mixture(Task):
    """See the module. `parts` are (weight, task), with different names."""

    default_rewards = ("task",)

    def __init__(self, parts: Sequence[tuple[int, Task]]) -> None:
        self._weights = [weight for weight, _ in parts]
        self._tasks = [task for _, task in parts]
        self._by_name = {task.name: task for task in self._tasks}
        self.name = " + ".join(
            task.name if weight == 1 else f"{weight}*{task.name}" for weight, task in parts
        )
        # The k-th turn of a task of weight w is due at (k + 1/2) / w of the cycle.
        due = [
            (Fraction(2 * turn + 1, 2 * weight), part)
            for part, weight in enumerate(self._weights)
            for turn in range(weight)
        ]
        self._cycle = [part for _, part in sorted(due)]
        # How many turns of its task come before each turn of the cycle.
        seen: Counter[int] = Counter()
        self._turns_before = []
        for part in self._cycle:
            self._turns_before.append(seen[part])
            seen[part] += 1

    def train_problem(self, index: int) -> Problem:
        """See `Task`."""
        part, position = self._turn(index)
        return self._marked(part, self._tasks[part].train_problem(position))

    def eval_problems(self, count: int) -> list[Problem]:
        """See `Task`. Each task's share is that of its weight."""
        turns = count
        while True:
            problems, exhausted = self._held_out(turns)
            if len(problems) >= count or exhausted:
                return problems[:count]
            turns *= 2

    def leaving_out(self, stays: Callable[[Problem], bool]) -> Task:
        """See `Task`. Of each task by itself, so that their weights stay what they are."""
        parts = [task.leaving_out(stays) for task in self._tasks]
        return Mixture(list(zip(self._weights, parts, strict=True)))

    def left_out(self) -> str:
        """See `Task`: of each task."""
        each = [(task.name, task.left_out()) for task in self._tasks]
        return ", ".join(f"{name}: {text}" for name, text in each if text)

    def is_correct_strict(self, problem: Problem, text: str) -> bool:
        """As its own task says."""
        return self._task(problem).is_correct_strict(problem, text)

    def is_correct_lenient(self, problem: Problem, text: str) -> bool:
        """As its own task says."""
        return self._task(problem).is_correct_lenient(problem, text)

    def score(self, problem: Problem, text: str) -> float | Failure:
        """As its own task says."""
        return self._task(problem).score(problem, text)

    def reply(self, problem: Problem) -> str:
        """As its own task says."""
        return self._task(problem).reply(problem)

    def explain(self, problem: Problem, text: str) -> str:
        """As its own task says."""
        return self._task(problem).explain(problem, text)

    def about_answers(self) -> str:
        """See `Task`: of all tasks."""
        each = [(task.name, task.about_answers()) for task in self._tasks]
        return "; ".join(f"{name}: {text}" for name, text in each if text)

    def known_answers(self) -> Iterable[tuple[str, str | list[str]]]:
        """See `Task`: of all tasks."""
        for task in self._tasks:
            yield from task.known_answers()

    def _turn(self, index: int) -> tuple[int, int]:
        """Which task has the turn `index`, and how many turns it had before."""
        cycle, place = divmod(index, len(self._cycle))
        part = self._cycle[place]
        return part, cycle * self._weights[part] + self._turns_before[place]

    def _held_out(self, turns: int) -> tuple[list[Problem], bool]:
        """What `turns` turns bring, and whether no task has more than they took."""
        order = [self._turn(index) for index in range(turns)]
        asked = Counter(part for part, _ in order)
        given = [task.eval_problems(asked[part]) for part, task in enumerate(self._tasks)]
        problems: dict[str, Problem] = {}  # by prompt: two tasks may hold out the same one
        for part, position in order:
            if position < len(given[part]):
                problem = self._marked(part, given[part][position])
                problems.setdefault(json.dumps(problem.messages, sort_keys=True), problem)
        exhausted = all(len(given[part]) < asked[part] for part in range(len(given)))
        return list(problems.values()), exhausted

    def _marked(self, part: int, problem: Problem) -> Problem:
        # Two tasks of one kind may give the same id to different problems.
        return replace(
            problem,
            id=f"{part + 1}:{problem.id}",
            fields={**problem.fields, FIELD: self._tasks[part].name},
        )

    def _task(self, problem: Problem) -> Task:
        return self._by_name[problem.fields[FIELD]]


def _weight(text: str) -> Fraction:
    try:
        weight = Fraction(text)
    except ValueError:
        weight = Fraction(0)
    if weight <= 0:
        raise TaskError(f"the weight {text} of a task: use a number above 0, like 2 or 0.5")
    return weight
