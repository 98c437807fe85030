"""Group-relative advantages (Shao et al., DeepSeekMath, arXiv 2402.03300, section 4.1.2).

    A_i = (r_i - mean r) / (std r + eps)       over the G rollouts of one problem, std with ddof 1

Without scaling (Liu et al., Dr. GRPO, arXiv 2503.20783) the division is left out: it gives groups
that are nearly all right or nearly all wrong more weight than their rewards say. Pure: a tensor in,
a tensor out.

Shapes: B problems, G rollouts each.
"""

import torch

__all__ = ["SCALINGS", "group_advantages"]

SCALINGS = ("group", "none")


def group_advantages(
    rewards_BG: torch.Tensor, scale_rewards: str = "group", eps: float = 1e-4
) -> torch.Tensor:
    """Advantages [B, G] of rewards [B, G], in the rewards' floating dtype; G is at least 2.

    A group of equal rewards has advantages of exactly zero. `eps` is TRL's. Raises ValueError for
    another scaling.
    """
    if scale_rewards not in SCALINGS:
        raise ValueError(f"scale_rewards is {scale_rewards!r}, expected one of {SCALINGS}")
    centred_BG = rewards_BG - rewards_BG.mean(1, keepdim=True)
    # Equal rewards differ from their mean by rounding (three times 0.1, say), and dividing by std +
    # eps would turn that into an advantage: such a group carries no signal, so it gets none.
    flat_B1 = (rewards_BG == rewards_BG[:, :1]).all(1, keepdim=True)
    centred_BG = centred_BG.masked_fill(flat_B1, 0.0)
    if scale_rewards == "none":
        return centred_BG
    return centred_BG / (rewards_BG.std(1, keepdim=True) + eps)
