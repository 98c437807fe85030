"""The base as the old policy: groups sampled by it, in a pool or in each step, and trained on."""

import json
from statistics import fmean

import pytest
from filelock import FileLock
from safetensors.torch import load_file, save_file

from lowmem_grpo.checksum import sealed, unsealed
from lowmem_grpo.config import build_config
from lowmem_grpo.errors import ConfigError
from lowmem_grpo.pool import open_pool
from tests.runs import TINY, assert_same_run, call, metrics, train
from tests.tiny import make_tiny_model

BASE = ["--set", "grpo.old_policy=base"]
TASK = ["--task", "arithmetic:digits=2", "--reward", "repetition:ngram=1"]


def shape(model):
    flags = [x for x in TINY if not x.startswith(("run.log", "optimizer."))]
    flags = [x for i, x in enumerate(flags) if x != "--set" or "=" in flags[i + 1]]
    return ["--model", model, *flags, "--task", "arithmetic:digits=2"]


def fill(model, pool, count, *more):
    result = call("rollouts", *shape(model), "--groups", str(count), "--output", pool, *more)
    assert result.exit_code == 0, result.stderr
    return [json.loads(line) for line in (pool / "groups.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("command", ["train", "rollouts"])
def test_a_pool_that_is_not_what_was_written(tiny_model_dir, tmp_path, command):
    pool = tmp_path / "pool"
    fill(tiny_model_dir, pool, 3)
    arguments = [command, *shape(tiny_model_dir)]
    if command == "train":
        arguments += [*BASE, "--pool", pool, "--output", tmp_path / "run"]
    else:
        arguments += ["--groups", "4", "--output", pool]
    groups, document = pool / "groups.jsonl", pool / "pool.json"
    first, *lines = groups.read_text().splitlines()
    logprob = json.loads(first)["rollouts"][0]["logprobs"][0]
    for file, text, says in (
        (groups, "\n".join([first.replace(str(logprob), "-1.5"), *lines, ""]), "line 1 of "),
        (groups, "\n".join([first, "{}", *lines, ""]), "line 2 of "),
        (document, document.read_text().replace("arithmetic", "countdown"), "its sha256 differs"),
        (document, "[" * 99_999, "pool.json"),
        (document, json.dumps({"format": 1, "groups": 3}), "no checksum: make another pool"),
    ):
        good = file.read_text()
        file.write_text(text)
        refused = call(*arguments)
        assert refused.exit_code in (1, 2)
        assert says in refused.stderr
        assert "debug" not in refused.stderr
        assert file.read_text() == text
        file.write_text(good)
    groups.unlink()
    groups.mkdir()
    assert "groups.jsonl: Is a directory" in call(*arguments).stderr
    assert not (tmp_path / "run").exists()


def test_a_pool_is_the_same_however_often_it_was_interrupted(tiny_model_dir, tmp_path):
    whole = fill(tiny_model_dir, tmp_path / "whole", 6)
    part = tmp_path / "part"
    fill(tiny_model_dir, part, 3)  # a batch and a half
    with (part / "groups.jsonl").open("a") as file:
        file.write('{"problem": {"id": "cut')
    assert fill(tiny_model_dir, part, 6) == whole
    assert len({group["problem"]["id"] for group in whole}) == 6
    for group in whole:
        assert group["rewards"] == group["advantages"] == []
        for rollout in group["rollouts"]:
            # The base's own log-probs, taken twice, by sampler and trainer.
            assert rollout["ref_logprobs"] == pytest.approx(rollout["logprobs"], abs=1e-4)
    cut = ["--set", "rollout.top_p=0.5"]
    refused = call("rollouts", *shape(tiny_model_dir), *cut, "--groups", "2", "--output", part)
    assert refused.exit_code == 2
    assert "rollout.top_p = 0.5" in refused.stderr
    fewer = call("rollouts", *shape(tiny_model_dir), "--groups", "2", "--output", part)
    assert fewer.exit_code == 2
    assert "has 6 groups already" in fewer.stderr


def test_a_pool_is_made_by_one_process_and_nowhere_else(tiny_model_dir, tmp_path):
    pool, other = tmp_path / "pool", tmp_path / "other"
    arguments = ["rollouts", *shape(tiny_model_dir), "--groups", "2", "--output"]
    pool.mkdir()
    with FileLock(pool / "pool.lock"):
        refused = call(*arguments, pool)
    assert refused.exit_code == 2
    assert f"another process makes the pool in {pool}" in refused.stderr
    assert [file.name for file in pool.iterdir()] == ["pool.lock"]
    assert len(fill(tiny_model_dir, pool, 2)) == 2  # the lock alone is no pool
    other.mkdir()
    (other / "thesis.tex").write_text("years of work")
    refused = call(*arguments, other)
    assert refused.exit_code == 2
    assert "give the directory of a pool" in refused.stderr
    assert [file.name for file in other.iterdir()] == ["thesis.tex"]


def test_steps_train_on_a_pool_without_sampling_and_resume_exactly(tiny_model_dir, tmp_path):
    groups = fill(tiny_model_dir, tmp_path / "pool", 6)
    own = [*BASE, *TASK, "--pool", tmp_path / "pool", "--set", "run.log_rollouts=8"]
    whole, part = tmp_path / "whole", tmp_path / "part"
    train(tiny_model_dir, whole, "--steps", "6", *own)
    train(tiny_model_dir, part, "--steps", "2", *own)
    resumed = call("train", "--output", part, "--resume", "--steps", "6", "-q")
    assert resumed.exit_code == 0, resumed.stderr
    assert_same_run(whole, part, 6)
    lines = [json.loads(line) for line in (whole / "rollouts.jsonl").read_text().splitlines()]
    for first, last in ((1, 3), (4, 6)):  # an epoch is three steps of two groups
        epoch = [line["problem"] for line in lines if first <= line["step"] <= last]
        assert set(epoch) == {group["problem"]["id"] for group in groups}
    records = metrics(whole)
    assert records[0]["kl"] == pytest.approx(0.0, abs=1e-9)
    assert records[-1]["kl"] > 1e-4
    assert all(record["sampler_kl"] < 1e-8 for record in records)  # of the base, however far we are
    seconds = json.loads((whole / "metrics.jsonl").read_text().splitlines()[1])["seconds"]
    assert "reference" not in seconds
    plan = json.loads((whole / "plan.json").read_text())
    names = [phase["name"] for phase in plan["phases"]]
    assert names == ["load", "update", "optimizer"]
    assert records[0]["tokens_generated"] == 0
    compared = json.loads((whole / "memory.json").read_text())[0]["comparison"]
    assert {row["phase"] for row in compared} >= {"update"}
    assert all(abs(row["allocated_deviation"]) < 0.05 for row in compared)

    fill(tiny_model_dir, tmp_path / "pool", 8)
    refused = call("train", "--output", part, "--resume", "--steps", "8", "-q")
    assert refused.exit_code == 2
    assert "the pool has 8 groups, and the run was started with 6" in refused.stderr


def test_without_a_pool_each_step_samples_from_the_base(tiny_model_dir, tmp_path):
    run = tmp_path / "run"
    train(tiny_model_dir, run, "--steps", "3", *BASE, *TASK, "--set", "grpo.beta=0")
    records = metrics(run)
    assert all(record["sampler_kl"] < 1e-8 for record in records)
    assert records[0]["clip_fraction_high"] == records[0]["clip_fraction_low"] == 0.0
    # The policy moves away from the base, and ratios with it; a run that samples from itself starts
    # every step at 1.
    away = [r["clip_fraction_high"] + r["clip_fraction_low"] for r in records[1:]]
    assert fmean(away) > 0.0
    memory = json.loads((run / "memory.json").read_text())
    rows = [row for entry in memory for row in entry["comparison"]]
    assert {row["phase"] for row in rows} >= {"rollout", "reference", "update"}
    assert all(abs(row["allocated_deviation"]) < 0.05 for row in rows)


def test_a_pool_of_other_weights_of_that_name_is_refused(tmp_path):
    model, pool = make_tiny_model(tmp_path / "model"), tmp_path / "pool"
    fill(model, pool, 2)
    own = [*BASE, "--pool", pool, "--reward", "repetition:ngram=1", "--steps", "1"]
    weights = load_file(model / "model.safetensors")
    weights["model.norm.weight"][0] += 1.0
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    for command in (
        ["train", *shape(model), *own, "--output", tmp_path / "run"],
        ["rollouts", *shape(model), "--groups", "4", "--output", pool],
    ):
        refused = call(*command)
        assert refused.exit_code == 2, refused.stderr
        assert f"{pool} was sampled with other weights of the same name" in refused.stderr
    # On another kind of device the same weights may have another digest.
    document = unsealed((pool / "pool.json").read_text())
    (pool / "pool.json").write_text(sealed(document | {"base": "cuda:another"}))
    fill(model, pool, 4)
    assert unsealed((pool / "pool.json").read_text())["base"] == "cuda:another"


def test_a_pool_that_does_not_fit_is_refused(tiny_model_dir, tmp_path):
    pool = tmp_path / "pool"
    fill(tiny_model_dir, pool, 2)
    arguments = ["train", *shape(tiny_model_dir), "--pool", pool, "--output", tmp_path / "run"]
    for more, says in (
        ([], "use grpo.old_policy = base"),
        ([*BASE, "--num-generations", "2"], "num_generations = 4, and this has 2"),
        ([*BASE, "--set", "task.eval_fraction=0.5"], "task.eval_fraction = 0.1, and this has 0.5"),
        ([*BASE, "--max-prompt-length", "5"], "use --max-prompt-length"),
        ([*BASE, "--set", "grpo.top_entropy_quantile=0.5"], "lacks entropies"),
        ([*BASE, "--set", "grpo.use_kl_in_reward=true"], "leave out grpo.use_kl_in_reward"),
        ([*BASE, "--pool", tmp_path / "gone"], "pool.json: "),
    ):
        refused = call(*arguments, *more)
        assert refused.exit_code == 2, refused.stderr
        assert says in refused.stderr
    lines = (pool / "groups.jsonl").read_text().splitlines(keepends=True)
    (pool / "groups.jsonl").write_text(lines[0])
    refused = call(*arguments, *BASE)
    assert "has 1 of 2 groups" in refused.stderr
    assert open_pool(build_config([])) is None
    settings = {"rollout": {"pool": str(tmp_path)}, "grpo": {"old_policy": "base"}}
    with pytest.raises(ConfigError, match=r"pool\.json: No such file"):
        open_pool(build_config([("test", settings)]))
