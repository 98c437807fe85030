"""A run with a reward model: trained by its scores, resumed to the bit, held to its plan."""

import json

import pytest

from tests.runs import assert_same_run, call, metrics, train
from tests.tiny import make_tiny_reward_model

HOW = [
    "--reward", "number", "--set", "rewards.weights=[0.5, 1.0]",
    "--set", "rollout.dynamic_sampling=1", "--set", "rollout.max_prompt_length=40",
    "--set", "memory.micro_batch_tokens=150", "--set", "memory.gradient_checkpointing=false",
    "--set", "memory.mlp_tile_tokens=0",
]  # fmt: skip


@pytest.fixture(scope="module")
def reward(tmp_path_factory):
    return make_tiny_reward_model(tmp_path_factory.mktemp("reward") / "model", "qwen2")


@pytest.fixture(scope="module")
def run(tiny_model_dir, tmp_path_factory, reward):
    directory = tmp_path_factory.mktemp("run") / "whole"
    train(tiny_model_dir, directory, "--steps", "2", "--reward", f"model:{reward}", *HOW)
    return directory


def test_its_scores_are_in_the_metrics_and_train(run):
    for record in metrics(run):
        assert record["rewards"].keys() == {"model", "number"}
        assert record["reward_std"] > 0
        assert record["adapter_change"] > 0
        expected = 0.5 * record["rewards"]["model"] + record["rewards"]["number"]
        assert record["reward_mean"] == pytest.approx(expected)


def test_a_step_and_one_more_are_two(tiny_model_dir, tmp_path, reward, run):
    part = tmp_path / "part"
    train(tiny_model_dir, part, "--steps", "1", "--reward", f"model:{reward}", *HOW, "--rehearse")
    train(tiny_model_dir, part, "--steps", "2", "--resume")
    assert_same_run(run, part, 2)
    (rehearsed, *_) = json.loads((part / "memory.json").read_text())
    assert rehearsed["when"] == "rehearsal"
    assert as_planned(rehearsed)


def test_its_phase_takes_what_was_planned(run):
    plan = json.loads((run / "plan.json").read_text())
    names = [phase["name"] for phase in plan["phases"]]
    assert names == ["load", "rollout", "reward", "reference", "update", "optimizer"]
    entries = json.loads((run / "memory.json").read_text())
    assert [entry["when"] for entry in entries] == ["first step", "at the end"]
    assert all(map(as_planned, entries))
    assert call("memory", "report", run).exit_code == 0


def as_planned(entry):
    (row,) = [row for row in entry["comparison"] if row["phase"] == "reward"]
    return row["measured_allocated_bytes"] > 0 and abs(row["allocated_deviation"]) < 0.001


def test_what_is_wrong_with_it_is_said_before_the_directory_is_touched(
    tiny_model_dir, tmp_path, reward
):
    wrong = ["--reward", f"model:{reward},template={tmp_path}/absent.jinja"]
    result = call("train", "--model", tiny_model_dir, "--output", tmp_path / "run", *wrong)
    assert result.exit_code == 2
    assert "template: no such file" in result.stderr
    assert not (tmp_path / "run").exists()


def test_an_evaluation_asks_no_reward_model(run, reward):
    away = reward.rename(reward.with_name("away"))
    try:
        assert call("eval", run, "--num-problems", "2", "--quiet").exit_code == 0
        assert call("sample", run, "2 + 2?", "--quiet").exit_code == 0
    finally:
        away.rename(reward)
