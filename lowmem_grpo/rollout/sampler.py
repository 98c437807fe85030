"""Sampling completions: waves of rows, each prompt prefilled once, finished rows dropped.

A wave decodes at most `batch_size` completions at once. Problems stay whole where a group fits into
a wave. A larger group is a wave by itself: when one of its completions ends, the next takes its
place. (The longest first would end soonest, but how long a completion will be is not known.) So
every prompt is prefilled once.

Rows that have ended leave the batch when an eighth of it has ended: dropping copies the other rows'
keys and values, so doing it for each single row would cost more than it saves.
"""

import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch

from lowmem_grpo.errors import NonFiniteError
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
    """Token ids, their log-probs under the distribution they were drawn from, whether it ended by
    itself, and that distribution's entropies, where they are wanted.
    """

    ids: list[int]
    logprobs: list[float]
    ended: bool = False
    entropies: list[float] = field(default_factory=list)


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
        drawn = iter(_decode(policy, wave, requests, sampling, end_ids, batch_size, advance))
        for problem, rows in wave:
            found[problem] += [next(drawn) for _ in rows]
    return found


def _waves(requests, batch_size):
    """Lists of (request, its rows): whole groups of at most `batch_size` rows together, or one
    larger group by itself.
    """
    wave, used = [], 0
    for problem, request in enumerate(requests):
        rows = range(len(request.uniforms))
        if used and used + len(rows) > batch_size:
            yield wave
            wave, used = [], 0
        wave.append((problem, rows))
        used += len(rows)
    if wave:
        yield wave


def _decode(
    policy, wave, requests, sampling: Sampling, end_ids, batch_size, advance
) -> list[Completion]:
    device = policy.device
    prompts = [requests[problem].prompt_ids for problem, _ in wave]
    lengths = [len(prompt) for prompt in prompts]
    uniforms = [requests[problem].uniforms[row] for problem, rows in wave for row in rows]
    completions = [Completion([], []) for _ in uniforms]
    rows = list(range(min(len(uniforms), batch_size)))  # the completion in each place
    waiting = deque(range(len(rows), len(uniforms)))  # of one group, if any
    counts = [len(rows)] if waiting else [len(own) for _, own in wave]
    capacity = max(sampling.max_completion_length - 1, 1)
    cache = WaveCache(lengths, counts, capacity, device, policy.cache_bits)
    uniforms_RC = torch.from_numpy(np.stack(uniforms[: len(rows)])).to(device)
    drawn = [0] * len(rows)  # tokens in each place
    ended: set[int] = set()  # places

    def draw(hidden_RD, places: list[int]) -> torch.Tensor:
        """The next token of these places (int64 [R]), written down where a completion goes on."""
        steps = [drawn[place] for place in places]
        logits_RV = policy.logits(hidden_RD)
        early = [n for n, step in enumerate(steps) if step < sampling.min_completion_length]
        if early:
            of = slice(None) if len(early) == len(places) else _column(early, device)
            logits_RV[of, list(end_ids)] = -torch.inf
        if len(places) == len(rows) and min(steps) == max(steps):
            uniforms_R = uniforms_RC[:, steps[0]]
        else:
            uniforms_R = uniforms_RC[_column(places, device), _column(steps, device)][:, 0]
        tokens_R, logprobs_R, entropies_R = choose(logits_RV, uniforms_R, sampling)
        entropies = [] if entropies_R is None else entropies_R.tolist()
        count = 0
        for n, (place, token, logprob) in enumerate(
            zip(places, tokens_R.tolist(), logprobs_R.tolist(), strict=True)
        ):
            drawn[place] += 1
            if place in ended:
                continue
            if not math.isfinite(logprob):
                raise NonFiniteError(
                    f"the model's logits are not finite in {policy.dtype}: "
                    "use another model.compute_dtype"
                )
            completion = completions[rows[place]]
            completion.ids.append(token)
            completion.logprobs.append(logprob)
            completion.entropies += entropies[n : n + 1]
            completion.ended = token in end_ids
            if completion.ended or len(completion.ids) == sampling.max_completion_length:
                ended.add(place)
            count += 1
        advance(count)
        return tokens_R

    layout = Prefill(cache, policy.layout([(length, ()) for length in lengths]))
    ids_T = torch.tensor([token for prompt in prompts for token in prompt], device=device)
    positions_T = torch.cat([torch.arange(length) for length in lengths]).to(device)
    last_B = torch.tensor(lengths, device=device).cumsum(0) - 1
    hidden_RD = policy.hidden(ids_T, positions_T, layout)[last_B][cache.problem_R]
    first_1D = hidden_RD[:1].clone() if waiting else None
    tokens_R = draw(hidden_RD, list(range(len(rows))))
    while waiting or len(ended) < len(rows):
        for place in sorted(ended):
            while place in ended and waiting:
                rows[place], drawn[place] = waiting.popleft(), 0
                ended.discard(place)
                uniforms_RC[place] = torch.from_numpy(uniforms[rows[place]]).to(device)
                cache.restart(place)
                tokens_R[place] = draw(first_1D, [place])[0]
            if place in ended and drawn[place] == sampling.max_completion_length:
                drawn[place] = 0  # what is decoded here counts no more, and has no room left
                cache.restart(place)
        if len(ended) == len(rows):
            break
        if 8 * len(ended) >= len(rows):
            going = [place for place in range(len(rows)) if place not in ended]
            rows, drawn = [rows[place] for place in going], [drawn[place] for place in going]
            ended = set()
            going_R = torch.tensor(going, device=device)
            cache.keep(going_R)
            uniforms_RC, tokens_R = uniforms_RC[going_R], tokens_R[going_R]
        hidden_RD = policy.hidden(tokens_R, cache.positions(), cache)
        cache.advance()
        tokens_R = draw(hidden_RD, list(range(len(rows))))
    return completions


def _column(numbers: list[int], device) -> torch.Tensor:
    """int64 [n, 1]."""
    return torch.tensor(numbers, device=device)[:, None]
