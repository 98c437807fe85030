"""The tiled divergence against the whole sum over full logits: values, gradients, memory."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lowmem_grpo.policy.divergence import naive_token_divergence, token_divergence
from tests.policy.heads import UGLY_HEADS
from tests.policy.test_logprobs import LiveBytes

TRUTH = torch.float64


def make(rows, hidden, vocab, *, seed=0, bias=False, spread=1.0, apart=0.5):
    """Policy rows, reference rows near them, a head, and a bias or None; float32."""
    generator = torch.Generator().manual_seed(seed)
    hidden_ND = torch.randn(rows, hidden, generator=generator) * spread
    reference_ND = hidden_ND + apart * spread * torch.randn(rows, hidden, generator=generator)
    weight_VD = torch.randn(vocab, hidden, generator=generator) / hidden**0.5
    return hidden_ND, reference_ND, weight_VD, torch.randn(vocab) if bias else None


def run(function, inputs, dtype=torch.float32, **options):
    """(divergences, gradient of a weighted sum of them)."""
    hidden_ND, reference_ND, weight_VD, bias_V = (
        None if x is None else x.to(dtype) for x in inputs
    )
    hidden_ND.requires_grad_()
    found_N = function(hidden_ND, reference_ND, weight_VD, bias_V=bias_V, **options)
    weights_N = torch.linspace(-1.0, 2.0, len(found_N), dtype=found_N.dtype)
    (grad_ND,) = torch.autograd.grad((found_N * weights_N).sum(), hidden_ND)
    return found_N.detach(), grad_ND


def assert_equal(inputs, tiles, **options):
    """Tiled in float32 against the definition in float64."""
    expected = run(naive_token_divergence, inputs, TRUTH, **options)
    found = run(token_divergence, inputs, **options, **tiles)
    for mine, theirs in zip(found, expected, strict=True):
        assert mine.dtype == torch.float32
        torch.testing.assert_close(mine.double(), theirs, rtol=2e-5, atol=5e-6)


@pytest.mark.parametrize("tiles", [(1, 1), (3, 7), (4, 16), (1000, 1000)])
@pytest.mark.parametrize("shape", [(1, 1, 2), (1, 5, 17), (7, 3, 31), (13, 8, 64), (5, 4, 1)])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_tiles_of_any_size_give_the_definition(shape, tiles, temperature):
    tiles = {"tile_tokens": tiles[0], "tile_vocab": tiles[1]}
    assert_equal(make(*shape), tiles, temperature=temperature)


def test_the_definition_is_torch_s_own():
    hidden_ND, reference_ND, weight_VD, _ = make(5, 6, 23)
    logp_NV, logq_NV = ((x @ weight_VD.T / 0.7).log_softmax(-1) for x in (hidden_ND, reference_ND))
    own_N = torch.nn.functional.kl_div(logq_NV, logp_NV, reduction="none", log_target=True).sum(-1)
    found_N = naive_token_divergence(hidden_ND, reference_ND, weight_VD, temperature=0.7)
    torch.testing.assert_close(found_N, own_N)
    assert own_N.min() > 0.01


@settings(max_examples=60, deadline=None, derandomize=True)
@given(**UGLY_HEADS)
def test_temperature_bias_and_forbidden_ids(
    rows, vocab, tile_tokens, tile_vocab, temperature, bias, data
):
    forbidden = data.draw(st.sets(st.integers(0, vocab - 1), max_size=vocab - 1))
    flags = data.draw(st.lists(st.booleans(), min_size=rows, max_size=rows))
    assert_equal(
        make(rows, 6, vocab, seed=rows * 100 + vocab, bias=bias),
        {"tile_tokens": tile_tokens, "tile_vocab": tile_vocab},
        temperature=temperature,
        forbidden_ids=tuple(forbidden),
        forbidden_N=torch.tensor(flags),
    )


@pytest.mark.parametrize("forbidden", [range(0, 5), range(5, 10), range(0, 10), range(15, 17)])
def test_a_whole_vocabulary_tile_may_be_forbidden(forbidden):
    inputs, tiles = make(4, 6, 17), {"tile_tokens": 3, "tile_vocab": 5}
    flags = torch.tensor([True, False, True, True])
    options = {"forbidden_ids": tuple(forbidden), "forbidden_N": flags}
    assert_equal(inputs, tiles, **options)
    # What is forbidden has no part in it: a vocabulary that never had it gives the same.
    others = [v for v in range(17) if v not in forbidden]
    found_N, _ = run(token_divergence, inputs, **options, **tiles)
    alone_N, _ = run(token_divergence, (*inputs[:2], inputs[2][others], None))
    torch.testing.assert_close(found_N[flags], alone_N[flags])
    assert (found_N[1] - alone_N[1]).abs() > 1e-3


def test_the_same_rows_have_no_divergence_and_no_gradient():
    hidden_ND, _, weight_VD, _ = make(5, 8, 40)
    inputs = hidden_ND, hidden_ND.clone(), weight_VD, None
    found_N, grad_ND = run(token_divergence, inputs, tile_vocab=7)
    assert found_N.tolist() == [0.0] * 5
    assert grad_ND.abs().max() == 0.0


def test_logits_far_apart_do_not_overflow():
    # Differences of thousands: exp of an unshifted logit is infinite, of most shifted ones zero.
    inputs = make(5, 8, 40, spread=3e3)
    (found_N, grad_ND), (expected_N, expected_ND) = (
        run(token_divergence, inputs, tile_tokens=2, tile_vocab=7),
        run(naive_token_divergence, inputs, TRUTH),
    )
    torch.testing.assert_close(found_N.double(), expected_N, rtol=1e-5, atol=1e-2)
    torch.testing.assert_close(grad_ND.double(), expected_ND, rtol=1e-4, atol=1e-6)


def test_logits_that_all_move_together_cost_no_digits():
    # A bias of the hidden rows: the reference's logits lie a thousand below the policy's.
    hidden_ND, reference_ND, weight_VD, _ = make(7, 8, 101, apart=0.1)
    weight_VD[:, 0] = 1.0
    far_ND = reference_ND - 1000.0 * torch.eye(8)[0]
    expected = run(naive_token_divergence, (hidden_ND, far_ND, weight_VD, None), TRUTH)
    found = run(token_divergence, (hidden_ND, far_ND, weight_VD, None), tile_vocab=13)
    torch.testing.assert_close(found[0].double(), expected[0], rtol=0, atol=3e-4)
    torch.testing.assert_close(found[1].double(), expected[1], rtol=0, atol=3e-4)


@pytest.mark.parametrize("spread", [4.0, 40.0])
def test_bfloat16_is_no_further_from_the_truth_than_full_logits_are(spread):
    inputs = [None if x is None else x.bfloat16() for x in make(61, 64, 997, spread=spread)]
    truth = run(naive_token_divergence, inputs, TRUTH)
    full = run(_full_logits, inputs, torch.bfloat16)
    tiled = run(token_divergence, inputs, torch.bfloat16, tile_tokens=16, tile_vocab=100)
    for mine, theirs, true in zip(tiled, full, truth, strict=True):
        assert (mine - true).norm() <= 1.1 * (theirs - true).norm()


def _full_logits(hidden_ND, reference_ND, weight_VD, *, bias_V):
    logp_NV, logq_NV = (
        (x @ weight_VD.T).float().log_softmax(-1) for x in (hidden_ND, reference_ND)
    )
    return (logp_NV.exp() * (logp_NV - logq_NV)).sum(-1)


def extra_bytes(function, rows, **tiles) -> int:
    """Peak of forward and backward beyond the inputs, the result and the gradient."""
    hidden_ND, reference_ND, weight_VD, _ = make(rows, 16, 500)
    grads_N = torch.ones(rows)
    with LiveBytes(hidden_ND, reference_ND, weight_VD, grads_N) as live:
        found_N = function(hidden_ND.requires_grad_(), reference_ND, weight_VD, **tiles)
        found_N.backward(grads_N)
    return live.peak - found_N.nbytes - hidden_ND.grad.nbytes


def test_peak_memory_is_a_tile_of_each_and_one_direction_a_row():
    tiles = {"tile_tokens": 32, "tile_vocab": 128}
    once, twice, four = (extra_bytes(token_divergence, 64 * n, **tiles) for n in (1, 2, 4))
    assert once < 2.5 * (32 * 128 * 4) + 64 * 16 * 4
    assert twice - once <= 64 * 16 * 4
    assert four - twice <= 128 * 16 * 4
    naive = [extra_bytes(naive_token_divergence, 64 * n) for n in (1, 2)]
    assert naive[1] - naive[0] >= 2 * 64 * 500 * 4


def test_no_rows_and_no_gradient():
    empty = torch.empty(0, 4, requires_grad=True)
    token_divergence(empty, empty.detach(), torch.randn(9, 4)).sum().backward()
    hidden_ND, reference_ND, weight_VD, _ = make(3, 4, 9)
    assert not token_divergence(hidden_ND, reference_ND, weight_VD).requires_grad


def test_what_cannot_be_is_refused():
    hidden_ND, reference_ND, weight_VD, _ = make(3, 4, 9)
    with pytest.raises(ValueError, match=r"temperature must be positive, got 0"):
        token_divergence(hidden_ND, reference_ND, weight_VD, temperature=0)
    with pytest.raises(ValueError, match=r"got \(3, 4\) and \(2, 4\)"):
        token_divergence(hidden_ND, reference_ND[:2], weight_VD)
    with pytest.raises(ValueError, match="the reference requires a gradient"):
        token_divergence(hidden_ND, reference_ND.clone().requires_grad_(), weight_VD)
    with pytest.raises(ValueError, match="LM head requires a gradient"):
        token_divergence(hidden_ND, reference_ND, weight_VD.clone().requires_grad_())
