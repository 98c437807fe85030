"""The batch in hand: failures, drops, advantages, and groups that make way for others."""

import copy
import json
from statistics import fmean, stdev

import pytest

from lowmem_grpo.batch import complete, has_signal, judge, pack_groups, set_advantages
from lowmem_grpo.config import build_config
from lowmem_grpo.errors import RewardError
from lowmem_grpo.isolation.worker import Failure
from lowmem_grpo.rewards import Reward
from lowmem_grpo.run.checkpoint import State, read_group
from lowmem_grpo.setup import sampling_of, update_settings
from tests.grpo.rollouts import make_groups
from tests.runs import assert_same_run, call, metrics, train


def configured(**grpo):
    return build_config([("test", {"grpo": grpo, "memory": {"micro_batch_tokens": 1000}})])


def scored(rows, **by_name):
    """Groups of one-token completions with these rewards."""
    groups = make_groups([(2, [1] * len(row)) for row in rows])
    for i, (group, row) in enumerate(zip(groups, rows, strict=True)):
        group.rewards = row
        group.rewards_by_name = {name: values[i] for name, values in by_name.items()}
    return groups


def advantages(groups, rewards, config):
    set_advantages(groups, rewards, config)
    return [group.advantages for group in groups]


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
    set_advantages(groups, rewards, config)
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


def test_several_rewards_are_normalised_as_configured():
    rewards = [Reward("right", 1.0, None), Reward("short", 0.5, None)]
    right, short = [1.0, 0.0] * 4, [0.0, 2.0] * 4
    total = [r + 0.5 * s for r, s in zip(right, short, strict=True)]
    groups = scored([total, total], right=[right, right], short=[short, short])
    assert advantages(groups, rewards, configured()) == [[0.0] * 8] * 2
    each = configured(multi_objective_aggregation="normalize_then_sum")
    found = advantages(groups, rewards, each)
    assert found[0][0] > 0 > found[0][1]
    # So the same groups have a signal or not.
    assert [has_signal(groups[0], configured()), has_signal(groups[0], each)] == [False, True]


def test_baseline_and_scale_are_as_configured():
    groups = scored([[1.0, 0, 0, 0, 0, 0, 0, 0]] * 2)
    (row, _) = advantages(groups, [], configured(scale_rewards="none", baseline="leave_one_out"))
    assert row == pytest.approx([1.0] + [-1 / 7] * 7)
    (row, _) = advantages(groups, [], configured(scale_rewards="batch"))
    assert row[0] == pytest.approx(0.875 / (stdev(groups[0].rewards * 2) + 1e-4))


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
    for on_error, dropped, with_advantage in (("zero", [False] * 2, 2), ("drop", [True, False], 0)):
        config = build_config(
            [("test", {"rewards": {"on_error": on_error}, "rollout": {"num_generations": 2}})]
        )
        judge(State(groups=groups), [mine], config, None)
        set_advantages(groups, [mine], config)
        assert groups[0].rewards_by_name == {"mine": [None, 1.0]}
        assert groups[0].failures == {"mine": {"timeout": 1}}
        assert groups[1].failures == {"mine": {}}
        assert groups[0].dropped == dropped
        assert sum(a != 0.0 for a in groups[0].advantages) == with_advantage
        assert all(groups[1].advantages)
        for group in groups:
            group.rewards = []
    config = build_config([("test", {"rewards": {"on_error": "stop"}})])
    with pytest.raises(RewardError, match="'mine' failed for 1 of 4"):
        judge(State(groups=groups), [mine], config, None)


def test_a_batch_is_complete_when_its_groups_are_scored_and_have_a_signal():
    config = build_config([("test", {"rollout": {"dynamic_sampling": 2}})])
    state = State()
    assert not complete(state, config)
    state.groups, state.rounds = scored([[1.0, 1.0], [0.0, 1.0]]), 1
    assert not complete(state, config)
    assert complete(state, build_config([]))
    state.rounds = 3  # the first one and two more
    assert complete(state, config)
    state.groups[1].rewards = []
    assert not complete(state, config)
    state.groups, state.rounds = scored([[1.0, 0.0], [0.0, 1.0]]), 1
    assert complete(state, config)


REWARD = """
def odd(completions, operands, **_):
    # No group has a signal where the first operand is even.
    return [float(len(t) * (o[0] % 2)) for t, o in zip(completions, operands)]
"""


@pytest.fixture
def odd(tmp_path):
    path = tmp_path / "odd.py"
    path.write_text(REWARD)
    settings = ["--task", "arithmetic:digits=3", "--set", "rollout.dynamic_sampling=3"]
    return [*settings, "--reward", f"{path}:odd"]


def test_groups_without_a_signal_make_way_and_are_counted(tiny_model_dir, tmp_path, odd):
    run = tmp_path / "run"
    train(tiny_model_dir, run, "--steps", "3", "--set", "run.log_rollouts=8", *odd)
    records = metrics(run)
    assert sum(record["groups_replaced"] for record in records) > 0
    lines = [json.loads(line) for line in (run / "rollouts.jsonl").read_text().splitlines()]
    for record in records:
        step = [line for line in lines if line["step"] == record["step"]]
        assert len({line["problem"] for line in step}) == 2
        lengths = sum(line["tokens"] for line in step)
        assert record["tokens_generated"] == lengths + record["tokens_replaced"]
        assert (record["tokens_replaced"] > 0) == (record["groups_replaced"] > 0)
        if record["frac_reward_zero_std"]:
            assert record["groups_replaced"] >= 3  # all rounds were used
    # No problem comes twice: the next batch begins where this one ended.
    problems = [line["problem"] for line in lines]
    assert len(set(problems)) == 6


@pytest.mark.slow
def test_such_a_run_resumes_exactly_with_a_curriculum_too(tiny_model_dir, tmp_path, odd):
    odd = [*odd, "--set", "rollout.curriculum=3", "--set", "rollout.curriculum_field=operands"]
    train(tiny_model_dir, tmp_path / "whole", "--steps", "4", *odd)
    part = tmp_path / "part"
    train(tiny_model_dir, part, "--steps", "2", *odd)
    assert call("train", "--output", part, "--resume", "--steps", "4", "-q").exit_code == 0
    assert_same_run(tmp_path / "whole", part, 4)
    compared = json.loads((part / "memory.json").read_text())
    rows = [row for entry in compared for row in entry["comparison"]]
    assert rows
    assert all(abs(row["allocated_deviation"]) < 0.05 for row in rows)
    state = json.loads((part / "checkpoints/step-000004/state.json").read_text())
    replaced = sum(record["groups_replaced"] for record in metrics(part))
    assert state["problems"] == (4 * 2 + replaced) * 3
    known = state["rates"]["known"]
    assert len([key for key in known if key.startswith("arithmetic/")]) == 4 * 2 + replaced
    assert state["rates"]["low"] == 0.0 < state["rates"]["high"]


def test_the_trainer_as_old_policy_starts_at_ratios_of_one_and_resumes(tiny_model_dir, tmp_path):
    """Its log-probs are those of the first update on a batch, kept for the others."""
    settings = ["--set", "grpo.old_policy=trainer", "--set", "grpo.num_iterations=2"]
    settings += ["--reward", "repetition:ngram=1", "--set", "optimizer.learning_rate=1e-1"]
    whole, part = tmp_path / "whole", tmp_path / "part"
    train(tiny_model_dir, whole, "--steps", "4", *settings)
    train(tiny_model_dir, part, "--steps", "3", *settings)  # between two iterations
    state = json.loads((part / "checkpoints/step-000003/state.json").read_text())
    rollouts = [rollout for group in state["groups"] for rollout in group["rollouts"]]
    for rollout in rollouts:
        assert rollout["old_logprobs"] == pytest.approx(rollout["logprobs"], abs=1e-4)
        assert rollout["old_logprobs"] != rollout["logprobs"]
    assert call("train", "--output", part, "--resume", "--steps", "4", "-q").exit_code == 0
    assert_same_run(whole, part, 4)
    records = metrics(whole)
    clipped = [record["clip_fraction_low"] + record["clip_fraction_high"] for record in records]
    assert clipped[0] == clipped[2] == 0.0 < clipped[1]
    assert 0.0 < records[0]["sampler_kl"] < 1e-8


def test_rewards_of_steps_become_advantages_of_their_tokens(tiny_model_dir, tmp_path):
    path = tmp_path / "steps.py"
    path.write_text(
        "def each(completions, steps):\n"
        "    return [[float(sum(map(ord, s)) % 3) for s in of_one] for of_one in steps]\n"
    )
    # The tiny model's tokens are decoded with spaces between them.
    settings = ["--reward", f"{path}:each", "--set", 'rewards.step_separator=" "']
    settings += ["--set", "grpo.num_iterations=2"]
    whole, part = tmp_path / "whole", tmp_path / "part"
    train(tiny_model_dir, whole, "--steps", "3", *settings)
    train(tiny_model_dir, part, "--steps", "1", *settings)
    state = json.loads((part / "checkpoints/step-000001/state.json").read_text())
    groups = [read_group(group) for group in state["groups"]]
    assert any(len(ends) > 1 for group in groups for ends in group.step_ends)
    for group in groups:
        assert group.advantages == [0.0] * 4  # no reward is of the whole
        flat = [reward for steps in group.step_rewards for reward in steps]
        mean, std = fmean(flat), stdev(flat)
        for place, rollout in enumerate(group.rollouts):
            ends, own = group.step_ends[place], group.step_rewards[place]
            later = [sum((r - mean) / (std + 1e-4) for r in own[j:]) for j in range(len(own))]
            tokens = group.token_advantages(place)
            assert len(tokens) == len(rollout.completion_ids) == ends[-1]
            for step, (start, end) in enumerate(zip([0, *ends], ends, strict=False)):
                assert tokens[start:end] == pytest.approx([later[step]] * (end - start))
            assert group.rewards[place] == pytest.approx(fmean(own))
    (batch,) = pack_groups(groups, configured())
    expected = [a for g in groups for place in range(4) for a in g.token_advantages(place)]
    assert batch.advantages_N.tolist() == pytest.approx(expected)
    assert call("train", "--output", part, "--resume", "--steps", "3", "-q").exit_code == 0
    assert_same_run(whole, part, 3)
    assert all(record["frac_reward_zero_std"] < 1 for record in metrics(whole))
