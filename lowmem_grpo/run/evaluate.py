"""Evaluation on held-out problems: greedy pass@1, strict and lenient, with a 95% interval.

Strict asks for the form that the task asks for; lenient takes any last number. Most of what a short
run gains is form, so both are always reported. The interval is Wilson's score interval (1927),
which stays inside [0, 1].
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from lowmem_grpo.rollout.groups import end_token_ids, prompt_ids
from lowmem_grpo.rollout.sampler import Request, sample
from lowmem_grpo.rollout.sampling import Sampling
from lowmem_grpo.tasks.base import Problem, Task

__all__ = ["Evaluation", "evaluate", "wilson_interval"]


@dataclass(frozen=True)
class Evaluation:
    """Correct answers out of `problems`, and every completion: (problem, text, strict, lenient)."""

    problems: int
    strict: int
    lenient: int
    truncated: int
    completions: list[tuple[Problem, str, bool, bool]]

    def summary(self) -> dict[str, Any]:
        """Accuracies with their intervals, as JSON values."""
        return {
            "problems": self.problems,
            **{
                f"{name}_{key}": value
                for name, correct in (("strict", self.strict), ("lenient", self.lenient))
                for key, value in (
                    ("accuracy", correct / self.problems),
                    ("interval", list(wilson_interval(correct, self.problems))),
                )
            },
            "truncated_fraction": self.truncated / self.problems,
        }

    def line(self) -> str:
        """The summary for a person."""
        parts = []
        for name, correct in (("strict", self.strict), ("lenient", self.lenient)):
            low, high = wilson_interval(correct, self.problems)
            share = correct / self.problems
            parts.append(
                f"{name} {share:.1%} ({correct}/{self.problems}, 95%: {low:.0%} to {high:.0%})"
            )
        return ", ".join(parts)


def evaluate(
    policy,
    task: Task,
    *,
    num_problems: int,
    max_prompt_length: int,
    max_completion_length: int,
    batch_size: int,
    advance: Callable[[int], None] = lambda tokens: None,
) -> Evaluation:
    """Greedy completions of the task's held-out problems, judged by the task; adapters are on."""
    problems = task.eval_problems(num_problems)
    greedy = Sampling(temperature=0.0, max_completion_length=max_completion_length)
    unused = np.zeros(max_completion_length)
    requests = [
        Request(prompt_ids(policy.tokenizer, problem, max_prompt_length), [unused])
        for problem in problems
    ]
    with policy.as_sampler():
        found = sample(
            policy,
            requests,
            greedy,
            end_ids=end_token_ids(policy),
            batch_size=batch_size,
            advance=advance,
        )
    judged = []
    for problem, (completion,) in zip(problems, found, strict=True):
        text = policy.tokenizer.decode(completion.ids, skip_special_tokens=True)
        strict, lenient = (
            task.is_correct_strict(problem, text),
            task.is_correct_lenient(problem, text),
        )
        judged.append((problem, text, strict, lenient))
    return Evaluation(
        problems=len(problems),
        strict=sum(strict for _, _, strict, _ in judged),
        lenient=sum(lenient for _, _, _, lenient in judged),
        truncated=sum(not completion.ended for (completion,) in found),
        completions=judged,
    )


def wilson_interval(correct: int, total: int, z: float = 1.959964) -> tuple[float, float]:
    """The 95% score interval of a proportion."""
    share, spread = correct / total, z * z / total
    centre = (share + spread / 2) / (1 + spread)
    half = z / (1 + spread) * math.sqrt(share * (1 - share) / total + spread / (4 * total))
    # The share itself always belongs; at 0 and 1 rounding would leave it out.
    return max(0.0, min(share, centre - half)), min(1.0, max(share, centre + half))
