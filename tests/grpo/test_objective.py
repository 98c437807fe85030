"""The objective against its formulas written out token by token, and the weights of averages."""

import math
from dataclasses import replace

import pytest
import torch

from lowmem_grpo.grpo.objective import (
    KL_ESTIMATORS,
    LEVELS,
    LOSS_TYPES,
    Objective,
    ObjectiveInputs,
    entropy_threshold,
    k3,
    rollout_weights,
)
from tests.grpo.naive import naive_average, naive_row

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
    loss, stats = Objective(epsilon=epsilon, epsilon_high=epsilon_high, beta=0.0)(inputs)
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
    loss, stats = Objective(beta=beta, **CLIP)(inputs)
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
    _, stats = Objective(beta=0.04, **CLIP)(inputs)
    new, old, ref = inputs.logprobs_N, inputs.old_logprobs_N, inputs.ref_logprobs_N
    assert stats["tokens"].item() == 400
    assert stats["kl"].item() == pytest.approx(((ref - new).exp() - (ref - new) - 1).sum().item())
    # Tokens were drawn from the old policy: k3 of old against new.
    expected = ((new - old).exp() - (new - old) - 1).sum().item()
    assert stats["sampler_kl"].item() == pytest.approx(expected, rel=1e-5)
    assert not any(value.requires_grad for value in stats.values())


def test_kl_is_reported_where_it_is_not_penalised():
    with_reference, without = random_inputs(), random_inputs(reference=False)
    loss, stats = Objective(beta=0.0, **CLIP)(with_reference)
    plain, plain_stats = Objective(beta=0.0, **CLIP)(without)
    assert loss.item() == plain.item()
    assert stats["kl"].item() > 0
    assert "kl" not in plain_stats


def test_beta_without_reference_is_refused():
    with pytest.raises(ValueError, match=r"beta is 0\.04"):
        Objective(beta=0.04, **CLIP)(random_inputs(reference=False))


def test_an_exact_divergence_is_asked_for_and_reported():
    exact = Objective(beta=0.04, kl_estimator="exact", **CLIP)
    inputs = random_inputs()  # with log-probs of the reference, which are not what it takes
    with pytest.raises(ValueError, match=r"beta is 0\.04 but there are no divergences"):
        exact(inputs)
    _, stats = exact(replace(inputs, divergences_N=torch.full((400,), 0.25, requires_grad=True)))
    assert stats["kl"].item() == pytest.approx(100.0)
    assert not stats["kl"].requires_grad


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


LENGTHS = (3, 1, 7, 5, 5, 2, 9)


def random_rows(seed=2, dtype=torch.float64):
    """(new, old, ref, advantage) of each rollout, new log-probs with a gradient; the last but one
    has no advantage.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(count, scale):
        return torch.randn(count, generator=generator, dtype=dtype) * scale

    rows = []
    for place, length in enumerate(LENGTHS):
        old = -normal(length, 2.0).abs()
        new = (old + normal(length, 0.4)).requires_grad_()
        advantage = 0.0 if place == len(LENGTHS) - 2 else normal(1, 1.0).item()
        rows.append((new, old, old + normal(length, 0.5), advantage))
    return rows


def inputs_of(rows, weights, exact=False):
    return ObjectiveInputs(
        logprobs_N=torch.cat([new for new, _, _, _ in rows]),
        old_logprobs_N=torch.cat([old for _, old, _, _ in rows]),
        advantages_N=torch.cat([torch.full_like(old, a) for _, old, _, a in rows]),
        weights_N=torch.cat(
            [torch.full_like(row[1], w) for row, w in zip(rows, weights, strict=True)]
        ),
        ref_logprobs_N=torch.cat([ref for _, _, ref, _ in rows]),
        # Any numbers will do: an objective takes what it is given.
        divergences_N=torch.cat([ref for _, _, ref, _ in rows]) if exact else None,
        lengths=LENGTHS,
    )


VARIANTS = [
    *(
        {"loss_type": kind, "importance_sampling_level": level}
        for kind in LOSS_TYPES
        for level in LEVELS
    ),
    *({"kl_estimator": kind} for kind in KL_ESTIMATORS),
    *({"kl_estimator": kind, "use_bias_correction_kl": True} for kind in ("k1", "k2", "k3")),
    {"importance_sampling_level": "sequence", "use_bias_correction_kl": True},
    {"delta": 1.4},
    {"delta": 1.4, "loss_type": "dapo", "importance_sampling_level": "sequence"},
    {"off_policy_mask_threshold": 0.05},
    {"off_policy_mask_threshold": 0.05, "loss_type": "vespo"},
    {"loss_type": "cispo", "epsilon_high": 1.1},
    {"loss_type": "sapo", "sapo_temperature_pos": 0.5, "sapo_temperature_neg": 3.0},
    {"loss_type": "vespo", "vespo_k_pos": 1.0, "vespo_lambda_pos": 0.5, "vespo_k_neg": 0.5,
     "vespo_lambda_neg": 1.5},
]  # fmt: skip


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize("beta", [0.0, 0.3])
def test_every_variant_against_its_paper_s_formula(variant, beta):
    settings = Objective(**{**CLIP, "beta": beta, **variant})
    kind, longest = settings.loss_type, 11
    rows, found_rows = random_rows(), random_rows()
    told = [naive_row(*row, settings) for row in rows]
    expected = naive_average([losses for losses, _, _ in told], kind, longest)
    expected.backward()
    weights = rollout_weights(list(LENGTHS), kind, longest)
    loss, stats = settings(inputs_of(found_rows, weights, settings.exact))
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-11)
    for (new, _, _, _), (own, _, _, _) in zip(rows, found_rows, strict=True):
        torch.testing.assert_close(own.grad, new.grad, rtol=1e-10, atol=1e-15)
    assert stats["clip_low"].item() == sum(low for _, low, _ in told)
    assert stats["clip_high"].item() == sum(high for _, _, high in told)


@pytest.mark.parametrize("variant", VARIANTS[2:], ids=str)
def test_no_variant_is_another_one(variant):
    """What the twin would not tell: a setting that does nothing."""
    settings, plain = ({**CLIP, "beta": 0.3, **own} for own in (variant, {}))
    weights = rollout_weights(list(LENGTHS), variant.get("loss_type", "grpo"), 11)
    of_weights = ("bnpo", "dapo", "dr_grpo", "luspo")
    if variant == {"kl_estimator": "k3"} or (
        variant.get("loss_type") in of_weights and variant["importance_sampling_level"] == "token"
    ):
        return  # the default, and what differs in its weights alone
    losses = [
        Objective(**own)(inputs_of(random_rows(), weights, "exact" in own.values()))[0]
        for own in (settings, plain)
    ]
    assert losses[0].item() != pytest.approx(losses[1].item(), rel=1e-6)


def test_delta_bounds_what_a_bad_rollout_that_became_likely_pulls():
    found = {}
    for delta in (None, 2.0):
        rows = [(torch.tensor([math.log(0.9)], requires_grad=True), torch.tensor([math.log(0.3)]))]
        (new, old) = rows[0]
        inputs = ObjectiveInputs(new, old, torch.tensor([-1.0]), torch.ones(1))
        loss, _ = Objective(beta=0.0, delta=delta, **CLIP)(inputs)
        loss.backward()
        found[delta] = loss.item(), new.grad.item()
    assert found[None] == pytest.approx((3.0, 3.0))
    assert found[2.0] == pytest.approx((2.0, 0.0))


def test_vespo_weighs_a_rollout_that_is_on_policy_by_one():
    rows = [(old.clone().requires_grad_(), old, ref, a) for _, old, ref, a in random_rows()]
    inputs = inputs_of(rows, [1.0] * len(rows))
    loss, _ = Objective(beta=0.0, loss_type="vespo", **CLIP)(inputs)
    assert loss.item() == pytest.approx(-(inputs.advantages_N * inputs.logprobs_N).sum().item())


def test_an_unknown_name_is_refused():
    for setting in ("loss_type", "importance_sampling_level", "kl_estimator"):
        with pytest.raises(ValueError, match=f"{setting} is 'other', expected one of"):
            Objective(beta=0.0, **CLIP, **{setting: "other"})


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_weights_against_naive_double_loops(loss_type):
    lengths, longest = [3, 1, 7, 5, 5], 8
    generator = torch.Generator().manual_seed(1)
    losses = [torch.rand(length, generator=generator).tolist() for length in lengths]
    if loss_type in ("grpo", "sapo"):
        expected = sum(sum(row) / len(row) for row in losses) / len(losses)
    elif loss_type == "luspo":
        expected = sum(sum(row) for row in losses) / len(losses)
    elif loss_type == "dr_grpo":
        expected = sum(sum(row) for row in losses) / (len(losses) * longest)
    else:
        expected = sum(sum(row) for row in losses) / sum(lengths)
    weights = rollout_weights(lengths, loss_type, longest)
    found = sum(w * x for w, row in zip(weights, losses, strict=True) for x in row)
    assert found == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("loss_type", "expected"),
    [
        *((kind, [1 / 12, 0.0, 1 / 28]) for kind in ("grpo", "sapo")),
        *((kind, [1 / 11, 0.0, 1 / 11]) for kind in ("dapo", "bnpo", "cispo", "vespo")),
        ("dr_grpo", [1 / 32, 0.0, 1 / 32]),
        ("luspo", [1 / 4, 0.0, 1 / 4]),
    ],
)
def test_masked_rollouts_count_as_rollouts_and_their_tokens_do_not(loss_type, expected):
    weights = rollout_weights([3, 8, 7, 1], loss_type, 8, [False, True, False, False])
    assert weights[:3] == pytest.approx(expected)
    assert weights[1] == 0.0


@pytest.mark.parametrize(
    ("quantile", "kept"), [(1.0, 6), (0.5, 3), (0.2, 2), (0.3, 2), (0.0, 1), (0.6, 4)]
)
def test_the_tokens_of_the_most_entropy(quantile, kept):
    entropies = [0.5, 2.0, 0.25, 1.5, 1.0, 0.0]
    threshold = entropy_threshold(entropies, quantile)
    highest = sorted(entropies)[-kept:]
    assert [e for e in sorted(entropies) if e >= threshold] == highest


def test_another_loss_type_is_refused_by_name():
    with pytest.raises(ValueError, match="ppo"):
        rollout_weights([1], "ppo", 4)
