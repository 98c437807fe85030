"""Solved examples before every question: `task.few_shot = N` puts N problems of the training side,
each with a right reply, between the system prompt and the question.

They are the first N training problems of seed 0 that have an answer and different questions, for
every run and every problem, so that held-out problems look the same whatever the seed. One more is
kept for when a problem is among them: no problem is its own example.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

from lowmem_grpo.errors import TaskError
from lowmem_grpo.isolation.worker import Failure
from lowmem_grpo.tasks.base import Problem, Task
from lowmem_grpo.tasks.messages import split_prefilled

EXAMPLE_SEED = 0
# So many training problems for each example are looked at for one that is new.
_LOOKS = 20


class FewShot(Task):
    """`task` with `count` examples before its questions, out of `source`: the same task under
    `EXAMPLE_SEED`. Raises `TaskError` where it has too few of them.
    """

    def __init__(self, task: Task, source: Task, count: int) -> None:
        self.name = task.name
        self.default_rewards = task.default_rewards
        self._task = task
        self._count = count
        self._examples: dict[str, list[dict[str, Any]]] = {}  # the turns, by question
        for index in range(_LOOKS * (count + 1)):
            problem = source.train_problem(index)
            reply = source.reply(problem)
            turns = _without_system(problem)
            if reply:
                asked, beginning = split_prefilled(turns)
                answered = [*asked, {"role": "assistant", "content": beginning + reply}]
                self._examples.setdefault(_key(turns), answered)
            if len(self._examples) > count:
                return
        raise TaskError(
            f"task.few_shot = {count} needs {count + 1} different problems with an answer: "
            f"{self.name} has {len(self._examples)} among its first {_LOOKS * (count + 1)}"
        )

    def train_problem(self, index: int) -> Problem:
        """See `Task`."""
        return self._with_examples(self._task.train_problem(index))

    def eval_problems(self, count: int) -> list[Problem]:
        """See `Task`."""
        return [self._with_examples(problem) for problem in self._task.eval_problems(count)]

    def leaving_out(self, stays: Callable[[Problem], bool]) -> Task:
        """See `Task`: this one. Examples are part of what is looked at, and are never left out."""
        self._task = self._task.leaving_out(lambda problem: stays(self._with_examples(problem)))
        return self

    def left_out(self) -> str:
        """See the task's own."""
        return self._task.left_out()

    def is_correct_strict(self, problem: Problem, text: str) -> bool:
        """See the task's own."""
        return self._task.is_correct_strict(problem, text)

    def is_correct_lenient(self, problem: Problem, text: str) -> bool:
        """See the task's own."""
        return self._task.is_correct_lenient(problem, text)

    def score(self, problem: Problem, text: str) -> float | Failure:
        """See the task's own."""
        return self._task.score(problem, text)

    def reply(self, problem: Problem) -> str:
        """See the task's own."""
        return self._task.reply(problem)

    def explain(self, problem: Problem, text: str) -> str:
        """See the task's own."""
        return self._task.explain(problem, text)

    def about_answers(self) -> str:
        """See the task's own."""
        return self._task.about_answers()

    def known_answers(self) -> Iterable[tuple[str, str | list[str]]]:
        """See the task's own."""
        return self._task.known_answers()

    def _with_examples(self, problem: Problem) -> Problem:
        question = _without_system(problem)
        own = _key(question)
        others = [turns for key, turns in self._examples.items() if key != own][: self._count]
        system = problem.messages[: len(problem.messages) - len(question)]
        turns = [dict(turn) for example in others for turn in example]
        return replace(problem, messages=(*system, *turns, *question))


def _without_system(problem: Problem) -> list[dict[str, Any]]:
    first, *rest = problem.messages
    return rest if first["role"] == "system" else [first, *rest]


def _key(turns: list[dict[str, Any]]) -> str:
    return json.dumps(turns, sort_keys=True)
