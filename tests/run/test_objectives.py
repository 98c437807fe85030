"""Objectives in whole runs: what a setting changes shows in the files that the run leaves."""

import json

import pytest
import torch

from lowmem_grpo.grpo.advantages import group_advantages
from tests.runs import metrics, train


@pytest.fixture
def reward(tmp_path):
    """Different for most completions, and not for all."""
    file = tmp_path / "reward.py"
    file.write_text("def length(completions, **_): return [float(len(c) % 4) for c in completions]")
    return f"{file}:length"


def rollouts(run):
    """(rewards, advantages) of each step, [problems, completions]; all must have been logged."""
    rows = [json.loads(line) for line in (run / "rollouts.jsonl").read_text().splitlines()]
    found = {}
    for row in rows:
        found.setdefault(row["step"], {}).setdefault(row["problem"], []).append(row)
    for step, groups in found.items():
        columns = (
            [[r[key] for r in g] for g in groups.values()] for key in ("reward", "advantage")
        )
        found[step] = tuple(torch.tensor(column, dtype=torch.float64) for column in columns)
    return found


def test_a_kl_in_the_reward_moves_advantages_and_no_reward(tiny_model_dir, tmp_path, reward):
    run = tmp_path / "run"
    settings = ["grpo.use_kl_in_reward=true", "grpo.beta=2", "run.log_rollouts=8"]
    arguments = [x for setting in settings for x in ("--set", setting)]
    train(tiny_model_dir, run, "--steps", "2", "--reward", reward, *arguments)
    first, second = rollouts(run).values()
    records = metrics(run)
    for (rewards_BG, advantages_BG), record in zip((first, second), records, strict=True):
        assert record["reward_mean"] == pytest.approx(rewards_BG.mean().item())
        moved = (advantages_BG - group_advantages(rewards_BG)).abs().max().item()
        if record["step"] == 1:  # the policy is its reference still
            assert moved < 1e-3
            assert record["kl"] < 1e-6
        else:
            assert moved > 0.05
            assert record["kl"] > 1e-4
    assert torch.equal(first[0], first[0].round())  # rewards as they were given


def test_a_reference_that_moves_is_where_the_policy_was(tiny_model_dir, tmp_path, reward):
    run = tmp_path / "run"
    settings = ["grpo.sync_ref_model=true", "grpo.ref_model_sync_steps=2", "run.save_every=1"]
    arguments = [x for setting in settings for x in ("--set", setting)]
    train(tiny_model_dir, run, "--steps", "4", "--reward", reward, *arguments)
    kl = [record["kl"] for record in metrics(run)]
    # Nothing lies between the two at the start and after the second step.
    assert max(kl[0], kl[2]) < 1e-6
    assert min(kl[1], kl[3]) > 1e-4
