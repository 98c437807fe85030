"""What is configured reaches what computes."""

import copy
import dataclasses
from statistics import stdev

import pytest

from lowmem_grpo.config import build_config
from lowmem_grpo.grpo.objective import Objective
from lowmem_grpo.rewards.base import Reward, Scores
from lowmem_grpo.setup import (
    advantages,
    pack_groups,
    sampling_of,
    subtract_kl,
    update_settings,
)
from tests.grpo.rollouts import make_groups

OTHERS = {
    "epsilon": 0.1,
    "epsilon_high": 0.3,
    "beta": 0.5,
    "loss_type": "luspo",
    "importance_sampling_level": "sequence",
    "delta": 4.0,
    "kl_estimator": "k2",
    "use_bias_correction_kl": True,
    "off_policy_mask_threshold": 0.5,
    "entropy_coef": 0.01,
    "sapo_temperature_pos": 2.0,
    "sapo_temperature_neg": 3.0,
    "vespo_k_pos": 4.0,
    "vespo_lambda_pos": 5.0,
    "vespo_k_neg": 6.0,
    "vespo_lambda_neg": 7.0,
}


def configured(**grpo):
    return build_config([("test", {"grpo": grpo, "memory": {"micro_batch_tokens": 1000}})])


def test_every_setting_of_the_objective_is_the_configuration_s():
    assert OTHERS.keys() == {field.name for field in dataclasses.fields(Objective)}
    objective = update_settings(configured(**OTHERS))["objective"]
    assert dataclasses.asdict(objective) == OTHERS


def test_defaults_of_the_objective_are_the_configuration_s():
    objective = update_settings(configured())["objective"]
    assert objective == Objective(epsilon=0.2, epsilon_high=0.2, beta=0.04)


def test_truncated_completions_take_no_part_where_they_are_masked():
    groups = make_groups([(3, [4, 5, 6]), (2, [5, 1, 2])])
    for group, place in ((groups[0], 1), (groups[1], 2)):
        group.rollouts[place].finish_reason = "stop"
    (whole,) = pack_groups(groups, configured())
    (masked,) = pack_groups(groups, configured(mask_truncated_completions=True))
    assert len(whole.members) == 6
    assert masked.members == (groups[0].rollouts[1], groups[1].rollouts[2])
    assert masked.lengths == (5, 2)
    assert masked.weights_N.tolist() == pytest.approx([1 / 30] * 5 + [1 / 12] * 2)


def test_the_entropy_threshold_is_of_the_step_and_of_what_counts_in_it():
    groups = make_groups([(3, [4, 4]), (2, [2, 4])])
    groups[1].advantages = [0.0, 0.0]  # whose tokens count, though they have no gradient
    groups[1].rollouts[0].finish_reason = "stop"
    groups[0].rollouts[0].finish_reason = "stop"
    numbers = iter(range(14))
    for group in groups:
        for rollout in group.rollouts:
            rollout.entropies = [float(next(numbers)) for _ in rollout.completion_ids]
    own = {"beta": 0.0, "top_entropy_quantile": 0.25}
    (batch,) = pack_groups(groups, configured(**own))
    assert batch.members == tuple(groups[0].rollouts)
    assert not batch.kept_N.any()  # the highest four, from 9.75 on, are the other group's
    more = {**own, "top_entropy_quantile": 0.6}
    (batch,) = pack_groups(groups, configured(**more))
    assert batch.kept_N.tolist() == [False] * 6 + [True] * 2  # from 5.2 on
    (batch,) = pack_groups(groups, configured(**more, mask_truncated_completions=True))
    assert batch.members == (groups[0].rollouts[0],)
    assert batch.kept_N.tolist() == [False, False, True, True]  # of 0 to 3, 8 and 9, from 2 on
    (batch,) = pack_groups(groups, configured(beta=0.0))
    assert batch.kept_N is None
    assert sampling_of(configured(**own), "rollout").entropies
    assert not sampling_of(configured(), "rollout").entropies


def test_several_rewards_are_normalised_as_configured():
    rewards = [Reward("right", 1.0, None), Reward("short", 0.5, None)]
    by_name = {"right": [1.0, 0.0] * 8, "short": [0.0, 2.0] * 8}
    scores = Scores(by_name, [r + 0.5 * s for r, s in zip(*by_name.values(), strict=True)])
    assert advantages(scores, rewards, configured()) == [[0.0] * 8] * 2
    found = advantages(
        scores, rewards, configured(multi_objective_aggregation="normalize_then_sum")
    )
    assert [len(row) for row in found] == [8, 8]
    assert found[0][0] > 0 > found[0][1]


@pytest.mark.parametrize("scale", ["group", "none"])
def test_a_kl_in_the_reward_is_taken_from_it_and_not_from_the_loss(scale):
    config = configured(use_kl_in_reward=True, beta=0.3, scale_rewards=scale, kl_estimator="k1")
    assert update_settings(config)["objective"].beta == 0.0
    assert config.grpo.scores_reference
    groups = make_groups([(3, [4, 1, 6, 2, 5, 3, 2, 2]), (2, [5] * 8)], reference=True)
    rewards = [Reward("right", 2.0, None)]
    for group in groups:
        group.rewards_by_name = {"right": [reward / 2 for reward in group.rewards]}
    groups[1].rewards = [1.0] * 8  # of which the KL alone makes a difference
    given = copy.deepcopy(groups)
    subtract_kl(groups, rewards, config)
    for group, before in zip(groups, given, strict=True):
        assert (group.rewards, group.rewards_by_name) == (before.rewards, before.rewards_by_name)
        totals = []
        for reward, rollout in zip(before.rewards, before.rollouts, strict=True):
            for old, reference in zip(rollout.logprobs, rollout.ref_logprobs, strict=True):
                reward -= 0.3 * (old - reference)
            totals.append(reward)
        size = stdev(totals) + 1e-4 if scale == "group" else 1.0
        expected = [(total - sum(totals) / 8) / size for total in totals]
        assert group.advantages == pytest.approx(expected)


def test_baseline_and_scale_are_as_configured():
    scores = Scores({}, [1.0, 0, 0, 0, 0, 0, 0, 0] * 2)
    (row, _) = advantages(scores, [], configured(scale_rewards="none", baseline="leave_one_out"))
    assert row == pytest.approx([1.0] + [-1 / 7] * 7)
    (row, _) = advantages(scores, [], configured(scale_rewards="batch"))
    assert row[0] == pytest.approx(0.875 / (stdev(scores.total) + 1e-4))
