"""Groups of made-up rollouts, every number of which can be told from every other."""

import torch

from lowmem_grpo.rollout.types import Group, Rollout
from lowmem_grpo.tasks.base import Problem

__all__ = ["make_groups"]


def make_groups(shape, *, vocab=50, seed=0, reference=False):
    """Scored groups of random tokens; `shape`: [(prompt tokens, [completion tokens, ...]), ...].

    Log-probs are those of nothing in particular, and no two numbers are equal.
    """
    generator = torch.Generator().manual_seed(seed)

    def numbers(count, low, high):
        return (low + (high - low) * torch.rand(count, generator=generator)).tolist()

    def tokens(count):
        return torch.randint(0, vocab, (count,), generator=generator).tolist()

    groups = []
    for place, (prompt, completions) in enumerate(shape):
        problem = Problem(f"made-up/{place}", ({"role": "user", "content": "?"},), "")
        rollouts = [
            Rollout(
                completion_ids=tokens(length),
                logprobs=numbers(length, -4.0, -0.1),
                finish_reason="length",
                text="",
                ref_logprobs=numbers(length, -4.0, -0.1) if reference else None,
            )
            for length in completions
        ]
        groups.append(
            Group(
                problem,
                tokens(prompt),
                rollouts,
                rewards=numbers(len(completions), 0.0, 1.0),
                advantages=numbers(len(completions), -1.0, 1.0),
            )
        )
    return groups
