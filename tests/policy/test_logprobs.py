"""Tiled log-probs and entropies against full logits: values, gradients, rounding, memory."""

import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lowmem_grpo.policy.logprobs import logits_tile, naive_token_logprobs, token_logprobs
from tests.policy.heads import UGLY_HEADS

TRUTH = torch.float64


def make(rows, hidden, vocab, *, seed=0, bias=False, spread=1.0):
    """Hidden rows that ask for a gradient, a head, targets, and a bias or None; float32."""
    generator = torch.Generator().manual_seed(seed)
    hidden_ND = torch.randn(rows, hidden, generator=generator) * spread
    weight_VD = torch.randn(vocab, hidden, generator=generator) / hidden**0.5
    targets_N = torch.randint(0, vocab, (rows,), generator=generator)
    bias_V = torch.randn(vocab, generator=generator) if bias else None
    return hidden_ND.requires_grad_(), weight_VD, targets_N, bias_V


def run(function, inputs, weights, **options):
    """(log-probs, entropies, gradient) where the gradient is of a weighted sum of both results."""
    hidden_ND, weight_VD, targets_N, bias_V = inputs
    if function is token_logprobs:
        options["entropy_gradient"] = bool(weights[1].any())
    hidden_ND = hidden_ND.detach().requires_grad_()
    logp_N, entropy_N = function(hidden_ND, weight_VD, targets_N, bias_V=bias_V, **options)
    loss = sum((w * x).sum() for w, x in zip(weights, (logp_N, entropy_N), strict=True) if w.any())
    (grad_ND,) = torch.autograd.grad(loss, hidden_ND)
    return logp_N.detach(), entropy_N.detach(), grad_ND


def row_weights(rows, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, rows, generator=generator)


def assert_equal(inputs, tiles, weights=None, **options):
    """Tiled and naive agree in value and gradient, in float32, with an entropy's gradient and
    without, which are two ways to compute it.
    """
    weights = row_weights(inputs[0].shape[0]) if weights is None else weights
    alone = weights * torch.tensor([[1.0], [0.0]])
    for wanted in (weights, alone) if alone.any() else (weights,):
        expected = run(naive_token_logprobs, inputs, wanted, **options)
        found = run(token_logprobs, inputs, wanted, **options, **tiles)
        for mine, theirs in zip(found, expected, strict=True):
            assert mine.dtype == torch.float32
            torch.testing.assert_close(mine, theirs, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("tiles", [(1, 1), (3, 7), (4, 16), (1000, 1000)])
@pytest.mark.parametrize("shape", [(1, 1, 2), (1, 5, 17), (7, 3, 31), (13, 8, 64), (5, 4, 1)])
def test_tiles_of_any_size_give_the_definition(shape, tiles):
    assert_equal(make(*shape), {"tile_tokens": tiles[0], "tile_vocab": tiles[1]})


@settings(max_examples=60, deadline=None, derandomize=True)
@given(**UGLY_HEADS)
def test_temperature_bias_and_forbidden_ids(
    rows, vocab, tile_tokens, tile_vocab, temperature, bias, data
):
    inputs = make(rows, 6, vocab, seed=rows * 100 + vocab, bias=bias)
    forbidden = tuple(data.draw(st.sets(st.integers(0, vocab - 1), max_size=vocab // 2)))
    flags = data.draw(st.lists(st.booleans(), min_size=rows, max_size=rows))
    # What was sampled was allowed.
    allowed = min(set(range(vocab)) - set(forbidden))
    targets_N = inputs[2]
    for token in forbidden:
        targets_N = torch.where(targets_N == token, allowed, targets_N)
    assert_equal(
        (inputs[0], inputs[1], targets_N, inputs[3]),
        {"tile_tokens": tile_tokens, "tile_vocab": tile_vocab},
        temperature=temperature,
        forbidden_ids=forbidden,
        forbidden_N=torch.tensor(flags),
    )


@pytest.mark.parametrize("forbidden", [range(0, 5), range(5, 10), range(0, 10), range(15, 17)])
def test_a_whole_vocabulary_tile_may_be_forbidden(forbidden):
    hidden_ND, weight_VD, _, _ = make(4, 6, 17)
    inputs = hidden_ND, weight_VD, torch.tensor([12, 11, 12, 14]), None
    options = {
        "forbidden_ids": tuple(forbidden),
        "forbidden_N": torch.tensor([True, False, True, True]),
    }
    assert_equal(inputs, {"tile_tokens": 3, "tile_vocab": 5}, **options)
    banned = list(forbidden)
    others = [v for v in range(17) if v not in banned]
    logp_N, _ = token_logprobs(*inputs[:3], **options, tile_tokens=3, tile_vocab=5)
    alone_NV = (hidden_ND[0] @ weight_VD[others].T).log_softmax(-1)
    torch.testing.assert_close(logp_N[0], alone_NV[others.index(12)])


@pytest.mark.parametrize("only", [0, 1])
def test_each_gradient_alone(only):
    weights = row_weights(7)
    weights[1 - only] = 0.0
    assert_equal(make(7, 8, 29), {"tile_tokens": 2, "tile_vocab": 8}, weights=weights)


def test_logits_far_apart_do_not_overflow():
    # Differences of thousands: exp of an unshifted logit is infinite, of most shifted ones zero.
    inputs = make(5, 8, 40, spread=3e3)
    assert_equal(inputs, {"tile_tokens": 2, "tile_vocab": 7})
    _, entropy_N, grad_ND = run(token_logprobs, inputs, row_weights(5), tile_vocab=7)
    assert entropy_N.isfinite().all()
    assert grad_ND.isfinite().all()


@pytest.mark.parametrize("entropy", [True, False])
@pytest.mark.parametrize("spread", [4.0, 40.0])  # of the latter most tokens are all but certain
@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_bfloat16_is_no_further_from_the_truth_than_full_logits_are(temperature, spread, entropy):
    hidden_ND, weight_VD, targets_N, _ = make(61, 64, 997, spread=spread)
    likely_N = (hidden_ND @ weight_VD.T).argmax(1)
    targets_N = torch.where(torch.arange(61) % 2 > 0, likely_N, targets_N)
    rounded = hidden_ND.detach().bfloat16(), weight_VD.bfloat16(), targets_N, None
    exact = rounded[0].to(TRUTH), rounded[1].to(TRUTH), targets_N, None
    weights = row_weights(61) * torch.tensor([[1.0], [float(entropy)]])
    options = {"temperature": temperature}
    truth = run(_float64_logprobs, exact, weights, **options)
    naive = run(naive_token_logprobs, rounded, weights, **options)
    tiled = run(token_logprobs, rounded, weights, **options, tile_tokens=16, tile_vocab=100)
    for mine, theirs, true in zip(tiled, naive, truth, strict=True):
        assert (mine - true).norm() <= 1.1 * (theirs - true).norm()


def _float64_logprobs(hidden_ND, weight_VD, targets_N, *, bias_V, temperature):
    logp_NV = (hidden_ND @ weight_VD.T / temperature).log_softmax(-1)
    return logp_NV.gather(1, targets_N[:, None])[:, 0], -(logp_NV.exp() * logp_NV).sum(-1)


def test_what_is_sampled_and_what_is_scored_are_rounded_alike():
    hidden_ND, weight_VD, targets_N, _ = make(9, 64, 300)
    hidden_ND, weight_VD = hidden_ND.detach().bfloat16(), weight_VD.bfloat16()
    sampled_NV = logits_tile(hidden_ND, weight_VD).log_softmax(-1)
    scored_N, _ = token_logprobs(hidden_ND, weight_VD, targets_N, tile_vocab=300)
    torch.testing.assert_close(scored_N, sampled_NV.gather(1, targets_N[:, None])[:, 0])


class LiveBytes(TorchDispatchMode):
    """The most bytes of storage that were alive at once, but for those of `inputs`."""

    def __init__(self, *inputs):
        super().__init__()
        self.now = self.peak = 0
        self.seen = {tensor.untyped_storage()._cdata for tensor in inputs}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self.count(tensor.untyped_storage())
        return result

    def count(self, storage):
        if storage._cdata not in self.seen:
            self.seen.add(storage._cdata)
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self.release, storage._cdata, storage.nbytes())

    def release(self, key, size):
        self.seen.discard(key)
        self.now -= size


def extra_bytes(function, rows, *, entropy=True, **tiles) -> int:
    """Peak of forward and backward beyond the inputs, the two results and the gradient."""
    hidden_ND, weight_VD, targets_N, _ = make(rows, 16, 500)
    grads_N = row_weights(rows)
    if function is token_logprobs:
        tiles["entropy_gradient"] = entropy
    with LiveBytes(hidden_ND, weight_VD, targets_N, grads_N) as live:
        logp_N, entropy_N = function(hidden_ND, weight_VD, targets_N, **tiles)
        if entropy:
            torch.autograd.backward((logp_N, entropy_N), tuple(grads_N))
        else:
            logp_N.backward(grads_N[0])
    results = sum(x.untyped_storage().nbytes() for x in (logp_N, entropy_N, hidden_ND.grad))
    return live.peak - results


def test_peak_memory_does_not_grow_with_the_number_of_tokens():
    tiles = {"tile_tokens": 32, "tile_vocab": 128}
    once, twice, four = (extra_bytes(token_logprobs, 64 * n, **tiles) for n in (1, 2, 4))
    assert once < 2.5 * (32 * 128 * 4)  # two tiles and numbers of single rows
    # One number a row is kept besides the results: the log of the normaliser, 4 bytes.
    assert twice - once <= 64 * 4
    assert four - twice <= 128 * 4
    grown = [extra_bytes(naive_token_logprobs, 64 * n) for n in (1, 2, 4)]
    full = 64 * 500 * 4
    assert grown[1] - grown[0] >= full
    assert grown[2] - grown[1] >= 2 * full


def test_without_an_entropy_s_gradient_one_direction_a_row_is_kept():
    tiles = {"tile_tokens": 32, "tile_vocab": 128, "entropy": False}
    once, twice, four = (extra_bytes(token_logprobs, 64 * n, **tiles) for n in (1, 2, 4))
    assert once < 2.5 * (32 * 128 * 4) + 64 * 16 * 4
    assert twice - once <= 64 * (16 * 4 + 4)  # 16 hidden features
    assert four - twice <= 128 * (16 * 4 + 4)


def test_entropies_have_no_gradient_unless_asked():
    inputs = make(3, 8, 20)[:3]
    logp_N, entropy_N = token_logprobs(*inputs)
    assert logp_N.requires_grad
    assert not entropy_N.requires_grad
    assert token_logprobs(*inputs, entropy_gradient=True)[1].requires_grad


def test_a_smaller_tile_needs_less():
    wide = extra_bytes(token_logprobs, 64, tile_tokens=32, tile_vocab=256)
    narrow = extra_bytes(token_logprobs, 64, tile_tokens=32, tile_vocab=64)
    assert narrow < wide / 2


def test_no_rows():
    inputs = torch.empty(0, 4, requires_grad=True), torch.randn(9, 4), torch.empty(0).long()
    logp_N, entropy_N = token_logprobs(*inputs, entropy_gradient=True)
    assert logp_N.shape == entropy_N.shape == (0,)
    (logp_N.sum() + entropy_N.sum()).backward()
    token_logprobs(*inputs)[0].sum().backward()


def test_a_target_outside_the_vocabulary_shows():
    hidden_ND, weight_VD, _, _ = make(2, 4, 9)
    logp_N, _ = token_logprobs(hidden_ND, weight_VD, torch.tensor([3, 9]))
    assert logp_N.isnan().tolist() == [False, True]


@pytest.mark.parametrize("temperature", [0, -1.0, float("nan")])
def test_a_temperature_that_is_not_positive_is_refused(temperature):
    hidden_ND, weight_VD, targets_N, _ = make(2, 4, 9)
    with pytest.raises(ValueError, match="temperature must be positive"):
        token_logprobs(hidden_ND, weight_VD, targets_N, temperature=temperature)


def test_a_head_that_is_trained_is_refused():
    hidden_ND, weight_VD, targets_N, bias_V = make(2, 4, 9, bias=True)
    with pytest.raises(ValueError, match="frozen head only"):
        token_logprobs(hidden_ND, weight_VD.requires_grad_(), targets_N)
    with pytest.raises(ValueError, match="frozen head only"):
        token_logprobs(hidden_ND, weight_VD.detach(), targets_N, bias_V=bias_V.requires_grad_())


def test_rows_and_targets_must_match():
    hidden_ND, weight_VD, targets_N, _ = make(3, 4, 9)
    with pytest.raises(ValueError, match="targets"):
        token_logprobs(hidden_ND, weight_VD, targets_N[:2])


def test_a_second_derivative_is_refused():
    # The backward pass is not differentiable; silently wrong second derivatives would be worse.
    hidden_ND, weight_VD, targets_N, _ = make(3, 4, 9)
    logp_N, _ = token_logprobs(hidden_ND, weight_VD, targets_N)
    (grad_ND,) = torch.autograd.grad(logp_N.sum(), hidden_ND, create_graph=True)
    with pytest.raises(RuntimeError, match="does not require grad"):
        grad_ND.sum().backward()
