"""A step's record: means over the right things, and JSON whatever happened."""

import math

import pytest
import torch

from lowmem_grpo.grpo.update import UpdateStats
from lowmem_grpo.rollout.types import Group, Rollout
from lowmem_grpo.run.checkpoint import State
from lowmem_grpo.run.console import step_line
from lowmem_grpo.run.meter import Meter
from lowmem_grpo.run.metrics import step_record
from lowmem_grpo.tasks.base import Problem


def record(**changes):
    rollouts = [
        Rollout([1] * n, [-1.0] * n, reason, "") for n, reason in ((2, "stop"), (4, "length"))
    ]
    groups = [
        Group(
            Problem("a", (), "1"), [1], rollouts, [1.0, 0.0], [0.7, -0.7], {"number": [1.0, 0.0]}
        ),
        Group(Problem("b", (), "1"), [1], rollouts, [1.0, 1.0], [0.0, 0.0], {"number": [1.0, 1.0]}),
    ]
    stats = UpdateStats(
        loss=0.5, tokens_scored=6, tokens_trunk=9, sums={"entropy": 12.0, "sampler_kl": 0.6}
    )
    settings = {
        "stats": stats, "trained": 2, "grad_norm": 1.0, "adapter_change": 0.1,
        "learning_rate": 1e-3, "meter": Meter(torch.device("cpu")),
    }  # fmt: skip
    state = State(groups=groups, groups_away=1, tokens_away=5)
    for name in vars(state).keys() & changes.keys():
        setattr(state, name, changes.pop(name))
    return step_record(state, **{**settings, **changes})


def test_means():
    found = record()
    assert found["reward_mean"] == 0.75
    assert found["rewards"] == {"number": 0.75}
    assert found["frac_reward_zero_std"] == 0.5
    assert found["reward_std"] == pytest.approx(math.sqrt(0.5) / 2)
    assert found["entropy"] == 2.0
    assert found["sampler_kl"] == pytest.approx(0.1)
    assert found["kl"] is None  # there was no reference
    assert found["completion_length_mean"] == 3.0
    assert found["completion_truncated_fraction"] == 0.5
    assert found["tokens_generated"] == 12 + 5
    assert (found["groups_replaced"], found["tokens_replaced"]) == (1, 5)
    assert found["skipped_rollouts"] == 2


def test_rewards_that_say_nothing_are_counted_whatever_a_kl_adds():
    rollouts = [Rollout([1], [-1.0], "stop", "") for _ in range(2)]
    flat = {"number": [1.0, 1.0]}, {"number": [0.0, 1.0]}
    groups = [
        Group(Problem("a", (), "1"), [1], rollouts, list(by_name["number"]), [0.2, -0.2], by_name)
        for by_name in flat
    ]
    assert record(groups=groups)["frac_reward_zero_std"] == 0.5


def test_a_later_iteration_generates_nothing_and_has_no_sampler_kl():
    found = record(iteration=1)
    assert found["tokens_generated"] == 0
    assert found["sampler_kl"] is None


def test_the_loss_scale_of_float16_is_recorded():
    assert record()["loss_scale"] is None
    assert record(scaler={"scale": 1024.0})["loss_scale"] == 1024.0


def test_a_step_without_trained_tokens_has_a_line():
    assert "reward 0.750" in step_line(record(stats=UpdateStats()), 10)


def test_rewards_that_tell_nothing_apart_are_named():
    assert record()["constant_rewards"] == []
    rollouts = [Rollout([1], [-1.0], "stop", "")] * 2
    groups = [
        Group(Problem("a", (), "1"), [1], rollouts, [1.0, 0.0], [0.7, -0.7], by_name)
        for by_name in (
            {"number": [1.0, 0.0], "format": [0.5, 0.5]},
            {"number": [0.0, 0.0], "format": [0.5, 0.5]},
        )
    ]
    assert record(groups=groups)["constant_rewards"] == ["format"]
