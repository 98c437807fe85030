"""A reward that compares answers of one kind: 1.0 where the answer that a completion gives is the
wanted one, else 0.0.

`tasks/reading.py` says where in a completion its answer stands, and `tasks/answers.py` when two
answers are the same.
"""

from __future__ import annotations

from typing import Any

from lowmem_grpo.errors import RewardError
from lowmem_grpo.tasks.answers import Answer, Kind, accepted, explained, judge, kind_of
from lowmem_grpo.tasks.base import Problem

__all__ = ["AnswerReward"]


class AnswerReward:
    """The reward function `name`, for answers of that kind. `no`: what other ones are not."""

    def __init__(self, name: str, kind: Kind, no: str) -> None:
        self.name, self._kind, self._no = name, kind, no

    def __call__(self, completions: list[str], answer: list[Answer], **_: Any) -> list[float]:
        """Raises `RewardError` for an answer of another kind."""
        for wanted in answer:
            if not self.reads(wanted):
                raise RewardError(f"reward '{self.name}': the answer {wanted!r:.60} is {self._no}")
        return [
            float(judge(completion, wanted).right)
            for completion, wanted in zip(completions, answer, strict=True)
        ]

    def reads(self, answer: Answer) -> bool:
        """Whether it can compare a reference answer."""
        return all(kind_of(each) == self._kind for each in accepted(answer))

    def explain(self, completion: str, problem: Problem) -> str:
        """What was read out of a completion and what was wanted, in one line."""
        return explained(judge(completion, problem.answer), problem.answer)
