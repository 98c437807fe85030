"""The reward `choice`: 1.0 where the letter that a completion settles on is the answer's, else 0.0.

Where it says so, that is the letter in its last \\boxed{}, or after its last "answer is" or
"answer:"; else the last one in parentheses; else one that ends the text. A letter within a sentence
is no choice ("A good guess", "I think").
"""

from __future__ import annotations

import re
from typing import Any

from lowmem_grpo.errors import RewardError
from lowmem_grpo.tasks.answers import final_answer

__all__ = ["answer_letter", "choice_reward", "chosen_letter"]

_LETTER = "([A-J])"
# Without parentheses a letter counts where the sentence ends with it: "A" and "I" are words.
_SAYS_SO = re.compile(
    rf"\\boxed\{{\s*(?:\\text\{{)?\(?{_LETTER}\)?\}}?\s*\}}"
    rf"|(?i:answer)[*\s]*(?:(?i:is)\b|:)[\s:*$]*"
    rf"(?:\({_LETTER}\)|{_LETTER}(?=[*$]*(?:[.,;:?)]|\s*\n|\s*\Z)))"
)
_IN_PARENTHESES = re.compile(rf"\({_LETTER}\)")
_ANSWER = re.compile(rf"\(?{_LETTER}\)?[.:]?")
_AT_THE_END = re.compile(rf"(?<![A-Za-z0-9]){_LETTER}[.)*$]*\s*\Z")


def choice_reward(completions: list[str], answer: list[str], **_: Any) -> list[float]:
    """Raises `RewardError` for an answer that is no letter from A to J."""
    wanted = [answer_letter(text) for text in answer]
    for text, letter in zip(answer, wanted, strict=True):
        if letter is None:
            raise RewardError(
                f"reward 'choice': the answer {text!r:.60} is not a letter from A to J"
            )
    return [
        float(chosen_letter(completion) == letter)
        for completion, letter in zip(completions, wanted, strict=True)
    ]


def answer_letter(answer: str) -> str | None:
    """The letter that a reference answer is, or None where it is anything else."""
    match = _ANSWER.fullmatch(final_answer(answer))
    return match.group(1) if match else None


def chosen_letter(text: str) -> str | None:
    """The letter that a text settles on, or None."""
    for pattern in (_SAYS_SO, _IN_PARENTHESES, _AT_THE_END):
        found = pattern.findall(text)
        if found:
            return found[-1] if isinstance(found[-1], str) else "".join(found[-1])
    return None
