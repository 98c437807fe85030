"""The sampler against a loop of plain forward passes, and what it computes to get there.

The naive loop runs each row by itself through the model's own eager attention, from the first
token, for every token: no cache, no wave, no prompt that is shared.
"""

import numpy as np
import pytest
import torch

from lowmem_grpo.errors import NonFiniteError
from lowmem_grpo.grpo.packing import pack
from lowmem_grpo.grpo.update import Scoring
from lowmem_grpo.rollout.sampler import Request, sample
from lowmem_grpo.rollout.sampling import Sampling, choose, uniforms
from lowmem_grpo.rollout.types import Group, Rollout
from lowmem_grpo.tasks.base import Problem
from tests.grpo.policies import plain_forward

LENGTH = 14


def end_ids(policy, count=6):
    """So many tokens that end a completion, for rows that end at different times."""
    vocab = policy.head_weight_VD.shape[0]
    return tuple(range(2, vocab, vocab // count))[:count]


def make_requests(policy, shape, seed=0):
    """`shape`: [(prompt tokens, completions), ...]; prompts of random tokens."""
    generator = torch.Generator().manual_seed(seed)
    vocab = policy.head_weight_VD.shape[0]
    return [
        Request(
            torch.randint(0, vocab, (length,), generator=generator).tolist(),
            [uniforms(seed, 0, place, i, LENGTH) for i in range(rows)],
        )
        for place, (length, rows) in enumerate(shape)
    ]


def run(policy, requests, sampling, *, batch_size=64, ends=None, advance=lambda tokens: None):
    ends = end_ids(policy) if ends is None else ends
    with policy.as_sampler():
        return sample(
            policy, requests, sampling, end_ids=ends, batch_size=batch_size, advance=advance
        )


def naive(policy, request, row, sampling, ends):
    """One completion: ids and log-probs."""
    ids, logprobs = [], []
    for t in range(sampling.max_completion_length):
        with policy.as_sampler():
            logits = plain_forward(policy, request.prompt_ids + ids)[-1:]
        if t < sampling.min_completion_length:
            logits[:, list(ends)] = -torch.inf
        u = torch.from_numpy(request.uniforms[row][t : t + 1])
        token, logprob, _ = choose(logits, u, sampling)
        ids.append(token.item())
        logprobs.append(logprob.item())
        if ids[-1] in ends:
            break
    return ids, logprobs


def assert_naive(policy, requests, found, sampling, ends):
    for request, completions in zip(requests, found, strict=True):
        assert len(completions) == len(request.uniforms)
        for row, completion in enumerate(completions):
            ids, logprobs = naive(policy, request, row, sampling, ends)
            assert completion.ids == ids
            assert completion.logprobs == pytest.approx(logprobs, abs=2e-5)
            assert completion.ended == (ids[-1] in ends)


def record_trunk(policy, monkeypatch):
    """A list that gets the number of tokens of every forward pass of the trunk."""
    sizes, hidden = [], policy.hidden

    def counting(ids, positions, layout):
        sizes.append(ids.numel())
        return hidden(ids, positions, layout)

    monkeypatch.setattr(policy, "hidden", counting)
    return sizes


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(temperature=0.0, max_completion_length=LENGTH),
        Sampling(max_completion_length=LENGTH),
        Sampling(temperature=1.4, top_k=12, top_p=0.9, max_completion_length=LENGTH),
        Sampling(min_completion_length=4, max_completion_length=LENGTH),
    ],
    ids=["greedy", "plain", "truncated", "minimum"],
)
def test_a_naive_loop_of_full_forwards_gives_the_same(policy, sampling):
    requests = make_requests(policy, [(5, 3), (11, 2), (1, 3)])
    ends = end_ids(policy)
    found = run(policy, requests, sampling, ends=ends)
    lengths = {len(c.ids) for completions in found for c in completions}
    assert sampling.temperature == 0 or len(lengths) > 2  # rows end at different times
    assert_naive(policy, requests, found, sampling, ends)


def test_sliding_window_against_the_naive_loop(windowed_policy):
    policy = windowed_policy
    window = policy.causal_lm.config.sliding_window
    # Prompts shorter and longer than the window, and completions that leave their prompt behind.
    requests = make_requests(policy, [(2, 2), (window + 5, 2)])
    sampling = Sampling(max_completion_length=LENGTH)
    found = run(policy, requests, sampling, ends=())
    assert window < LENGTH
    assert_naive(policy, requests, found, sampling, ())


@pytest.mark.parametrize("batch_size", [1, 2, 3, 5, 8])
def test_completions_do_not_depend_on_the_batch(policy, batch_size):
    # Waves of several problems, of one, and groups cut into pieces; rows end all along.
    requests = make_requests(policy, [(5, 4), (9, 4), (2, 1), (7, 6), (3, 4)])
    sampling = Sampling(max_completion_length=LENGTH)
    whole = run(policy, requests, sampling)
    cut = run(policy, requests, sampling, batch_size=batch_size)
    for expected, found in zip(whole, cut, strict=True):
        assert [c.ids for c in found] == [c.ids for c in expected]
        assert [c.ended for c in found] == [c.ended for c in expected]
        for one, other in zip(found, expected, strict=True):
            assert one.logprobs == pytest.approx(other.logprobs, abs=2e-5)


@pytest.mark.parametrize(("temperature", "minimum"), [(1.0, 0), (0.7, 0), (1.3, 5)])
def test_recorded_log_probs_are_the_trainers(policy, temperature, minimum):
    requests = make_requests(policy, [(6, 5), (3, 4), (10, 3)])
    sampling = Sampling(
        temperature=temperature,
        min_completion_length=minimum,
        max_completion_length=LENGTH,
        entropies=True,
    )
    ends = end_ids(policy)
    problem = Problem("p", ({"role": "user", "content": "?"},), "")
    groups = [
        Group(
            problem,
            request.prompt_ids,
            [Rollout(c.ids, c.logprobs, "length", "", entropies=c.entropies) for c in completions],
            advantages=[1.0] * len(completions),
        )
        for request, completions in zip(requests, run(policy, requests, sampling), strict=True)
    ]
    batches = pack(groups, [1.0] * 12, max_tokens=40, min_completion_length=minimum)
    assert len(batches) > 1
    for batch in batches:
        with policy.as_trainable():
            logprobs, entropies, _ = Scoring(temperature, ends)(policy, batch)
        torch.testing.assert_close(logprobs.detach(), batch.old_logprobs_N, rtol=0, atol=1e-5)
        recorded = [entropy for rollout in batch.members for entropy in rollout.entropies]
        torch.testing.assert_close(entropies, torch.tensor(recorded), rtol=0, atol=1e-5)
        if minimum:
            with policy.as_trainable():
                free = Scoring(temperature, ())(policy, batch).logprobs_N
            # Were the rule forgotten, the first tokens would score lower.
            assert (batch.old_logprobs_N - free)[batch.no_end_N].min() > 0


def test_no_end_before_the_minimum(policy):
    requests = make_requests(policy, [(4, 12)])
    ends = end_ids(policy, count=12)
    free = run(policy, requests, Sampling(max_completion_length=LENGTH), ends=ends)
    held = Sampling(min_completion_length=6, max_completion_length=LENGTH)
    found = run(policy, requests, held, ends=ends)
    assert min(len(c.ids) for c in free[0]) <= 6
    for completion in found[0]:
        assert not set(completion.ids[:6]) & set(ends)
        assert completion.ended or len(completion.ids) == LENGTH
    assert any(c.ended for c in found[0])


def test_each_prompt_is_computed_once(policy, monkeypatch):
    sizes = record_trunk(policy, monkeypatch)
    requests = make_requests(policy, [(7, 4), (13, 4)])
    run(policy, requests, Sampling(max_completion_length=3), ends=())
    assert sizes == [7 + 13, 8, 8]  # the last token of a completion goes nowhere


def test_rows_that_have_ended_leave(policy, monkeypatch):
    sizes = record_trunk(policy, monkeypatch)
    drawn = []
    requests = make_requests(policy, [(4, 8), (6, 8), (5, 8)])
    found = run(policy, requests, Sampling(max_completion_length=LENGTH), advance=drawn.append)
    lengths = [len(c.ids) for completions in found for c in completions]
    assert drawn == [sum(n > t for n in lengths) for t in range(max(lengths))]
    decoded = sizes[1:]
    assert len(decoded) == max(lengths) - 1
    for t, rows in enumerate(decoded, 1):
        going = sum(n > t for n in lengths)
        assert going <= rows
        assert 8 * (rows - going) < rows  # never an eighth of the rows for nothing
    assert decoded[-1] < decoded[0]


@pytest.mark.parametrize("minimum", [0, 3])
@pytest.mark.parametrize("batch_size", [1, 2, 3, 7])
def test_the_next_completion_of_a_group_takes_the_place_of_one_that_ended(
    policy, monkeypatch, batch_size, minimum
):
    requests = make_requests(policy, [(6, 13)])
    ends = end_ids(policy, count=12)
    sampling = Sampling(min_completion_length=minimum, max_completion_length=LENGTH)
    whole = run(policy, requests, sampling, ends=ends)
    sizes, drawn = record_trunk(policy, monkeypatch), []
    found = run(policy, requests, sampling, batch_size=batch_size, ends=ends, advance=drawn.append)
    assert [(c.ids, c.ended) for c in found[0]] == [(c.ids, c.ended) for c in whole[0]]
    for one, other in zip(found[0], whole[0], strict=True):
        assert one.logprobs == pytest.approx(other.logprobs, abs=2e-5)
    lengths = [len(c.ids) for c in found[0]]
    assert sum(drawn) == sum(lengths)
    assert max(lengths) > 1
    assert sizes[0] == 6  # the prompt, once
    # Places are taken as soon as they are free: each forward pass until the last one begins.
    ends_at, passes = [0] * batch_size, [n - 1 for n in lengths]
    for count in passes:
        place = ends_at.index(min(ends_at))
        ends_at[place] += count
    assert len(sizes) - 1 == max(ends_at)


def test_a_wave_stops_when_all_have_ended(policy, monkeypatch):
    sizes = record_trunk(policy, monkeypatch)
    requests = make_requests(policy, [(4, 3)])
    everything = tuple(range(policy.head_weight_VD.shape[0]))
    found = run(policy, requests, Sampling(max_completion_length=LENGTH), ends=everything)
    assert sizes == [4]
    assert [(len(c.ids), c.ended) for c in found[0]] == [(1, True)] * 3


def test_one_token_completions(policy):
    requests = make_requests(policy, [(4, 2), (2, 1)])
    sampling = Sampling(max_completion_length=1)
    found = run(policy, requests, sampling, ends=())
    assert_naive(policy, requests, found, sampling, ())
    assert not any(c.ended for completions in found for c in completions)


def test_an_end_token_in_the_last_place_ends(policy):
    requests = make_requests(policy, [(4, 20)])
    ends = end_ids(policy, count=20)
    found = run(policy, requests, Sampling(max_completion_length=2), ends=ends)
    last = [c for c in found[0] if len(c.ids) == 2 and c.ids[-1] in ends]
    assert last
    assert all(c.ended for c in last)


def test_logits_that_are_not_finite_are_named(policy, monkeypatch):
    logits = policy.logits
    monkeypatch.setattr(policy, "logits", lambda hidden: logits(hidden) * np.nan)
    for temperature in (0.0, 1.0):
        sampling = Sampling(temperature=temperature, max_completion_length=3)
        with pytest.raises(NonFiniteError, match=r"not finite in torch\.float32"):
            run(policy, make_requests(policy, [(4, 2)]), sampling)
