"""The objectives as their papers write them: one rollout after another, one token after another."""

import math

import torch

__all__ = ["naive_average", "naive_row"]


def naive_row(new, old, ref, advantage, o, kept=None):
    """(losses, clipped below, clipped above) of one rollout; `new` [C] has a graph. `ref`:
    log-probs, but divergences where these are exact. `o`: an `Objective`, of which only the
    settings are read. `kept`: whether each token has a surrogate.
    """
    count, losses, low, high = len(new), [], 0, 0
    of_rollout = torch.exp((new - old).sum() / count)
    apart = sum((old - new).tolist()) / count
    dropped = (
        o.off_policy_mask_threshold is not None
        and advantage < 0
        and apart > o.off_policy_mask_threshold
    )
    for t in range(count):
        rho = (
            of_rollout if o.importance_sampling_level == "sequence" else torch.exp(new[t] - old[t])
        )
        if o.loss_type == "cispo":
            surrogate = min(rho.item(), o.epsilon_high) * advantage * new[t]
            high += rho.item() > o.epsilon_high and advantage > 0
        elif o.loss_type == "sapo":
            tau = o.sapo_temperature_pos if advantage > 0 else o.sapo_temperature_neg
            surrogate = 4 / tau / (1 + torch.exp(-tau * (rho - 1))) * advantage
        elif o.loss_type == "vespo":
            whole = math.exp(sum((new - old).tolist()))
            k = o.vespo_k_pos if advantage >= 0 else o.vespo_k_neg
            decay = o.vespo_lambda_pos if advantage >= 0 else o.vespo_lambda_neg
            phi = math.exp(decay) * whole**k * math.exp(-decay * whole)
            surrogate = phi * advantage * new[t]
        else:
            clipped = torch.clamp(rho, 1 - o.epsilon, 1 + o.epsilon_high)
            bounded = rho if o.delta is None or rho.item() <= o.delta else rho.new_tensor(o.delta)
            surrogate = torch.min(bounded * advantage, clipped * advantage)
            low += rho.item() < 1 - o.epsilon and advantage < 0
            high += rho.item() > 1 + o.epsilon_high and advantage > 0
        loss = 0.0 * new[t] if dropped or (kept and not kept[t]) else -surrogate
        if o.beta:
            r = ref[t] - new[t]
            estimates = {"k1": -r, "k2": r * r / 2, "k3": torch.exp(r) - r - 1, "exact": ref[t]}
            divergence = estimates[o.kl_estimator]
            loss = loss + o.beta * (divergence * rho if o.use_bias_correction_kl else divergence)
        losses.append(loss)
    return torch.stack(losses), low, high


def naive_average(rows, loss_type, longest):
    """The step's loss of the losses of each rollout's tokens."""
    if loss_type in ("grpo", "sapo"):
        return torch.stack([row.mean() for row in rows]).mean()
    total = torch.cat(rows).sum()
    if loss_type == "luspo":
        return total / len(rows)
    if loss_type == "dr_grpo":
        return total / (len(rows) * longest)
    return total / sum(map(len, rows))
