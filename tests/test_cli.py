"""The command line: what it prints, what it refuses, and with which exit code."""

import json
import subprocess
import sys

import pytest
from safetensors.torch import load_file

from tests.runs import TINY, call, metrics, train


@pytest.fixture(scope="module")
def run(tiny_model_dir, tmp_path_factory):
    """A finished run of two steps with evaluations."""
    path = tmp_path_factory.mktemp("runs") / "run"
    train(tiny_model_dir, path, "--steps", "2", "--eval-every", "1", "--set", "eval.num_problems=5")
    return path


@pytest.mark.parametrize("flag", ["--help", "--version"])
def test_help_and_version_import_no_torch(flag):
    code = (
        "import sys\nfrom lowmem_grpo.cli import main\n"
        f"try:\n    main([{flag!r}])\nexcept SystemExit:\n    pass\n"
        "heavy = {'torch', 'transformers', 'pydantic', 'rich'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "lowmem-grpo" in done.stdout or "GRPO" in done.stdout


def test_the_run_directory_is_what_interfaces_promise(run):
    names = {p.name for p in run.iterdir()}
    assert names >= {
        "config.toml",
        "metrics.jsonl",
        "rollouts.jsonl",
        "checkpoints",
        "adapter",
        "run.lock",
    }
    checkpoint = run / "checkpoints/step-000002"
    assert {p.name for p in checkpoint.iterdir()} == {
        "adapter_model.safetensors", "adapter_config.json", "optimizer.safetensors", "state.json",
    }  # fmt: skip
    first = json.loads((run / "metrics.jsonl").read_text().splitlines()[0])
    promised = """
        step reward_mean reward_std rewards frac_reward_zero_std loss kl entropy clip_fraction_low
        clip_fraction_high grad_norm learning_rate adapter_change sampler_kl completion_length_mean
        completion_truncated_fraction tokens_generated tokens_trained tokens_trunk seconds memory
        skipped_rollouts
    """
    assert set(promised.split()) <= set(first)
    assert {"rollout", "reward", "reference", "update", "total"} <= set(first["seconds"])
    assert first["memory"]["update"]["host_rss"] > 0
    assert first["sampler_kl"] < 1e-6
    assert first["rewards"].keys() == {"number"}
    rollouts = [json.loads(line) for line in (run / "rollouts.jsonl").read_text().splitlines()]
    assert len(rollouts) == 2 * 3
    assert {"prompt", "completion", "reward", "advantage"} <= set(rollouts[0])
    evaluations = [json.loads(line) for line in (run / "eval.jsonl").read_text().splitlines()]
    assert [e["step"] for e in evaluations] == [0, 1, 2]


def test_eval_of_a_run_and_of_a_model(run, tiny_model_dir):
    result = call("eval", run, "--json", "--num-problems", "5")
    assert result.exit_code == 0, result.stderr
    of_run = json.loads(result.stdout)
    saved = json.loads((run / "eval.jsonl").read_text().splitlines()[-1])
    saved.pop("step")
    assert {k: of_run[k] for k in saved} == saved  # the saved adapter is the trained one
    result = call(
        "eval", tiny_model_dir, "--profile", "cpu", "--num-problems", "3", "--show", "1", "-q"
    )
    assert result.exit_code == 0, result.stderr
    assert "strict" in result.stdout
    assert "expected" in result.stdout


def test_eval_of_several_completions_beside_the_base(run):
    arguments = [
        "eval", run, "--json", "--num-problems", "3", "--num-generations", "4", "--base",
        "--set", "eval.temperature=1", "--set", "eval.top_p=0.9",
    ]  # fmt: skip
    result = call(*arguments)
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    assert found["num_generations"] == found["base"]["num_generations"] == 4
    assert {"strict_pass_at_2", "lenient_pass_at_4", "lenient_maj_at_4"} <= set(found["base"])
    assert json.loads(call(*arguments).stdout) == found
    shown = call("eval", run, "-q", "--base", "--num-problems", "3").stdout.splitlines()
    assert [line.partition(" on ")[0] for line in shown] == ["its base", str(run)]
    refused = call("eval", run, "--num-generations", "4")
    assert refused.exit_code == 2
    assert "use eval.temperature = 1" in refused.stderr


def test_sample(run, tiny_model_dir):
    arguments = ["sample", run, "2 + 2 =", "-n", "3", "-q", "--max-completion-length", "4"]
    first, again = call(*arguments), call(*arguments)
    assert first.exit_code == 0, first.stderr
    assert first.stdout == again.stdout
    cut = call("sample", tiny_model_dir, "--profile", "cpu", "--top-k", "3", "--top-p", "0.9", "-q")
    assert cut.exit_code == 0, cut.stderr


def test_export_gives_the_final_adapter(run, tmp_path):
    assert call("export", run, "--format", "adapter", "--output", tmp_path / "out").exit_code == 0
    mine = load_file(tmp_path / "out/adapter_model.safetensors")
    saved = load_file(run / "adapter/adapter_model.safetensors")
    assert mine.keys() == saved.keys()
    again = call("export", run, "--output", tmp_path / "out")
    assert again.exit_code == 2
    assert "not an empty directory" in again.stderr


def test_resuming_a_finished_run_changes_nothing(run):
    before = metrics(run)
    result = call("train", "--output", run, "--resume", "-q")
    assert result.exit_code == 0, result.stderr
    assert metrics(run) == before


def test_json_commands_print_one_document():
    for arguments in (
        ["doctor", "--json"],
        ["profiles", "list", "--json"],
        ["profiles", "show", "cpu", "--json"],
    ):
        result = call(*arguments)
        assert result.exit_code == 0, result.stderr
        assert json.loads(result.stdout)


def test_doctor_says_what_was_chosen_and_why():
    document = json.loads(call("doctor", "--device", "cpu", "--json").stdout)
    assert set(document["choices"]) == {"profile", "compute_dtype", "attention"}
    assert all(choice["reason"] for choice in document["choices"].values())


BAD = [
    (["--set", "grpo.betta=1"], "did you mean 'grpo.beta'"),
    (["--profile", "rtx-4091-24gb"], "did you mean"),
    (["--task", "aritmetic"], "did you mean 'arithmetic'"),
    (["--task", "records:none.jsonl"], "none.jsonl"),
    (["--model", "no/such/dir"], "no such model directory"),
    (["--model", "./none.gguf"], "none.gguf"),
    (["--reward", "none.py:f"], "none.py"),
    (["--reward", "nubmer"], "did you mean 'number'"),
    (["--reward", "format:("], "format"),
    (["--max-prompt-length", "3"], "--max-prompt-length"),
    (["--set", "rollout.top_p=0.9"], "rollout.top_p = 1.0"),
    (["--set", "model.device=cuda:7"], "cuda:7"),
    (["--set", "lora.target_modules=[\"nothing\"]"], "lora.target_modules"),
    (["--resume", "--output", "nowhere"], "holds no run"),
    (["--resume", "--overwrite"], "give one of them"),
    (["--set", "model.compute_dtype=float16"], "float16"),
    (["missing.toml"], "missing.toml"),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "says"), BAD, ids=[" ".join(a) for a, _ in BAD])
def test_bad_input_is_one_short_error(tiny_model_dir, tmp_path, monkeypatch, arguments, says):
    monkeypatch.chdir(tmp_path)
    base = ["--model", tiny_model_dir, "--output", "out", *TINY, "--steps", "1"]
    result = call("train", *base, *arguments)
    assert result.exit_code == 2
    assert says in result.stderr
    assert "Traceback" not in result.stderr
    assert len(result.stderr) < 600
    assert not (tmp_path / "out/config.toml").exists()


def test_records_are_checked_before_training(tiny_model_dir, tmp_path):
    rows = tmp_path / "rows.jsonl"
    base = ["train", "--model", tiny_model_dir, "--output", tmp_path / "out", *TINY, "--steps", "1"]
    for content, says in (
        ("", "rows.jsonl"),
        ('{"prompt": "a", "solution": "1"}\n', "answer"),
        ('{"prompt": "a", "answer": "1"\n', "rows.jsonl"),
    ):
        rows.write_text(content)
        result = call(*base, "--task", f"records:{rows}")
        assert result.exit_code == 2, result.stderr
        assert says in result.stderr


def test_an_existing_output_is_never_overwritten(run, tiny_model_dir):
    before = (run / "metrics.jsonl").read_bytes()
    result = call("train", "--model", tiny_model_dir, "--output", run, *TINY, "--steps", "1")
    assert result.exit_code == 2
    assert "--resume continues it, --overwrite replaces it" in result.stderr
    assert (run / "metrics.jsonl").read_bytes() == before


def test_tracebacks_only_when_asked_for(tmp_path):
    result = call("--debug", "train", "--set", "grpo.betta=1")
    assert type(result.exception).__name__ == "ConfigError"
