"""The draw: its distribution, its log-probs, its truncations, and where its randomness is from."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lowmem_grpo.rollout.sampling import Sampling, choose, distribution, uniforms

BELOW_ONE = float(np.nextafter(1.0, 0.0))


def random_logits(rows, vocab, seed=0, scale=2.0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, vocab, generator=generator) * scale


def naive_kept(logits, sampling):
    """The set of tokens that may be drawn, by the definitions, and the distribution over them."""
    p = [math.exp(z / sampling.temperature) for z in logits]
    order = sorted(range(len(p)), key=lambda v: -p[v])
    if sampling.top_k:
        order = order[: sampling.top_k]
    if sampling.top_p < 1.0:
        total, reached, kept = sum(p[v] for v in order), 0.0, []
        for v in order:
            if reached >= sampling.top_p:
                break
            kept.append(v)
            reached += p[v] / total
        order = kept
    if sampling.min_p:
        order = [v for v in order if p[v] >= sampling.min_p * p[order[0]]]
    total = sum(p[v] for v in order)
    return {v: p[v] / total for v in order}


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(),
        Sampling(temperature=0.7),
        Sampling(temperature=1.8),
        Sampling(top_k=5),
        Sampling(top_k=1),
        Sampling(top_k=1000),
        Sampling(top_p=0.6),
        Sampling(top_p=1e-6),
        Sampling(min_p=0.2),
        Sampling(temperature=1.3, top_k=9, top_p=0.8, min_p=0.1),
    ],
    ids=str,
)
def test_truncations_against_their_definitions(sampling):
    logits = random_logits(20, 30)
    found = distribution(logits, sampling)
    assert found.dtype == torch.float32
    for row, logp in zip(logits.tolist(), found, strict=True):
        expected = naive_kept(row, sampling)
        assert set(logp.isfinite().nonzero()[:, 0].tolist()) == set(expected)
        for token, p in expected.items():
            assert logp[token].item() == pytest.approx(math.log(p), abs=2e-5)


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(top_k=1),
        Sampling(top_k=4),
        Sampling(top_k=7, temperature=0.7),
        Sampling(top_p=0.5),
        Sampling(top_k=9, top_p=0.6),
    ],
    ids=str,
)
def test_of_equally_likely_tokens_the_first_stay(sampling):
    """As in 16 bits, in which many logits are the same."""
    logits = (random_logits(40, 300) * 2).round() / 2
    logits[0] = 0.0
    logits[1, 5:] = -torch.inf
    for row, logp in zip(logits.tolist(), distribution(logits, sampling), strict=True):
        kept = {v for v in naive_kept(row, sampling) if row[v] > -math.inf}
        assert set(logp.isfinite().nonzero()[:, 0].tolist()) == kept


def test_truncation_does_not_hide_a_logit_that_is_nan():
    logits = random_logits(1, 30)
    logits[0, 3] = torch.nan
    assert distribution(logits, Sampling(top_k=4)).isnan().all()


def test_which_settings_truncate():
    assert not Sampling(temperature=0.3, min_completion_length=4).truncates
    for name, value in (("top_p", 0.9), ("top_k", 3), ("min_p", 0.1)):
        assert Sampling(**{name: value}).truncates


@pytest.mark.parametrize(
    "sampling", [Sampling(), Sampling(temperature=0.5), Sampling(top_p=0.7)], ids=str
)
def test_draws_follow_the_distribution(sampling):
    # Real uniforms, as many completions as a chi-square test wants.
    count, vocab = 40_000, 12
    logits = random_logits(1, vocab, seed=3, scale=1.5)
    draws = torch.from_numpy(uniforms(1, 2, 3, 4, count))
    tokens, logprobs, _ = choose(logits.expand(count, -1).clone(), draws, sampling)
    p = distribution(logits, sampling)[0].double().exp()
    counts = torch.bincount(tokens, minlength=vocab)
    possible = p > 0
    assert counts[~possible].sum() == 0
    expected = count * p[possible]
    chi2 = ((counts[possible] - expected) ** 2 / expected).sum().item()
    degrees = int(possible.sum()) - 1
    assert chi2 < degrees + 4 * (2 * degrees) ** 0.5  # mean plus four standard deviations
    # And the log-prob that is recorded is that of the same distribution.
    torch.testing.assert_close(logprobs.double(), p[tokens].log(), rtol=0, atol=1e-5)


def test_each_row_has_its_own_uniform_and_distribution():
    logits = torch.tensor([[0.0, -100.0, -100.0], [-100.0, 0.0, 0.0], [-100.0, 0.0, 0.0]])
    tokens, logprobs, _ = choose(logits, torch.tensor([0.9, 0.4, 0.6]).double(), Sampling())
    assert tokens.tolist() == [0, 1, 2]
    assert logprobs.tolist() == pytest.approx([0.0, math.log(0.5), math.log(0.5)])


def test_the_first_token_whose_cumulative_probability_exceeds_u():
    logits = torch.tensor([[0.25, 0.25, 0.5]]).log().expand(6, -1).clone()
    u = torch.tensor([0.0, 0.2499, 0.2501, 0.4999, 0.5001, 0.9999]).double()
    assert choose(logits, u, Sampling())[0].tolist() == [0, 0, 1, 1, 2, 2]


@pytest.mark.parametrize("u", [0.0, 1e-300, 0.5, BELOW_ONE])
def test_tokens_of_probability_zero_are_never_drawn(u):
    # First, last and middle tokens are forbidden, as an end token is before its time.
    for vocab, seed in ((11, 0), (257, 1), (50_000, 2)):
        logits = random_logits(4, vocab, seed)
        for forbidden in (0, 1, vocab // 2, vocab - 2, vocab - 1):
            logits[:, forbidden] = -torch.inf
        tokens, logprobs, _ = choose(logits, torch.full((4,), u, dtype=torch.float64), Sampling())
        assert logits.gather(1, tokens[:, None]).isfinite().all()
        assert logprobs.isfinite().all()


@pytest.mark.parametrize("vocab", [1, 255, 256, 257, 1000])
def test_large_vocabularies_are_inverted_as_small_ones_are(vocab):
    generator = torch.Generator().manual_seed(vocab)
    logits = 4 * torch.randn(400, vocab, generator=generator)
    # Most tokens are impossible, those at the ends of blocks among them.
    logits[200:] = logits[200:].where(
        torch.rand(200, vocab, generator=generator) < 0.02, -torch.inf
    )
    logits[200:, vocab // 2] = 0.0
    u = torch.rand(400, generator=generator, dtype=torch.float64)
    u[::4], u[1::4] = 0.0, 1.0 - 2.0**-53
    tokens, logp, _ = choose(logits.clone(), u, Sampling())
    assert logp.isfinite().all()
    p = logits.double().softmax(1).numpy()
    for row, token in enumerate(tokens.tolist()):
        cumulative = p[row].cumsum()
        assert p[row, token] > 0
        assert cumulative[token] > u[row] * cumulative[-1] - 1e-6
        assert cumulative[token] - p[row, token] <= u[row] * cumulative[-1] + 1e-6


def test_one_token_left_has_log_prob_zero():
    logits = torch.full((2, 7), -torch.inf)
    logits[:, 3] = 1.5
    u = torch.tensor([0.0, BELOW_ONE], dtype=torch.float64)
    tokens, logprobs, _ = choose(logits, u, Sampling(temperature=0.8))
    assert tokens.tolist() == [3, 3]
    assert logprobs.tolist() == [0.0, 0.0]


def test_unlikely_tokens_of_a_large_vocabulary_are_drawn():
    # In float32 a running sum near 1 would swallow steps of 1e-8: the tail would never be met.
    vocab, neighbours = 50_000, 40
    logits = torch.full((1, vocab), math.log(1e-8)).expand(neighbours, -1).clone()
    logits[:, 0] = 0.0
    total = 1 + 1e-8 * (vocab - 1)
    wanted = torch.arange(vocab // 2, vocab // 2 + neighbours)
    u = (1 + 1e-8 * (wanted.double() - 0.5)) / total
    tokens, *_ = choose(logits, u, Sampling())
    assert (tokens - wanted).abs().max() <= 2
    assert len(tokens.unique()) == neighbours


def test_greedy_takes_the_likeliest_and_reports_the_plain_distribution():
    logits = random_logits(6, 40)
    sampling = Sampling(temperature=0.0, top_k=3, top_p=0.5)
    tokens, logprobs, _ = choose(logits, torch.zeros(6, dtype=torch.float64), sampling)
    assert torch.equal(tokens, logits.argmax(1))
    torch.testing.assert_close(logprobs, logits.log_softmax(1).amax(1))


def test_choose_leaves_the_logits_as_they_were():
    logits = random_logits(3, 11)
    before = logits.clone()
    truncated = {"top_k": 2, "top_p": 0.9, "min_p": 0.1}
    for sampling in (Sampling(**truncated, entropies=True), Sampling(entropies=True)):
        choose(logits, torch.full((3,), 0.3).double(), sampling)
        assert torch.equal(logits, before)


@pytest.mark.parametrize(
    "how", [{}, {"temperature": 0.5}, {"top_k": 1}, {"top_p": 0.7}, {"temperature": 0.0}], ids=str
)
def test_entropies_are_those_of_what_is_drawn_from(how):
    logits = random_logits(5, 37)
    logits[3, 4:] = -torch.inf  # tokens that may not come
    draws = torch.linspace(0.1, 0.9, 5).double()
    plain, wanted = (choose(logits, draws, Sampling(**how, entropies=e)) for e in (False, True))
    assert plain.entropies_R is None
    assert torch.equal(plain.tokens_R, wanted.tokens_R)
    assert torch.equal(plain.logprobs_R, wanted.logprobs_R)
    whole = Sampling() if how == {"temperature": 0.0} else Sampling(**how)
    p = distribution(logits, whole).double().exp()
    expected = torch.special.entr(p).sum(1).float()
    torch.testing.assert_close(wanted.entropies_R, expected, rtol=1e-5, atol=1e-6)


@given(st.tuples(*[st.integers(0, 2**40)] * 4), st.integers(1, 40), st.integers(1, 40))
@settings(deadline=None, derandomize=True)
def test_uniforms_depend_on_their_keys_alone(keys, count, more):
    first = uniforms(*keys, count)
    np.random.seed(0)
    torch.manual_seed(0)
    longer = uniforms(*keys, count + more)  # a longer limit changes nothing of what came before
    assert first.dtype == np.float64
    assert first.shape == (count,)
    assert ((first >= 0) & (first < 1)).all()
    assert (longer[:count] == first).all()


def test_uniforms_of_neighbours_have_nothing_in_common():
    keys = [(s, t, p, r) for s in (0, 1, 2) for t in (0, 1) for p in (0, 1) for r in (0, 1, 2)]
    drawn = np.stack([uniforms(*key, 200) for key in keys])
    assert len(np.unique(drawn)) == drawn.size
    correlations = np.corrcoef(drawn)[np.triu_indices(len(keys), 1)]
    assert np.abs(correlations).max() < 5 / 200**0.5
    assert abs(drawn.mean() - 0.5) < 4 * (1 / 12) ** 0.5 / drawn.size**0.5


def test_uniforms_are_what_they_were_in_the_first_release():
    # A resumed run, and a published one, must find the same numbers.
    assert uniforms(0, 0, 0, 0, 3).tolist() == [
        0.014067035665647709,
        0.2577672456246177,
        0.47156538101528966,
    ]
    assert uniforms(7, 1, 2, 3, 3).tolist() == [
        0.2368582118594773,
        0.5807362608599179,
        0.7884853017691197,
    ]
