"""What a step samples: problems' groups of completions, as plain data.

Tokens are lists of ids and numbers are Python floats (log-probs are float32 values held exactly),
so that groups are written to a file and read back without loss.
"""

from dataclasses import dataclass, field
from math import fsum

from lowmem_grpo.tasks.base import Problem

__all__ = ["Group", "Rollout"]


@dataclass
class Rollout:
    """One completion. `logprobs[t]` is log-probability of `completion_ids[t]` under what was
    sampled from.

    `finish_reason`: "stop" (the last token is an end-of-sequence token) or "length". `text`: see
    rollout/text.py. `ref_logprobs`: the reference's, once it has been asked.
    `old_logprobs`: the trainer's, of the policy that sampled, once they are known and asked for.
    `entropies`: of the distributions that the tokens were drawn from, in nat, where they are asked.
    """

    completion_ids: list[int]
    logprobs: list[float]
    finish_reason: str
    text: str
    ref_logprobs: list[float] | None = None
    old_logprobs: list[float] | None = None
    entropies: list[float] | None = None

    @property
    def summed_kl(self) -> float:
        """Of a completion whose reference has been asked: the sum over its tokens of k1, log-prob
        as sampled less the reference's. Its mean is the KL of whole completions, in nat.
        """
        return fsum(self.logprobs) - fsum(self.ref_logprobs)


@dataclass
class Group:
    """A problem, its prompt's ids, its rollouts, and, once scored, their rewards and advantages.

    `rewards_by_name[name][i]` belongs to rollout i, before weighting, and is None where there is no
    score; `rewards` is the weighted sum. `failures[name][reason]`: how many scores failed.
    `dropped[i]`: rollout i takes no part, since a score of it failed.

    Where rewards may have values for steps: `step_ends[i]`, the tokens of rollout i up to the end
    of each step; `step_rewards[i]`, weighted, empty where there are none; `outcomes`, the rewards
    without those; `step_advantages[i]`, for the tokens of each step beside `advantages[i]`.
    """

    problem: Problem
    prompt_ids: list[int]
    rollouts: list[Rollout]
    rewards: list[float] = field(default_factory=list)
    advantages: list[float] = field(default_factory=list)
    rewards_by_name: dict[str, list[float | None]] = field(default_factory=dict)
    failures: dict[str, dict[str, int]] = field(default_factory=dict)
    dropped: list[bool] = field(default_factory=list)
    step_ends: list[list[int]] = field(default_factory=list)
    step_rewards: list[list[float]] = field(default_factory=list)
    outcomes: list[float] = field(default_factory=list)
    step_advantages: list[list[float]] = field(default_factory=list)

    def __post_init__(self):
        self.dropped = self.dropped or [False] * len(self.rollouts)

    @property
    def counted_rewards(self) -> list[float]:
        """The rewards of the rollouts that were not dropped."""
        pairs = zip(self.rewards, self.dropped, strict=True)
        return [reward for reward, gone in pairs if not gone]

    def token_advantages(self, place: int) -> list[float]:
        """Of each token of a rollout."""
        outcome, rollout = self.advantages[place], self.rollouts[place]
        steps = self.step_advantages[place] if self.step_advantages else []
        if not steps:
            return [outcome] * len(rollout.completion_ids)
        ends = self.step_ends[place]
        lengths = [end - start for start, end in zip([0, *ends], ends, strict=False)]
        pairs = zip(steps, lengths, strict=True)
        return [outcome + step for step, length in pairs for _ in range(length)]

    @property
    def has_reference(self) -> bool:
        """Whether the reference has been asked (of rollouts that do not count it is not)."""
        return any(rollout.ref_logprobs is not None for rollout in self.rollouts)
