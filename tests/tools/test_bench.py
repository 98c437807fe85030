"""The benchmark's counting: what it says was computed is what a known step computes."""

import pytest

from lowmem_grpo.setup import open_task
from tools.bench import ours
from tools.bench.configs import learning_config, made_config
from tools.bench.curve import reached, running_mean
from tools.bench.report import compare, time_to_reward
from tools.bench.workloads import WORKLOADS

STEPS, B, G, C = 3, 2, 4, 6
WORK = {"problems": B, "group": G, "filler": 0, "new_tokens": C, "flat": False, "beta": 0.04}
PROMPT = len("What is 0 + 0? Answer with the number only.") + 3  # the tiny template's marks


@pytest.fixture
def tiny(tiny_model_dir):
    return {"model": {"name": str(tiny_model_dir), "device": "cpu", "compute_dtype": "float32"}}


def test_every_second_problem_of_a_sparse_step_is_flat(tmp_path):
    task = open_task(made_config(WORKLOADS["sparse"], 3, tmp_path))
    problems = [task.train_problem(i) for i in range(3 * WORKLOADS["sparse"]["problems"])]
    assert [p.fields["flat"] for p in problems] == [False, True] * 6
    assert len({p.messages[0]["content"] for p in problems}) == 12


def test_ours_counts_a_prompt_once_and_no_last_token(tmp_path, tiny):
    found = ours.run(made_config(WORK, STEPS, tmp_path, **tiny))
    whole = B * (PROMPT + G * (C - 1))
    for step in found["steps"]:
        assert step["tokens"] == {
            "rollout": whole, "reward": 0, "reference": whole, "update": whole,
        }  # fmt: skip
        assert step["seconds"] >= sum(step["phases"].values()) > 0
    traced = [bool(step["allocated"]) for step in found["steps"]]
    assert traced == [True, False, True]
    assert found["steps"][0]["allocated"]["update"] > found["loaded_bytes"] > 0


def test_trl_counts_a_prompt_with_every_completion(tmp_path, tiny):
    pytest.importorskip("trl")
    from tools.bench import trl_side

    found = trl_side.run(made_config(WORK, STEPS, tmp_path, **tiny))
    assert len(found["steps"]) == STEPS
    for step in found["steps"]:
        rows = B * G
        assert step["tokens"] == {
            "rollout": rows * (PROMPT + C - 1),
            "reward": 0,
            "reference": rows * (PROMPT + C),
            "update": rows * (PROMPT + C),
        }
        assert step["seconds"] >= sum(step["phases"].values()) > 0


@pytest.mark.slow
def test_both_sides_stop_at_the_reward(tmp_path, tiny):
    pytest.importorskip("trl")
    from tools.bench import trl_side

    for run in (ours.run, trl_side.run):
        scratch = tmp_path / run.__module__
        found = run(learning_config(1, 7, scratch, **tiny), until=0.0)
        assert len(found["steps"]) == 5


def test_running_mean():
    rewards = [0.0, 0.0, 1.0, 1.0, 1.0, 1.0, 1.0]
    assert running_mean(rewards) == [0.6, 0.8, 1.0]
    assert reached(rewards, 0.8) == 6
    assert reached(rewards[:5], 0.8) is reached(rewards[:4], 0.0) is None


def test_compare():
    def side(factor):
        step = {
            "seconds": 10.0 * factor,
            "phases": {"rollout": 6.0 * factor, "reward": 0.0, "reference": 1.0, "update": 2.0},
            "tokens": {"rollout": 3, "reward": 0, "reference": 2, "update": 2},
            "peak_bytes": int(factor * 2**30),
        }
        odd = {**step, "seconds": 1000.0, "peak_bytes": int(2 * factor * 2**30)}
        return {"steps": [odd, step, step], "counted": [1, 2]}

    found = compare([{"ours": side(1), "trl": side(2)}, {"ours": side(1), "trl": side(4)}])
    assert found["seconds"]["step"] == {"ours": 10, "trl": 30, "ratio": 3, "spread": [2, 4]}
    assert found["seconds"]["rollout"]["ratio"] == 3
    assert found["seconds"]["reward"]["ratio"] is None
    assert found["seconds"]["other"]["ours"] == 1
    assert found["tokens"]["step"] == {"ours": 7, "trl": 7, "ratio": 1, "spread": [1, 1]}
    assert found["memory"]["peak"] == {"ours": 2, "trl": 6, "ratio": 3, "spread": [2, 4]}


def test_time_to_reward():
    def run(side, seed, *rewards):
        ended = [60.0 * (1 + 2 * (side == "trl")) * (i + 1) for i in range(len(rewards))]
        return {"side": side, "seed": seed, "reward": list(rewards), "ended": ended}

    runs = [run("ours", 0, *[1.0] * 5), run("trl", 0, 0.0, *[1.0] * 5), run("ours", 1, 0.5)]
    first, second = time_to_reward([*runs, run("trl", 1, 0.5)], 0.9)
    assert first["ours"] == {"steps": 5, "minutes": 5.0}
    assert first["trl"] == {"steps": 6, "minutes": 18.0}
    assert first["ratio"] == 3.6
    assert second["ours"] == second["trl"] == {"steps": None, "minutes": None}
    assert second["ratio"] is None
