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


def test_a_kl_in_the_reward_and_a_reference_that_moves(tiny_model_dir, tmp_path, reward):
    run = tmp_path / "run"
    settings = ["grpo.use_kl_in_reward=true", "grpo.beta=2", "run.log_rollouts=8"]
    settings += ["grpo.sync_ref_model=true", "grpo.ref_model_sync_steps=2"]
    arguments = [x for setting in settings for x in ("--set", setting)]
    train(tiny_model_dir, run, "--steps", "4", "--reward", reward, *arguments)
    for record, (rewards_BG, advantages_BG) in zip(
        metrics(run), rollouts(run).values(), strict=True
    ):
        assert torch.equal(rewards_BG, rewards_BG.round())  # as they were given
        assert record["reward_mean"] == pytest.approx(rewards_BG.mean().item())
        moved = (advantages_BG - group_advantages(rewards_BG)).abs().max().item()
        if record["step"] in (1, 3):  # the policy is its reference
            assert record["kl"] < 1e-6
            assert moved < 1e-3
        else:
            assert record["kl"] > 1e-4
            assert moved > 0.05
