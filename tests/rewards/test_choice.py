"""The reward `choice`: which letter a text settles on, and which letters are words."""

from __future__ import annotations

import pytest

from lowmem_grpo.errors import RewardError
from lowmem_grpo.rewards.choice import choice_reward, chosen_letter


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("B", "B"),
        (" C.\n", "C"),
        ("(D)", "D"),
        ("The answer is B.", "B"),
        ("**Answer:** C", "C"),
        ("answer: (A) because B is wrong", "A"),
        ("The answer is A? No. The answer is C", "C"),
        (r"So \boxed{D}.", "D"),
        (r"So \boxed{\text{(E)}}", "E"),
        (r"(A) is out, so \boxed{B}, not (C)", "B"),
        ("(A) cannot be, it is (C), as I said", "C"),
        ("I choose option D", "D"),
        ("Answer: I think it is (C).", "C"),
        ("Answer A is wrong, so it must be (C).", "C"),
        ("The answer is A bit subtle; it is (C)", "C"),
        ("**Answer**: B\n\nBecause (A) is wrong", "B"),
        ("The answer is **D**.", "D"),
        ("A good guess", None),
        ("I think", None),
        ("The answer is Apple", None),
        ("answer is I'm not sure", None),
        ("plan9B", None),
        ("", None),
        ("b", None),
    ],
)
def test_letters(text, letter):
    assert chosen_letter(text) == letter


def test_scores():
    completions = ["It is B", "(B)", "B or C", "no"]
    assert choice_reward(completions, ["B", "(B)", "B", "B"]) == [1.0, 1.0, 0.0, 0.0]


def test_an_answer_that_is_no_letter_stops():
    for answer in ("Paris", "Vitamin C", "b", "K"):
        with pytest.raises(RewardError, match=f"'{answer}' is not a letter from A to J"):
            choice_reward(["B"], [answer])
