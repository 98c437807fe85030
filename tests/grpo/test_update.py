"""The update: its gradient against naive rows and however it is cut, and the step that follows."""

import copy

import pytest
import torch

from lowmem_grpo.grpo.objective import (
    CLIPPED,
    LEVELS,
    LOSS_TYPES,
    Objective,
    rollout_weights,
)
from lowmem_grpo.grpo.packing import pack
from lowmem_grpo.grpo.update import Scoring, UpdateStats, accumulate, score_reference
from tests.grpo.policies import (
    gradients,
    make_off_policy,
    naive_divergence,
    naive_logprobs,
    naive_loss,
    open_policy,
    relative_error,
)
from tests.grpo.rollouts import make_groups

SHAPE = [(6, [4, 1, 7, 3]), (3, [5, 5, 2, 6]), (9, [1, 2, 5, 6])]
LONGEST = 9
CLIP = {"epsilon": 0.2, "epsilon_high": 0.25}
# One batch; one group each; pieces of two or three completions; single completions.
LIMITS = {"everything": 10**6, "one group": 24, "half a group": 15, "one completion": 1}


def no_advance(tokens):
    pass


def batches_of(groups, *, loss_type="grpo", limit=10**6, minimum=0, skip=False, threshold=None):
    lengths = [len(r.completion_ids) for g in groups for r in g.rollouts]
    return pack(
        groups,
        rollout_weights(lengths, loss_type, LONGEST),
        max_tokens=limit,
        min_completion_length=minimum,
        skip_zero_advantage=skip,
        entropy_threshold=threshold,
    )


def step_gradient(policy, batches, scoring, *, checkpointing=False, **objective):
    objective = Objective(**{**CLIP, **objective})
    stats = accumulate(policy, batches, scoring, objective, checkpointing=checkpointing)
    return stats, gradients(policy)


@pytest.fixture(scope="module")
def scoring():
    return Scoring(temperature=0.8, end_ids=(0, 60))


@pytest.fixture(scope="module")
def groups(policy, scoring):
    """Off-policy rollouts whose reference log-probs are known."""
    groups = make_groups(SHAPE, vocab=128)
    make_off_policy(policy, groups, scoring)
    score_reference(policy, batches_of(groups, limit=15), scoring, no_advance)
    return groups


@pytest.mark.parametrize("beta", [0.0, 0.04])
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_packed_is_unpacked(policy, groups, scoring, loss_type, level, beta):
    own = {"loss_type": loss_type, "importance_sampling_level": level, "beta": beta}
    expected, low, high = naive_loss(
        policy,
        groups,
        Objective(**{**CLIP, **own}),
        longest=LONGEST,
        temperature=scoring.temperature,
    )
    expected.backward()
    expected_gradient = gradients(policy)
    stats, found = step_gradient(policy, batches_of(groups, loss_type=loss_type), scoring, **own)
    assert relative_error(found, expected_gradient) < 1e-5
    # cispo and vespo add up products with log-probs, which all but cancel.
    cancels = loss_type in ("cispo", "vespo")
    assert stats.loss == pytest.approx(expected.item(), rel=1e-5, abs=3e-6 if cancels else 0.0)
    assert (stats.sums["clip_low"], stats.sums["clip_high"]) == (low, high)
    if loss_type in CLIPPED and level == "token":
        assert min(low, high) >= 2  # the rollouts say something about clipping


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "checkpointed"])
@pytest.mark.parametrize("cut", LIMITS)
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_micro_batches_add_up_to_the_step(policy, groups, scoring, loss_type, cut, checkpointing):
    whole = batches_of(groups, loss_type=loss_type)
    pieces = batches_of(groups, loss_type=loss_type, limit=LIMITS[cut])
    counts = {"everything": 1, "one group": 3, "half a group": 6, "one completion": 12}
    assert len(pieces) == counts[cut]
    own = {"loss_type": loss_type, "beta": 0.04}
    if loss_type in ("luspo", "dapo"):
        own["importance_sampling_level"] = "sequence"
    expected_stats, expected = step_gradient(policy, whole, scoring, **own)
    stats, found = step_gradient(policy, pieces, scoring, checkpointing=checkpointing, **own)
    assert relative_error(found, expected) < 1e-5
    assert stats.loss == pytest.approx(expected_stats.loss, rel=1e-5)
    assert stats.tokens_scored == expected_stats.tokens_scored == 47
    for name in ("kl", "entropy", "sampler_kl", "clip_low", "clip_high"):
        assert stats.mean(name) == pytest.approx(expected_stats.mean(name), rel=1e-5)


def test_tokens_that_were_forbidden_are_scored_as_they_were_drawn(policy, groups, scoring):
    groups, minimum = copy.deepcopy(groups), 3
    options = {"temperature": 0.8, "end_ids": scoring.end_ids, "minimum": minimum}
    for group in groups:
        for rollout in group.rollouts:
            drawn = rollout.completion_ids[:minimum]
            rollout.completion_ids[:minimum] = [1 if t in scoring.end_ids else t for t in drawn]
    objective = Objective(beta=0.0, **CLIP)
    expected, _, _ = naive_loss(policy, groups, objective, longest=LONGEST, **options)
    expected.backward()
    expected_gradient = gradients(policy)
    held, free = batches_of(groups, minimum=minimum), batches_of(groups)
    _, found = step_gradient(policy, held, scoring, beta=0.0)
    assert relative_error(found, expected_gradient) < 1e-5
    _, forgotten = step_gradient(policy, free, scoring, beta=0.0)
    assert relative_error(forgotten, expected_gradient) > 1e-3


def test_zero_advantages_change_nothing_where_they_are_skipped(policy, scoring):
    groups = make_groups(SHAPE, vocab=128, seed=3)
    make_off_policy(policy, groups, scoring)
    groups[0].advantages = [0.0] * 4
    groups[2].advantages[1] = 0.0
    all_of_them, some = batches_of(groups), batches_of(groups, skip=True)
    whole_stats, whole = step_gradient(policy, all_of_them, scoring, beta=0.0)
    stats, found = step_gradient(policy, some, scoring, beta=0.0)
    assert relative_error(found, whole) < 1e-6
    assert stats.loss == pytest.approx(whole_stats.loss, rel=1e-6)
    assert stats.tokens_trunk < whole_stats.tokens_trunk
    # A KL penalty reaches every rollout: leaving these out would be wrong.
    score_reference(policy, all_of_them, scoring, no_advance)
    _, whole = step_gradient(policy, batches_of(groups), scoring, beta=0.04)
    _, found = step_gradient(policy, batches_of(groups, skip=True), scoring, beta=0.04)
    assert relative_error(found, whole) > 1e-3


@pytest.mark.parametrize("beta", [0.0, 0.04])
def test_an_entropy_bonus_is_the_mean_entropy_of_the_step(policy, groups, scoring, beta):
    plain, bonus = Objective(beta=beta, **CLIP), {"beta": beta, "entropy_coef": 0.3}
    expected, _, _ = naive_loss(policy, groups, plain, longest=LONGEST, temperature=0.8)
    entropies = [
        naive_logprobs(policy, group.prompt_ids, rollout.completion_ids, temperature=0.8)[1]
        for group in groups
        for rollout in group.rollouts
    ]
    expected = expected - 0.3 * torch.cat(entropies).mean()
    expected.backward()
    expected_gradient = gradients(policy)
    for limit in LIMITS.values():
        stats, found = step_gradient(policy, batches_of(groups, limit=limit), scoring, **bonus)
        assert relative_error(found, expected_gradient) < 1e-5
        assert stats.loss == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("own", [{"beta": 0.0}, {"beta": 0.3, "loss_type": "dapo"}], ids=str)
def test_tokens_of_little_entropy_have_no_surrogate(policy, groups, scoring, own):
    entropies = sorted(e for g in groups for r in g.rollouts for e in r.entropies)
    threshold = entropies[-10]  # of 47
    settings = {**CLIP, **own}
    loss_type = own.get("loss_type", "grpo")
    expected, _, _ = naive_loss(
        policy, groups, Objective(**settings), longest=LONGEST, threshold=threshold, temperature=0.8
    )
    bonus = [
        naive_logprobs(policy, group.prompt_ids, rollout.completion_ids, temperature=0.8)[1][t]
        for group in groups
        for rollout in group.rollouts
        for t, entropy in enumerate(rollout.entropies)
        if entropy >= threshold
    ]
    assert len(bonus) == 10
    expected = expected - 0.2 * torch.stack(bonus).mean()
    expected.backward()
    expected_gradient = gradients(policy)
    for limit in LIMITS.values():
        batches = batches_of(groups, loss_type=loss_type, limit=limit, threshold=threshold)
        stats, found = step_gradient(policy, batches, scoring, **own, entropy_coef=0.2)
        assert relative_error(found, expected_gradient) < 1e-5
        assert stats.loss == pytest.approx(expected.item(), rel=1e-5)
        assert stats.tokens_scored == 47
    every = batches_of(groups, loss_type=loss_type)
    _, found = step_gradient(policy, every, scoring, **own, entropy_coef=0.2)
    assert relative_error(found, expected_gradient) > 0.02


@pytest.mark.parametrize(("loss_type", "minimum"), [("grpo", 3), ("dapo", 0)])
def test_the_exact_divergence_is_the_whole_sum_however_the_step_is_cut(
    policy, groups, scoring, loss_type, minimum
):
    groups = copy.deepcopy(groups)
    for group in groups:
        for rollout in group.rollouts:
            rollout.ref_logprobs = None  # which it does not ask for
            drawn = rollout.completion_ids[:minimum]
            rollout.completion_ids[:minimum] = [1 if t in scoring.end_ids else t for t in drawn]
    own = {"loss_type": loss_type, "beta": 0.5, "kl_estimator": "exact"}
    options = {"temperature": 0.8, "end_ids": scoring.end_ids, "minimum": minimum}
    objective = Objective(**{**CLIP, **own})
    expected, _, _ = naive_loss(policy, groups, objective, longest=LONGEST, **options)
    expected.backward()
    expected_gradient = gradients(policy)
    with torch.no_grad():
        divergences = [
            naive_divergence(policy, group.prompt_ids, rollout.completion_ids, **options)
            for group in groups
            for rollout in group.rollouts
        ]
    mean = torch.cat(divergences).mean().item()
    assert mean > 0.01
    for limit, checkpointing in zip(LIMITS.values(), (False, True, False, True), strict=True):
        batches = batches_of(groups, loss_type=loss_type, limit=limit, minimum=minimum)
        stats, found = step_gradient(policy, batches, scoring, checkpointing=checkpointing, **own)
        assert relative_error(found, expected_gradient) < 1e-5
        assert stats.loss == pytest.approx(expected.item(), rel=1e-5)
        assert stats.mean("kl") == pytest.approx(mean, rel=1e-5)
    _, estimated = step_gradient(policy, batches, scoring, **{**own, "beta": 0.0})
    assert relative_error(estimated, expected_gradient) > 0.05  # the penalty is a part of it


def test_estimates_are_the_exact_divergence_in_the_mean(policy, scoring):
    """Every token of the vocabulary as the first of a completion, weighted by its probability."""
    prompt, vocab = [5, 17, 40], policy.head_weight_VD.shape[0]
    groups = make_groups([(3, [1] * vocab)], vocab=vocab)
    groups[0].prompt_ids = prompt
    for token, rollout in enumerate(groups[0].rollouts):
        rollout.completion_ids = [token]
    (batch,) = batches_of(groups)
    with policy.as_reference():
        base_V = scoring(policy, batch).logprobs_N
        reference_ND = scoring.hidden(policy, batch)
    with policy.as_sampler():
        scored = scoring(policy, batch, reference_ND)
    own_V, exact_V = scored.logprobs_N, scored.divergences_N
    assert exact_V.max().item() == pytest.approx(exact_V.min().item(), rel=1e-4)
    exact = exact_V[0].item()
    assert exact > 0.01
    p_V, r_V = own_V.double().exp(), (base_V - own_V).double()
    assert p_V.sum().item() == pytest.approx(1.0, abs=1e-5)
    k1, k3 = -r_V, r_V.expm1() - r_V
    assert (p_V * k1).sum().item() == pytest.approx(exact, rel=1e-4)
    assert (p_V * k3).sum().item() == pytest.approx(exact, rel=1e-4)
    # k2 is biased, of the third order of what they are apart.
    k2 = (p_V * r_V.square() / 2).sum().item()
    assert k2 == pytest.approx(exact, rel=0.5)
    assert k2 != pytest.approx(exact, rel=1e-3)
    # And of samples, as training draws them.
    generator = torch.Generator().manual_seed(0)
    drawn = torch.multinomial(p_V, 200_000, replacement=True, generator=generator)
    for estimate in (k1, k3):
        error = estimate[drawn].std().item() / 200_000**0.5
        assert abs(estimate[drawn].mean().item() - exact) < 4 * error


def test_nothing_to_train_on(policy, scoring):
    stats = accumulate(policy, [], scoring, Objective(beta=0.0, **CLIP), checkpointing=False)
    assert (stats.loss, stats.tokens_scored, stats.mean("entropy")) == (0.0, 0, None)
    assert all(p.grad is None for p in policy.adapter_parameters().values())


def test_reference_is_the_base_without_adapters(policy, scoring):
    groups = make_groups(SHAPE, vocab=128, seed=4)
    told = []
    tokens = score_reference(policy, batches_of(groups, limit=15), scoring, told.append)
    assert tokens == sum(told) == sum(batch.tokens for batch in batches_of(groups, limit=15))
    for group in groups:
        for rollout in group.rollouts:
            row = (policy, group.prompt_ids, rollout.completion_ids)
            with policy.as_reference():
                base, _ = naive_logprobs(*row, temperature=0.8)
            with policy.as_sampler():
                own, _ = naive_logprobs(*row, temperature=0.8)
            assert rollout.ref_logprobs == pytest.approx(base.tolist(), abs=1e-5)
            assert rollout.ref_logprobs != pytest.approx(own.tolist(), abs=1e-2)


def test_a_reference_that_fails_half_way_leaves_nothing(policy, scoring):
    groups = make_groups(SHAPE, vocab=128)
    batches, done = batches_of(groups, limit=15), []

    def failing(policy, batch):
        if len(done) == 2:
            raise RuntimeError("out of memory")
        done.append(batch)
        return scoring(policy, batch)

    with pytest.raises(RuntimeError):
        score_reference(policy, batches, failing, no_advance)
    # A run that is saved here and resumed asks whether the first rollout has its reference.
    assert all(r.ref_logprobs is None for group in groups for r in group.rollouts)


def test_stats_are_those_of_the_rollouts(policy, groups, scoring):
    told = []
    batches = batches_of(groups, limit=24)
    objective = Objective(beta=0.04, **CLIP)
    stats = accumulate(
        policy, batches, scoring, objective, checkpointing=False, advance=told.append
    )
    gradients(policy)
    entropies, divergences = [], []
    for group in groups:
        for rollout in group.rollouts:
            with torch.no_grad():
                new, entropy = naive_logprobs(
                    policy, group.prompt_ids, rollout.completion_ids, temperature=0.8
                )
            entropies += entropy.tolist()
            ref = torch.tensor(rollout.ref_logprobs)
            divergences += (torch.exp(ref - new) - (ref - new) - 1).tolist()
    assert stats.tokens_scored == len(entropies) == 47
    assert stats.tokens_trunk == sum(told) == sum(p + sum(c) - len(c) for p, c in SHAPE)
    assert stats.mean("entropy") == pytest.approx(sum(entropies) / 47, rel=1e-4)
    assert stats.mean("kl") == pytest.approx(sum(divergences) / 47, rel=1e-3)
    assert stats.mean("nothing") is None
    assert UpdateStats().mean("kl") is None


def test_on_policy_ratios_are_one(policy, scoring):
    groups = make_groups(SHAPE, vocab=128)
    make_off_policy(policy, groups, scoring, spread=0.0)
    stats, _ = step_gradient(policy, batches_of(groups, limit=15), scoring, beta=0.0)
    assert stats.mean("sampler_kl") < 1e-9
    assert stats.mean("clip_low") == stats.mean("clip_high") == 0.0


def test_half_precision_with_a_gradient_scaler(tiny_model_dir, policy, groups, scoring):
    half = open_policy(tiny_model_dir, dtype=torch.float16)
    batches = batches_of(groups, limit=24)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    options = {"objective": Objective(beta=0.04, **CLIP), "checkpointing": False}
    plain_stats, plain = step_gradient(half, batches, scoring, beta=0.04)
    stats = accumulate(half, batches, scoring, loss_scale=scaler.scale, **options)
    assert all(p.grad.dtype == torch.float32 for p in half.adapter_parameters().values())
    assert relative_error(gradients(half) / 1024.0, plain) < 0.01
    assert stats.loss == plain_stats.loss  # the loss that is reported is not scaled
    # Another rounding of the weights is another NF4 base: its gradient only points the same way.
    _, expected = step_gradient(policy, batches, scoring, beta=0.04)
    assert torch.cosine_similarity(plain, expected, 0).item() > 0.9
