"""A generated task without some of its problems, in whose place others stand.

Which problem an index has still depends on (task seed, index) alone: where the one at the index is
left out, it is the first that stays of a fixed series of indices far beyond any run's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from lowmem_grpo.errors import TaskError
from lowmem_grpo.isolation.worker import Failure
from lowmem_grpo.tasks.base import Problem, Task

_LOOKS = 100
_FAR = 2**40  # indices between two of a series


class Replacing(Task):
    """`task` with those of its problems that `stays` is true of."""

    def __init__(self, task: Task, stays: Callable[[Problem], bool]) -> None:
        self.name, self.default_rewards = task.name, task.default_rewards
        self._task, self._stays = task, stays
        self._trained: dict[int, int] = {}  # by index, how many were left out
        self._held_out = (0, 0)

    def train_problem(self, index: int) -> Problem:
        """See `Task`. Raises `TaskError` where none of a hundred stays."""
        for look in range(_LOOKS):
            problem = self._task.train_problem(index + look * _FAR)
            if self._stays(problem):
                self._trained[index] = look
                return problem
        raise TaskError(
            f"{self.name}: none of {_LOOKS} training problems has a prompt that is short enough: "
            "use a larger --max-prompt-length"
        )

    def eval_problems(self, count: int) -> list[Problem]:
        """See `Task`."""
        asked = count
        while True:
            problems = self._task.eval_problems(asked)
            kept = [problem for problem in problems if self._stays(problem)]
            if len(kept) >= count or len(problems) < asked or asked >= _LOOKS * count:
                self._held_out = (len(problems) - len(kept), len(problems))
                return kept[:count]
            asked *= 2

    def left_out(self) -> str:
        """See `Task`: of the problems that were asked for so far."""
        trained = sum(self._trained.values())
        return (
            f"{trained} of {trained + len(self._trained)} training problems that were looked at "
            f"and {self._held_out[0]} of {self._held_out[1]} held-out ones"
        )

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
