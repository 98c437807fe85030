"""Sampling completions: waves of rows, each prompt prefilled once, finished rows dropped.

A wave decodes at most `batch_size` completions at once. Problems stay whole where a group fits into
a wave, so a prompt is prefilled once; a group larger than a wave is cut, and its prompt is
prefilled once for each piece.

Rows that have ended leave the batch when an eighth of it has ended: dropping copies the other rows'
keys and values, so doing it for each single row would cost more than it saves.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from lowmem_grpo.errors import ModelError
from lowmem_grpo.rollout.cache import Prefill, WaveCache
from lowmem_grpo.rollout.sampling import Sampling, choose

__all__ = ["Completion", "Request", "sample"]


@dataclass(frozen=True)
class Request:
    """A prompt and the uniform numbers of each completion that is wanted of it (float64
    [max_completion_length]).
    """

    prompt_ids: list[int]
    uniforms: list[np.ndarray]


@dataclass
class Completion:
    """Token ids, their log-probs under the distribution they were drawn from, and whether it ended
    by itself.
    """

    ids: list[int]
    logprobs: list[float]
    ended: bool = False


def sample(
    policy,
    requests: list[Request],
    sampling: Sampling,
    *,
    end_ids: tuple[int, ...],
    batch_size: int,
    advance: Callable[[int], None] = lambda tokens: None,
) -> list[list[Completion]]:
    """Completions for each request, in order, from the policy in its current role (which must
    record no gradients).

    `end_ids`: tokens that end a completion; they are part of it. `advance` is told of every token
    drawn.
    """
    found: list[list[Completion]] = [[] for _ in requests]
    for wave in _waves(requests, batch_size):
        drawn = iter(_decode(policy, wave, requests, sampling, end_ids, advance))
        for problem, rows in wave:
            found[problem] += [next(drawn) for _ in rows]
    return found


def _waves(requests, batch_size):
    """Lists of (request, its rows) with at most `batch_size` rows each."""
    wave, used = [], 0
    for problem, request in enumerate(requests):
        rows = range(len(request.uniforms))
        if used and used + len(rows) > batch_size:
            yield wave
            wave, used = [], 0
        for low in range(0, len(rows), batch_size):
            piece = rows[low : low + batch_size]
            if used and used + len(piece) > batch_size:
                yield wave
                wave, used = [], 0
            wave.append((problem, piece))
            used += len(piece)
    if wave:
        yield wave


def _decode(policy, wave, requests, sampling: Sampling, end_ids, advance) -> list[Completion]:
    device = policy.device
    prompts = [requests[problem].prompt_ids for problem, _ in wave]
    counts = [len(rows) for _, rows in wave]
    lengths = [len(prompt) for prompt in prompts]
    capacity = max(sampling.max_completion_length - 1, 1)
    cache = WaveCache(lengths, counts, capacity, device, policy.cache_bits)
    uniforms_RC = torch.from_numpy(
        np.stack([requests[problem].uniforms[row] for problem, rows in wave for row in rows])
    ).to(device)
    completions = [Completion([], []) for _ in range(sum(counts))]

    layout = Prefill(cache, policy.layout([(length, ()) for length in lengths]))
    ids_T = torch.tensor([token for prompt in prompts for token in prompt], device=device)
    positions_T = torch.cat([torch.arange(length) for length in lengths]).to(device)
    last_B = torch.tensor(lengths, device=device).cumsum(0) - 1
    hidden_RD = policy.hidden(ids_T, positions_T, layout)[last_B][cache.problem_R]
    rows = list(range(len(completions)))
    ended: set[int] = set()
    for t in range(sampling.max_completion_length):
        logits_RV = policy.logits(hidden_RD)
        if t < sampling.min_completion_length:
            logits_RV[:, list(end_ids)] = -torch.inf
        tokens_R, logprobs_R = choose(logits_RV, uniforms_RC[:, t], sampling)
        for place, (row, token, logprob) in enumerate(
            zip(rows, tokens_R.tolist(), logprobs_R.tolist(), strict=True)
        ):
            if place not in ended:
                if math.isnan(logprob):
                    raise ModelError(
                        f"the model's logits are not finite in {policy.dtype}: "
                        "use another model.compute_dtype"
                    )
                completions[row].ids.append(token)
                completions[row].logprobs.append(logprob)
                if token in end_ids:
                    completions[row].ended = True
                    ended.add(place)
        advance(sum(len(completions[row].ids) == t + 1 for row in rows))
        if len(ended) == len(rows) or t + 1 == sampling.max_completion_length:
            break
        if 8 * len(ended) >= len(rows):
            going = [place for place in range(len(rows)) if place not in ended]
            rows, ended = [rows[place] for place in going], set()
            going_R = torch.tensor(going, device=device)
            cache.keep(going_R)
            uniforms_RC, tokens_R = uniforms_RC[going_R], tokens_R[going_R]
        hidden_RD = policy.hidden(tokens_R, cache.positions(), cache)
        cache.advance()
    return completions
