"""The GRPO objective over scored tokens (DeepSeekMath, arXiv 2402.03300, eq. 3) and its variants.

    rho       = exp(logp - old_logp)
    surrogate = min(rho A, clip(rho, 1 - epsilon, 1 + epsilon_high) A)
    k3        = exp(ref - logp) - (ref - logp) - 1      unbiased, never negative (Schulman, 2020)
    loss      = sum_t w_t (-surrogate_t + beta k3_t)

The weights w_t carry the averaging, and they belong to the step: whatever micro-batches it is cut
into, the losses add up to the step's loss. With R rollouts of C_i tokens in the step:

    grpo      w = 1 / (R C_i)          within each completion, then over completions (DeepSeekMath)
    dapo      w = 1 / sum_i C_i        over all tokens (DAPO, arXiv 2503.14476; and epsilon_high)
    dr_grpo   w = 1 / (R L)            L the longest completion allowed (arXiv 2503.20783)

Pure: tensors in, (loss, stats) out. Shapes: N scored tokens, R rollouts.
"""

from dataclasses import dataclass

import torch

__all__ = ["LOSS_TYPES", "ObjectiveInputs", "k3", "objective", "rollout_weights"]

LOSS_TYPES = ("grpo", "dapo", "dr_grpo")


@dataclass(frozen=True)
class ObjectiveInputs:
    """Per scored token, float32 [N]: `logprobs` (with gradient), `old_logprobs`, `advantages`,
    `weights`, and `ref_logprobs`, which may be None where beta is 0."""

    logprobs_N: torch.Tensor
    old_logprobs_N: torch.Tensor
    advantages_N: torch.Tensor
    weights_N: torch.Tensor
    ref_logprobs_N: torch.Tensor | None = None


def objective(
    inputs: ObjectiveInputs, *, epsilon: float, epsilon_high: float, beta: float
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The loss (a float32 scalar) and detached sums over tokens.

    Stats: `tokens`; `kl` (k3 against the reference, if given); `clip_low`, `clip_high` (tokens
    whose ratio lies outside the clip range on the side where that stops the gradient); `sampler_kl`
    (k3 of old against current log-probs).
    Raises ValueError when beta is not 0 and there are no reference log-probs.
    """
    if beta and inputs.ref_logprobs_N is None:
        raise ValueError(f"beta is {beta} but there are no reference log-probs")
    log_ratio_N = inputs.logprobs_N - inputs.old_logprobs_N
    ratio_N = log_ratio_N.exp()
    clipped_N = ratio_N.clamp(1.0 - epsilon, 1.0 + epsilon_high)
    advantages_N = inputs.advantages_N
    loss_N = -torch.minimum(ratio_N * advantages_N, clipped_N * advantages_N)
    stats = {}
    if inputs.ref_logprobs_N is not None:
        kl_N = k3(inputs.logprobs_N, inputs.ref_logprobs_N)
        if beta:
            loss_N = loss_N + beta * kl_N
        stats["kl"] = kl_N.detach().sum()
    with torch.no_grad():
        stats["tokens"] = torch.tensor(float(ratio_N.numel()), device=ratio_N.device)
        stats["clip_low"] = ((ratio_N < 1.0 - epsilon) & (advantages_N < 0)).float().sum()
        stats["clip_high"] = ((ratio_N > 1.0 + epsilon_high) & (advantages_N > 0)).float().sum()
        stats["sampler_kl"] = k3(inputs.old_logprobs_N, inputs.logprobs_N).sum()
    return (loss_N * inputs.weights_N).sum(), stats


def k3(logprobs_N: torch.Tensor, other_N: torch.Tensor) -> torch.Tensor:
    """Schulman's k3 estimate of KL(p || q) over tokens of p: `logprobs` are p's, `other` q's."""
    difference_N = other_N - logprobs_N
    # expm1: near zero exp(d) - 1 would lose all its digits, and d^2 / 2 is what is wanted.
    return difference_N.expm1() - difference_N


def rollout_weights(
    completion_lengths: list[int], loss_type: str, max_completion_length: int
) -> list[float]:
    """The weight w of every token of each rollout of a step. Raises ValueError for another type."""
    rollouts = len(completion_lengths)
    if loss_type == "grpo":
        return [1.0 / (rollouts * max(length, 1)) for length in completion_lengths]
    if loss_type == "dapo":
        return [1.0 / max(sum(completion_lengths), 1)] * rollouts
    if loss_type == "dr_grpo":
        return [1.0 / (rollouts * max_completion_length)] * rollouts
    raise ValueError(f"loss_type is {loss_type!r}, expected one of {LOSS_TYPES}")
