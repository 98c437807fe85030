"""What is configured reaches what computes."""

import dataclasses
from contextlib import nullcontext
from statistics import stdev

import pytest

from lowmem_grpo.config import build_config
from lowmem_grpo.errors import RewardError, TaskError
from lowmem_grpo.grpo.objective import Objective
from lowmem_grpo.isolation.worker import Failure
from lowmem_grpo.rewards.base import Reward, Scores
from lowmem_grpo.setup import (
    advantages,
    check_prompts,
    judge,
    open_task,
    pack_groups,
    update_settings,
)
from lowmem_grpo.tasks import TaskOptions
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


def test_every_option_of_a_task_is_the_configuration_s(monkeypatch):
    others = {"system_prompt": "s", "few_shot": 2, "path": "p", "prompt_column": "q"}
    others |= {"answer_column": "a", "eval_fraction": 0.5, "eval_path": "e", "shuffle": False}
    assert others.keys() == {field.name for field in dataclasses.fields(TaskOptions)}
    monkeypatch.setattr("lowmem_grpo.setup.load_task", lambda spec, **given: (spec, given))
    config = build_config([("test", {"task": {"name": "records", "seed": 3, **others}})])
    assert open_task(config) == ("records", {"seed": 3, "options": TaskOptions(**others)})
    assert open_task(configured()) == ("arithmetic", {"seed": 0, "options": TaskOptions()})


def test_prompts_are_checked_under_the_template_as_configured(tiny_model_dir, tmp_path):
    template = tmp_path / "t.jinja"
    template.write_text("{{ messages[0].content }}{% if think is defined %}{{ think }}{% endif %}")
    model = {"name": str(tiny_model_dir), "chat_template": str(template)}
    for kwargs, refused in (({}, False), ({"think": "x" * 90}, True)):
        config = build_config(
            [
                ("test", {"model": {**model, "chat_template_kwargs": kwargs}}),
                ("test", {"rollout": {"max_prompt_length": 90}, "run": {"steps": 1}}),
            ]
        )
        with pytest.raises(TaskError) if refused else nullcontext():
            check_prompts(open_task(config), config)


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


def test_baseline_and_scale_are_as_configured():
    scores = Scores({}, [1.0, 0, 0, 0, 0, 0, 0, 0] * 2)
    (row, _) = advantages(scores, [], configured(scale_rewards="none", baseline="leave_one_out"))
    assert row == pytest.approx([1.0] + [-1 / 7] * 7)
    (row, _) = advantages(scores, [], configured(scale_rewards="batch"))
    assert row[0] == pytest.approx(0.875 / (stdev(scores.total) + 1e-4))


def test_a_dropped_rollout_is_as_if_it_had_not_been_sampled():
    groups = make_groups([(3, [4, 5, 6]), (2, [5, 1, 2])])
    fewer = make_groups([(3, [4, 6]), (2, [5, 1, 2])])
    groups[0].dropped, groups[1].dropped = [False, True, False], [False] * 3
    for loss_type in ("grpo", "dapo", "dr_grpo"):
        (left,) = pack_groups(groups, configured(loss_type=loss_type))
        (expected,) = pack_groups(fewer, configured(loss_type=loss_type))
        assert left.lengths == expected.lengths == (4, 6, 5, 1, 2)
        assert left.weights_N.tolist() == expected.weights_N.tolist()


def test_failures_are_counted_and_drop_where_they_should():
    groups = make_groups([(3, [4, 5]), (2, [5, 1])])
    for group in groups:
        group.rewards = group.advantages = []
    failed = Failure("timeout", "it took more than 1 s")
    mine = Reward("mine", 1.0, lambda **_: [failed, 1.0, 1.0, 3.0])
    for on_error, dropped, advantages_of in (("zero", [False] * 2, 2), ("drop", [True, False], 0)):
        config = build_config(
            [("test", {"rewards": {"on_error": on_error}, "rollout": {"num_generations": 2}})]
        )
        judge(groups, [mine], config)
        assert groups[0].rewards_by_name == {"mine": [None, 1.0]}
        assert groups[0].failures == {"mine": {"timeout": 1}}
        assert groups[1].failures == {"mine": {}}
        assert groups[0].dropped == dropped
        assert sum(a != 0.0 for a in groups[0].advantages) == advantages_of
        assert all(groups[1].advantages)
    config = build_config([("test", {"rewards": {"on_error": "stop"}})])
    with pytest.raises(RewardError, match="'mine' failed for 1 of 4"):
        judge(groups, [mine], config)
