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

Process supervision (section 4.1.3) has a reward for each step of a completion. All of a group's are
normalised together, and a token's advantage is the sum of those of its step and the later ones:

    A_i,t = sum over steps j that end at or after t of (r_ij - mean R) / (std R + eps)

A reward of NaN is none: that rollout does not count, and has an advantage of 0.

Pure: tensors in, a tensor out. Shapes: F rewards, B problems, G rollouts each, S steps.
"""

import torch

__all__ = ["BASELINES", "SCALINGS", "gdpo_advantages", "group_advantages", "step_advantages"]

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

    A group of equal rewards, or of one alone, has advantages of exactly zero. Raises ValueError for
    another scaling or baseline.
    """
    for name, value, known in (
        ("scale_rewards", scale_rewards, SCALINGS),
        ("baseline", baseline, BASELINES),
    ):
        if value not in known:
            raise ValueError(f"{name} is {value!r}, expected one of {known}")
    there_BG = ~rewards_BG.isnan()
    count_B1 = there_BG.sum(1, keepdim=True, dtype=rewards_BG.dtype)
    centred_BG = _centred(rewards_BG, there_BG)
    if scale_rewards == "none":
        scale = 1.0
    elif scale_rewards == "batch":
        scale = _std(rewards_BG[there_BG]) + eps
    else:
        scale = (
            centred_BG.square().sum(1, keepdim=True) / (count_B1 - 1).clamp(min=1)
        ).sqrt() + eps
    if baseline == "leave_one_out":
        centred_BG = centred_BG * (count_B1 / (count_B1 - 1).clamp(min=1))
    return centred_BG / scale


def gdpo_advantages(
    rewards_FBG: torch.Tensor, weights_F: torch.Tensor, eps: float = EPS
) -> torch.Tensor:
    """Advantages [B, G] of several rewards, each normalised by itself. A group in which every
    reward is equal has advantages of exactly zero.
    """
    each_FBG = torch.stack([group_advantages(rewards_BG, eps=eps) for rewards_BG in rewards_FBG])
    summed_BG = (each_FBG * weights_F[:, None, None]).sum(0)
    there_BG = ~rewards_FBG.isnan().all(0)
    nothing_BG = (each_FBG == 0).all(0).all(1, keepdim=True) | ~there_BG
    # The mean is zero up to rounding, which is no advantage.
    of_all = summed_BG[there_BG]
    return (summed_BG - of_all.mean()).masked_fill(nothing_BG, 0.0) / (_std(of_all) + eps)


def step_advantages(rewards_GS: torch.Tensor, eps: float = EPS) -> torch.Tensor:
    """Advantages [G, S] of the tokens of each step, of one group's rewards [G, S] for steps; NaN
    where a rollout has fewer, or does not count, and 0 there.
    """
    flat_1N = rewards_GS.reshape(1, -1)
    if not flat_1N.numel():
        return rewards_GS
    each_GS = group_advantages(flat_1N, eps=eps).view_as(rewards_GS)
    later_GS = each_GS.flip(1).cumsum(1).flip(1)
    return later_GS.masked_fill(rewards_GS.isnan(), 0.0)


def _centred(rewards_BG: torch.Tensor, there_BG: torch.Tensor) -> torch.Tensor:
    centred_BG = rewards_BG - rewards_BG.nanmean(1, keepdim=True)
    # Equal rewards differ from their mean by rounding (three times 0.1, say), and dividing by std +
    # eps would turn that into an advantage: such a group carries no signal, so it gets none.
    first_B1 = rewards_BG.gather(1, there_BG.int().argmax(1, keepdim=True))
    flat_B1 = ((rewards_BG == first_B1) | ~there_BG).all(1, keepdim=True)
    return centred_BG.masked_fill(flat_B1 | ~there_BG, 0.0)


def _std(rewards: torch.Tensor) -> torch.Tensor:
    return rewards.std() if rewards.numel() > 1 else rewards.new_zeros(())
