"""The reward `choice`: 1.0 where the letter that a completion settles on is the answer's, else 0.0.

`tasks/letters.py` says which letter of a text that is.
"""

from __future__ import annotations

from lowmem_grpo.rewards.answer import AnswerReward
from lowmem_grpo.tasks.answers import chosen_letter

__all__ = ["choice_reward", "chosen_letter"]

choice_reward = AnswerReward("choice", "letter", "not a letter from A to J")
