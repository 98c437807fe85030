"""The objective against its formulas written out token by token, and the weights of averages."""

import math

import pytest
import torch

from lowmem_grpo.grpo.objective import LOSS_TYPES, ObjectiveInputs, k3, objective, rollout_weights

CLIP = {"epsilon": 0.2, "epsilon_high": 0.3}


def one_token(old, new, advantage, epsilon=0.2, epsilon_high=0.2):
    """(loss, gradient with respect to the log-prob, stats) of a single token of weight 1."""
    logprobs = torch.tensor([math.log(new)], requires_grad=True)
    inputs = ObjectiveInputs(
        logprobs_N=logprobs,
        old_logprobs_N=torch.tensor([math.log(old)]),
        advantages_N=torch.tensor([float(advantage)]),
        weights_N=torch.ones(1),
    )
    loss, stats = objective(inputs, epsilon=epsilon, epsilon_high=epsilon_high, beta=0.0)
    loss.backward()
    return loss.item(), logprobs.grad.item(), stats


def random_inputs(count=400, reference=True, seed=0, dtype=torch.float32):
    """Tokens on both sides of both clips, with advantages of both signs and zero."""
    generator = torch.Generator().manual_seed(seed)

    def normal(scale):
        return torch.randn(count, generator=generator, dtype=dtype) * scale

    old = -normal(2.0).abs()
    advantages = normal(1.0)
    advantages[::7] = 0.0
    return ObjectiveInputs(
        logprobs_N=(old + normal(0.4)).requires_grad_(),
        old_logprobs_N=old,
        advantages_N=advantages,
        weights_N=torch.rand(count, generator=generator, dtype=dtype),
        ref_logprobs_N=old + normal(0.5) if reference else None,
    )


def naive(inputs, epsilon, epsilon_high, beta):
    """Loss and gradient, one token after another, in Python's numbers."""
    total, gradient = 0.0, []
    reference = inputs.ref_logprobs_N
    for i, (new, old, advantage, weight) in enumerate(
        zip(
            inputs.logprobs_N.tolist(),
            inputs.old_logprobs_N.tolist(),
            inputs.advantages_N.tolist(),
            inputs.weights_N.tolist(),
            strict=True,
        )
    ):
        rho = math.exp(new - old)
        clipped = min(max(rho, 1 - epsilon), 1 + epsilon_high)
        surrogate, slope = rho * advantage, rho * advantage
        if clipped * advantage < surrogate:
            surrogate, slope = clipped * advantage, 0.0
        loss, slope = -surrogate, -slope
        if beta:
            d = reference[i].item() - new
            loss += beta * (math.exp(d) - d - 1)
            slope += beta * (1 - math.exp(d))
        total += weight * loss
        gradient.append(weight * slope)
    return total, gradient


def test_worked_example_ratio_is_clipped():
    loss, gradient, stats = one_token(0.5, 0.7, +1)
    assert loss == pytest.approx(-1.2)
    assert gradient == 0.0
    assert (stats["clip_high"].item(), stats["clip_low"].item()) == (1.0, 0.0)


@pytest.mark.parametrize(
    ("old", "new", "advantage", "loss", "gradient", "low", "high"),
    [
        (0.5, 0.7, -1, 1.4, 1.4, 0, 0),  # worse than it was, and likelier: full gradient
        (0.5, 0.35, +1, -0.7, -0.7, 0, 0),
        (0.5, 0.35, -1, 0.8, 0.0, 1, 0),
        (0.5, 0.55, +1, -1.1, -1.1, 0, 0),
        (0.5, 0.5, -2, 2.0, 2.0, 0, 0),
        (0.5, 0.7, 0, 0.0, 0.0, 0, 0),
    ],
)
def test_the_clip_stops_only_what_went_far_enough(old, new, advantage, loss, gradient, low, high):
    found_loss, found_gradient, stats = one_token(old, new, advantage)
    assert found_loss == pytest.approx(loss, abs=1e-6)
    assert found_gradient == pytest.approx(gradient, abs=1e-6)
    assert (stats["clip_low"].item(), stats["clip_high"].item()) == (low, high)


def test_epsilon_high_moves_the_upper_clip_only():
    assert one_token(0.5, 0.7, +1, epsilon_high=0.5)[0] == pytest.approx(-1.4)
    assert one_token(0.5, 0.35, -1, epsilon_high=0.5)[0] == pytest.approx(0.8)


@pytest.mark.parametrize("beta", [0.0, 0.04, 1.0])
def test_naive_twin(beta):
    inputs = random_inputs(dtype=torch.float64)
    loss, stats = objective(inputs, beta=beta, **CLIP)
    loss.backward()
    expected, gradient = naive(inputs, beta=beta, **CLIP)
    assert loss.item() == pytest.approx(expected, rel=1e-12)
    torch.testing.assert_close(
        inputs.logprobs_N.grad, torch.tensor(gradient, dtype=torch.float64), rtol=1e-10, atol=1e-14
    )
    clipped = sum(g == 0.0 for g in naive(inputs, beta=0.0, **CLIP)[1])
    zero = (inputs.advantages_N == 0).sum().item()
    assert (stats["clip_low"] + stats["clip_high"]).item() == clipped - zero > 50


def test_stats_are_sums_over_tokens_without_gradient():
    inputs = random_inputs()
    _, stats = objective(inputs, beta=0.04, **CLIP)
    new, old, ref = inputs.logprobs_N, inputs.old_logprobs_N, inputs.ref_logprobs_N
    assert stats["tokens"].item() == 400
    assert stats["kl"].item() == pytest.approx(((ref - new).exp() - (ref - new) - 1).sum().item())
    # Tokens were drawn from the old policy: k3 of old against new.
    expected = ((new - old).exp() - (new - old) - 1).sum().item()
    assert stats["sampler_kl"].item() == pytest.approx(expected, rel=1e-5)
    assert not any(value.requires_grad for value in stats.values())


def test_kl_is_reported_where_it_is_not_penalised():
    with_reference, without = random_inputs(), random_inputs(reference=False)
    loss, stats = objective(with_reference, beta=0.0, **CLIP)
    plain, plain_stats = objective(without, beta=0.0, **CLIP)
    assert loss.item() == plain.item()
    assert stats["kl"].item() > 0
    assert "kl" not in plain_stats


def test_beta_without_reference_is_refused():
    with pytest.raises(ValueError, match=r"beta is 0\.04"):
        objective(random_inputs(reference=False), beta=0.04, **CLIP)


def test_k3_is_never_negative_and_keeps_its_digits_near_zero():
    difference = torch.cat([torch.logspace(-7, 1.5, 2000), -torch.logspace(-7, 1.5, 2000)])
    found = k3(torch.zeros_like(difference), difference)
    assert found.min().item() >= 0.0
    exact = difference.double().expm1() - difference.double()
    seen = difference.abs() > 1e-3
    torch.testing.assert_close(found[seen].double(), exact[seen], rtol=3e-4, atol=0.0)
    assert k3(torch.tensor([-1.25]), torch.tensor([-1.25])).item() == 0.0


def test_k3_is_an_unbiased_estimate_of_the_divergence():
    p, q = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.2, 0.2, 0.6])
    expected = (p * (p / q).log()).sum()
    assert (p * k3(p.log(), q.log())).sum().item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_weights_against_naive_double_loops(loss_type):
    lengths, longest = [3, 1, 7, 5, 5], 8
    generator = torch.Generator().manual_seed(1)
    losses = [torch.rand(length, generator=generator).tolist() for length in lengths]
    if loss_type == "grpo":
        expected = sum(sum(row) / len(row) for row in losses) / len(losses)
    elif loss_type == "dapo":
        expected = sum(sum(row) for row in losses) / sum(lengths)
    else:
        expected = sum(sum(row) for row in losses) / (len(losses) * longest)
    weights = rollout_weights(lengths, loss_type, longest)
    found = sum(w * x for w, row in zip(weights, losses, strict=True) for x in row)
    assert found == pytest.approx(expected, rel=1e-12)


def test_another_loss_type_is_refused_by_name():
    with pytest.raises(ValueError, match="bnpo"):
        rollout_weights([1], "bnpo", 4)
