"""The reward `number`: 1.0 where the last number of the completion equals the answer exactly, else
0.0.

`tasks/answers.py` says what a number looks like. The answer may be a worked solution that ends in
"#### number".
"""

from __future__ import annotations

from fractions import Fraction
from typing import Any

from lowmem_grpo.errors import RewardError
from lowmem_grpo.tasks.answers import final_answer, last_number, parse_number


def number_reward(completions: list[str], answer: list[str], **_: Any) -> list[float]:
    """Raises `RewardError` for an answer that is not a number."""
    wanted = [answer_number(text) for text in answer]
    for text, value in zip(answer, wanted, strict=True):
        if value is None:
            raise RewardError(f"reward 'number': the answer {text!r:.60} is not a number")
    return [
        float(last_number(completion) == value)
        for completion, value in zip(completions, wanted, strict=True)
    ]


def answer_number(answer: str) -> Fraction | None:
    """The number that a reference answer gives, or None where it gives none."""
    return parse_number(final_answer(answer))
