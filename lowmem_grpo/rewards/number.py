"""The reward `number`: 1.0 where the number that the completion gives as its answer equals the
wanted one exactly, else 0.0.

`tasks/reading.py` says which number of a text that is, and `tasks/numbers.py` how a number may be
spelt. The answer may be a worked solution that ends in "#### number".
"""

from __future__ import annotations

from lowmem_grpo.rewards.answer import AnswerReward

number_reward = AnswerReward("number", "number", "not a number")
