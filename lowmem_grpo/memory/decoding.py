"""The sampler's loop over tokens, restated for a trace: some of its tokens are decoded, not all.

Between two tokens at which sizes change, every token allocates and frees the same. On a card, the
first layer alone is run of the tokens in the middle, since what all of them do there is gone when
they end: the cache is made at the first token.
"""

from __future__ import annotations

import contextlib
from dataclasses import replace

import torch

from lowmem_grpo.memory.shapes import Wave
from lowmem_grpo.rollout.cache import Prefill, WaveCache, padded_length
from lowmem_grpo.rollout.sampling import Sampling, choose

__all__ = ["decode"]


def decode(
    policy, role, wave: Wave, sampling: Sampling, recorder, places: int | None = None
) -> None:
    """The sampler's loop for a wave, with some of its tokens; see rollout/sampler.py. `role`: of
    the policy. `places`: how many tokens on the way are decoded; None: each at which sizes change.
    `recorder` is what records it.
    """
    device, rows, lengths = policy.device, len(wave.prompts) * wave.rows, list(wave.prompts)
    least = min(sampling.min_completion_length, wave.capacity)
    sampling = replace(sampling, min_completion_length=least, max_completion_length=wave.capacity)
    last = max(wave.tokens - 1, 1)
    with role:
        counts, capacity = [wave.rows] * len(lengths), max(wave.capacity - 1, 1)
        cache = WaveCache(lengths, counts, capacity, device, policy.cache_bits)
        uniforms_RC = torch.empty(rows, wave.capacity, dtype=torch.float64, device=device)
        layout = Prefill(cache, policy.layout([(length, ()) for length in lengths]))
        ids_T = torch.empty(sum(lengths), dtype=torch.int64, device=device)
        positions_T = torch.cat([torch.arange(length) for length in lengths]).to(device)
        last_B = torch.tensor(lengths, device=device).cumsum(0) - 1
        hidden_RD = policy.hidden(ids_T, positions_T, layout)[last_B][cache.problem_R]
        # A cache that grows does so in all layers at every size: nothing of that is left out.
        for t in _places(last, None if cache.grows else places):
            logits_RV = policy.logits(hidden_RD)
            if t < sampling.min_completion_length:
                logits_RV[:, [0]] = -torch.inf
            tokens_R = choose(logits_RV, uniforms_RC[:, t], sampling).tokens_R
            if t == wave.tokens - 1:
                break
            cache.jump(t)
            with _few_layers(policy, recorder, 0 < t < last - 1 and not cache.grows):
                hidden_RD = policy.hidden(tokens_R, cache.positions(), cache)
            cache.advance()


@contextlib.contextmanager
def _few_layers(policy, recorder, few: bool):
    """With `few`, the first layer alone is run within, and its events count for no other."""
    config = policy.trunk.config
    depth = config.num_hidden_layers
    if few:  # the models of transformers run as many of their layers as this says, if not all
        config.num_hidden_layers = 1
    recorder.of_no_layer = few
    try:
        yield
    finally:
        config.num_hidden_layers = depth


def _places(last: int, count: int | None) -> list[int]:
    """Tokens to decode at: the first, those on the way, and the last ones."""
    if count is None:
        between = [t for t in range(1, last) if padded_length(t + 1) > padded_length(t)]
    else:
        between = [round(last * i / count) for i in range(1, count)]
    return sorted({0, *between, last - 1, last})
