"""Group-relative advantages (Shao et al., DeepSeekMath, arXiv 2402.03300, section 4.1.2).

    A_i = (r_i - mean r) / (std r + eps)       over the G rollouts of one problem, std with ddof 1

Scaling "none" leaves the division out (Liu et al., Dr. GRPO, arXiv 2503.20783): it gives groups
that are nearly all right or nearly all wrong more weight than their rewards say. "batch" divides by
the standard deviation of all rewards of the step (arXiv 2508.08221).

With the baseline "leave_one_out" the mean is that of the other rollouts (RLOO, arXiv 2402.14740),
which is unbiased; it makes every difference G / (G - 1) times as large.

A KL penalty may be a part of the reward instead of the loss: r_i - beta sum_t (old_logp_t - ref_t)
for r_i, as in RLOO and PPO before it; there is no gradient through it (`use_kl_in_reward`: the name
is verl's; in TRL it is what its RLOOTrainer does).

With several rewards, sums of them hide what differs: (1, 0) and (0, 1) are the same 1. GDPO (arXiv
2601.05242) normalises each reward within its group, adds up, and normalises over the step:

    A' = sum_f w_f (r_f - mean r_f) / (std r_f + eps)        A = (A' - mean A') / (std A' + eps)

Pure: tensors in, a tensor out. Shapes: F rewards, B problems, G rollouts each.
"""

import torch

__all__ = ["BASELINES", "SCALINGS", "gdpo_advantages", "group_advantages"]

SCALINGS = ("group", "batch", "none")
BASELINES = ("mean", "leave_one_out")
EPS = 1e-4  # TRL's


def group_advantages(
    rewards_BG: torch.Tensor,
    scale_rewards: str = "group",
    baseline: str = "mean",
    eps: float = EPS,
) -> torch.Tensor:
    """Advantages [B, G] of rewards [B, G], in the rewards' floating dtype; G is at least 2.

    A group of equal rewards has advantages of exactly zero. Raises ValueError for another scaling
    or baseline.
    """
    for name, value, known in (
        ("scale_rewards", scale_rewards, SCALINGS),
        ("baseline", baseline, BASELINES),
    ):
        if value not in known:
            raise ValueError(f"{name} is {value!r}, expected one of {known}")
    centred_BG = _centred(rewards_BG)
    if baseline == "leave_one_out":
        size = rewards_BG.shape[1]
        centred_BG = centred_BG * (size / (size - 1))
    if scale_rewards == "none":
        return centred_BG
    if scale_rewards == "batch":
        return centred_BG / (rewards_BG.std() + eps)
    return centred_BG / (rewards_BG.std(1, keepdim=True) + eps)


def gdpo_advantages(
    rewards_FBG: torch.Tensor, weights_F: torch.Tensor, eps: float = EPS
) -> torch.Tensor:
    """Advantages [B, G] of several rewards, each normalised by itself. A group in which every
    reward is equal has advantages of exactly zero.
    """
    each_FBG = torch.stack([group_advantages(rewards_BG, eps=eps) for rewards_BG in rewards_FBG])
    summed_BG = (each_FBG * weights_F[:, None, None]).sum(0)
    flat_B1 = (each_FBG == 0).all(0).all(1, keepdim=True)
    # The mean is zero up to rounding, which is no advantage.
    return (summed_BG - summed_BG.mean()).masked_fill(flat_B1, 0.0) / (summed_BG.std() + eps)


def _centred(rewards_BG: torch.Tensor) -> torch.Tensor:
    centred_BG = rewards_BG - rewards_BG.mean(1, keepdim=True)
    # Equal rewards differ from their mean by rounding (three times 0.1, say), and dividing by std +
    # eps would turn that into an advantage: such a group carries no signal, so it gets none.
    flat_B1 = (rewards_BG == rewards_BG[:, :1]).all(1, keepdim=True)
    return centred_BG.masked_fill(flat_B1, 0.0)
