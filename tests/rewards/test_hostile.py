"""Whatever a reward function or a completion does: the run ends, and every score is counted."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from lowmem_grpo.isolation.worker import Failure, Worker
from lowmem_grpo.rewards import format, load_rewards, math, score
from lowmem_grpo.tasks import load_task
from tests.rewards.hostile import COMPLETIONS, STOPPED_BY, functions
from tests.runs import call, train

ALL = functions("")
REASONS = {"timeout", "died", "raised", "invalid"}


@pytest.fixture(scope="module")
def missing():
    """The limits that this machine does not have."""
    worker = Worker("builtins:dict", {})
    worker.start()
    worker.close()
    return worker.missing


def harmless(numbers, missing):
    """Without the deeds that nothing would stop here: they would be done to this machine."""
    stopped = {deed for limit in missing for deed in STOPPED_BY.get(limit, ())}
    return [n for n in numbers if ALL[n][0].rpartition(", ")[0] not in stopped]


def run_with(tiny_model_dir, tmp_path, numbers, *settings):
    """Train two steps with these hostile functions beside an honest reward."""
    precious = tmp_path / "precious"
    (precious / "deep").mkdir(parents=True)
    for path in (precious / "kept", precious / "deep/kept"):
        path.write_text("kept")
    sources = functions(str(precious))
    arguments = ["--reward", "number", "--set", "rewards.check_first_step=false"]
    for number in numbers:
        path = tmp_path / f"f{number}.py"
        path.write_text(sources[number][1])
        arguments += ["--reward", f"{path}:f"]
    before = children()
    train(tiny_model_dir, tmp_path / "run", "--steps", "2", *arguments, *settings)
    assert children() == before
    assert sorted(p.name for p in precious.rglob("*")) == ["deep", "kept", "kept"]
    assert (precious / "kept").read_text() == (precious / "deep/kept").read_text() == "kept"
    for number in numbers:
        assert (tmp_path / f"f{number}.py").read_text() == sources[number][1]
    lines = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def children():
    return Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text()


def assert_accounted_for(records, rollouts, count):
    logged = [json.loads(line) for line in rollouts.read_text().splitlines()]
    assert len(records) == 2
    for record in records:
        step = [line for line in logged if line["step"] == record["step"]]
        assert len(step) == record["rollouts"] == 8
        assert len(record["rewards"]) == count + 1
        for name, mean in record["rewards"].items():
            values = [line["rewards"][name] for line in step]
            reasons = record["reward_failures"].get(name, {})
            assert values.count(None) == sum(reasons.values())
            assert set(reasons) <= REASONS
            assert (mean is None) == (values.count(None) == len(values))
            assert all(value in (0.0, 0.5, 1.0) for value in values if value is not None)


def test_a_run_with_hostile_rewards_ends(tiny_model_dir, tmp_path, missing):
    names = [name for name, _ in ALL]
    expected = {
        "sleeps": {"timeout": 8},
        "exits at once": {"died": 8},
        "allocates 50 GB": {"raised": 8},
        "returns NaN": {"invalid": 8},
        "returns too few": {"invalid": 8},
        "deletes files": {"raised": 8},
        "kills its parent": {"raised": 8},
        "writes to every pipe": {"died": 8},
        "forks and the child hangs": {},
    }
    numbers = harmless([names.index(f"{name}, always") for name in expected], missing)
    expected = {name: expected[name] for name in (ALL[n][0].rpartition(", ")[0] for n in numbers)}
    settings = ["--set", "rewards.timeout=0.5", "--set", "run.log_rollouts=8"]
    records = run_with(tiny_model_dir, tmp_path, numbers, *settings)
    assert_accounted_for(records, tmp_path / "run/rollouts.jsonl", len(numbers))
    said = (tmp_path / "run/rewards.log").read_text(errors="replace")
    assert "MemoryError" in said
    in_order = ["f", *(f"f_{i}" for i in range(2, len(expected) + 1))]
    wanted = {name: x for name, x in zip(in_order, expected.values(), strict=True) if x}
    for record in records:
        assert record["reward_failures"].keys() == wanted.keys()
        for name, reasons in record["reward_failures"].items():
            # On a busy machine some have no time left before they could do what they do.
            assert sum(reasons.values()) == 8
            assert reasons.keys() <= {*wanted[name], "timeout"}


@pytest.mark.slow
@pytest.mark.parametrize("part", range(10))
def test_two_hundred_hostile_rewards(tiny_model_dir, tmp_path, missing, part):
    numbers = harmless(range(part, len(ALL), 10), missing)
    assert len(ALL) >= 200
    settings = ["--set", "rewards.timeout=3", "--set", "run.log_rollouts=8"]
    records = run_with(tiny_model_dir, tmp_path, numbers, *settings)
    assert_accounted_for(records, tmp_path / "run/rollouts.jsonl", len(numbers))


@pytest.mark.slow
def test_dropped_rollouts_leave_a_run_going(tiny_model_dir, tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(
        "def f(completions):\n"
        "    return [float('nan') if len(t) % 2 else float(len(t)) for t in completions]\n"
    )
    run = tmp_path / "run"
    settings = ["--set", "rewards.on_error=drop", "--reward", f"{path}:f"]
    train(tiny_model_dir, run, "--steps", "2", *settings)
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for record in records:
        failed = record["reward_failures"].get("f", {}).get("invalid", 0)
        assert record["dropped_rollouts"] == failed
        assert record["skipped_rollouts"] >= failed
    assert any(record["dropped_rollouts"] for record in records)
    stopped = call(
        "train", "--resume", "--steps", "9", "--output", run, "--set", "rewards.on_error=stop"
    )
    assert stopped.exit_code == 2  # it would be another run


def test_hostile_completions_get_a_score_or_a_reason(monkeypatch):
    monkeypatch.setattr(math, "LIMIT_S", 0.3)
    monkeypatch.setattr(format, "LIMIT_S", 1.0)
    task = load_task("arithmetic", seed=0)
    specs = ["number", "math", "task", "format:(a+)+c", "repetition:ngram=3"]
    specs += ["overlong:max=9,cache=4"]
    problems = [task.train_problem(i) for i in range(len(COMPLETIONS))]
    ids = [list(range(min(len(text), 20))) for text in COMPLETIONS]
    scores = score(load_rewards(specs, None, task), COMPLETIONS, problems, ids)
    for name, values in scores.by_name.items():
        for i, value in enumerate(values):
            if value is None:
                assert isinstance(scores.failures[name][i], Failure)
            else:
                assert -1.0 <= value <= 0.0 or value == 1.0
    assert set(scores.failures) <= {"math", "format"}
    assert COMPLETIONS.index("a" * 40_000 + "b") in scores.failures["format"]
