"""Policies for tests, the tiny model with adapters that do something, and the naive update.

The twin knows rows: each completion behind its own copy of the prompt, through the model's own
eager attention, full log-softmax, and the loss as the papers write it.
"""

import torch

from lowmem_grpo.grpo.packing import pack
from lowmem_grpo.policy.base import AdapterSettings
from lowmem_grpo.policy.load import load_policy
from tests.grpo.naive import naive_average, naive_row

__all__ = [
    "gradients",
    "make_off_policy",
    "move_adapters",
    "naive_divergence",
    "naive_logprobs",
    "naive_loss",
    "open_policy",
    "plain_forward",
    "relative_error",
]


def open_policy(
    directory,
    *,
    dtype=torch.float32,
    r=4,
    tile_tokens=7,
    tile_vocab=19,
    target_modules="all-linear",
    attention="sdpa",
    **how,
):
    """The model of `directory` on the CPU, with adapters away from their start (where B is zero).

    The tiles are small and fit nothing evenly.
    """
    policy = load_policy(
        str(directory),
        device="cpu",
        dtype=dtype,
        attention=attention,
        adapters=AdapterSettings(r=r, lora_alpha=2 * r, target_modules=target_modules),
        seed=0,
        tile_tokens=tile_tokens,
        tile_vocab=tile_vocab,
        **how,
    )
    move_adapters(policy, 0.1)
    return policy


def move_adapters(policy, scale, seed=1):
    """Give every adapter weight a random value."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in policy.adapter_parameters().values():
            parameter.normal_(0.0, scale, generator=generator)


def gradients(policy):
    """All adapters' gradients as one vector; they are then cleared."""
    parameters = policy.adapter_parameters().values()
    found = torch.cat([p.grad.flatten() for p in parameters])
    for parameter in parameters:
        parameter.grad = None
    return found


def relative_error(found, expected):
    return ((found - expected).norm() / expected.norm()).item()


def plain_forward(policy, ids):
    """Logits [tokens, V] of one row by the model's own eager attention: no cache, no packing."""
    attention = policy.causal_lm.config._attn_implementation
    policy.causal_lm.set_attn_implementation("eager")
    try:
        return policy.causal_lm(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
    finally:
        policy.causal_lm.set_attn_implementation(attention)


def naive_logprobs(policy, prompt, completion, *, temperature=1.0, end_ids=(), minimum=0):
    """Log-probs and entropies [C] of a completion, in the policy's current role."""
    logits = plain_forward(policy, prompt + completion)[len(prompt) - 1 : -1] / temperature
    forbidden = torch.zeros_like(logits, dtype=torch.bool)
    forbidden[:minimum, list(end_ids)] = True
    logp = logits.masked_fill(forbidden, -torch.inf).log_softmax(-1)
    entropy = -(logp.exp() * logp.masked_fill(forbidden, 0.0)).sum(-1)
    return logp.gather(1, torch.tensor(completion)[:, None])[:, 0], entropy


def naive_divergence(policy, prompt, completion, *, temperature=1.0, end_ids=(), minimum=0):
    """KL(policy || reference) [C] over the whole vocabulary, by torch's own function."""
    both = []
    for role in (policy.as_trainable, policy.as_reference):
        with role():
            logits = plain_forward(policy, prompt + completion)[len(prompt) - 1 : -1] / temperature
        logits = logits.clone()
        logits[:minimum, list(end_ids)] = -1e30  # not -inf, of which kl_div makes NaN
        both.append(logits.log_softmax(-1))
    ours, base = both
    return torch.nn.functional.kl_div(base, ours, reduction="none", log_target=True).sum(-1)


def make_off_policy(policy, groups, scoring, *, spread=0.3, seed=5):
    """Old log-probs near the policy's own, so that ratios lie on both sides of both clips; and its
    entropies.
    """
    generator = torch.Generator().manual_seed(seed)
    (batch,) = pack(groups, [1.0] * 1000, max_tokens=10**9)
    with policy.as_sampler():
        scored = scoring(policy, batch)
    logprobs, entropies = (x.split(batch.lengths) for x in (scored.logprobs_N, scored.entropies_N))
    for rollout, logprobs_C, entropies_C in zip(batch.members, logprobs, entropies, strict=True):
        noise_C = spread * torch.randn(len(logprobs_C), generator=generator)
        rollout.logprobs = (logprobs_C + noise_C).tolist()
        rollout.entropies = entropies_C.tolist()


def naive_loss(policy, groups, objective, *, longest, threshold=None, **scoring_options):
    """The step's loss with its graph, and the number of tokens clipped below and above. Tokens of
    less entropy than the `threshold` have no surrogate.
    """
    rows, low, high = [], 0, 0
    for group in groups:
        for rollout, advantage in zip(group.rollouts, group.advantages, strict=True):
            row = (policy, group.prompt_ids, rollout.completion_ids)
            new, _ = naive_logprobs(*row, **scoring_options)
            ref = None
            if objective.exact:
                ref = naive_divergence(*row, **scoring_options)
            elif objective.beta:
                with policy.as_reference():
                    ref, _ = naive_logprobs(*row, **scoring_options)
            old = torch.tensor(rollout.logprobs)
            kept = None if threshold is None else [e >= threshold for e in rollout.entropies]
            losses, below, above = naive_row(new, old, ref, advantage, objective, kept)
            rows.append(losses)
            low, high = low + below, high + above
    return naive_average(rows, objective.loss_type, longest), low, high
