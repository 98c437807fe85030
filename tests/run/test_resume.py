"""A run that was stopped or broken and resumed ends like one that was not, to the bit. (Killed ones
are in tests/faults.)
"""

import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

import lowmem_grpo.train
from lowmem_grpo.checksum import sealed, unsealed
from tests.runs import TINY, assert_same_run, call, metrics, train

# Scores by length so that groups differ; from its third call on it does what the test asks for,
# until the test says that this is done.
REWARD = """
import time
from pathlib import Path

def scored(completions, **fields):
    here = Path({here!r})
    calls = int((here / "calls").read_text()) + 1 if (here / "calls").exists() else 1
    (here / "calls").write_text(str(calls))
    if calls >= 3 and not (here / "done").exists():
        {act}
    return [float(len(text) % 5) for text in completions]
"""
WAIT = """(here / "reached").touch()
        while not (here / "done").exists(): time.sleep(0.01)"""


def reward_file(tmp_path, act="pass"):
    """The arguments for such a reward, and the directory that it writes to."""
    path = tmp_path / f"reward_{len(list(tmp_path.iterdir()))}.py"
    here = tmp_path / f"{path.stem}_calls"
    here.mkdir()
    path.write_text(REWARD.format(here=str(here), act=act))
    arguments = ["--reward", f"{path}:scored", "--set", f"rewards.writable=['{here}']"]
    return arguments, here


def when_reached(here, do):
    """Wait for the third call of the reward, `do()`, and let it return."""
    while not (here / "reached").exists():
        time.sleep(0.01)
    do()
    (here / "done").touch()


def undisturbed(tiny_model_dir, tmp_path, *arguments):
    train(tiny_model_dir, tmp_path / "whole", "--steps", "6", *arguments)
    return tmp_path / "whole"


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param([], marks=pytest.mark.slow),
        # Three steps end between the two iterations on a batch; so do runs in tests/faults.
        pytest.param(["--set", "grpo.num_iterations=2"], marks=pytest.mark.slow),
        ["--set", "grpo.beta=0", "--set", "grpo.num_iterations=2"],
        [
            *("--set", "optimizer.optim=adamw_8bit", "--set", "grpo.kl_estimator=exact"),
            # The reference is the policy after the second step, in the third and the fourth.
            *("--set", "grpo.sync_ref_model=true", "--set", "grpo.ref_model_sync_steps=2"),
        ],
    ],
)
def test_three_steps_and_three_more_are_six(tiny_model_dir, tmp_path, settings):
    settings = [*settings, *reward_file(tmp_path)[0]]
    whole = undisturbed(tiny_model_dir, tmp_path, *settings)
    part = tmp_path / "part"
    train(tiny_model_dir, part, "--steps", "3", *settings)
    train(tiny_model_dir, part, "--steps", "6", "--resume")
    assert_same_run(whole, part, 6)
    assert len(metrics(whole)) == 6
    assert all(m["adapter_change"] > 0 for m in metrics(whole))


def test_a_killed_run_goes_on_from_its_last_checkpoint(tiny_model_dir, tmp_path):
    whole = undisturbed(tiny_model_dir, tmp_path, *reward_file(tmp_path)[0])
    reward, here = reward_file(tmp_path, WAIT)
    part = tmp_path / "part"
    arguments = ["--model", str(tiny_model_dir), "--output", str(part), *TINY, *reward]
    arguments += ["--steps", "6"]
    killed = subprocess.Popen(
        [sys.executable, "-m", "lowmem_grpo", "train", *arguments],
        # Sums depend on how many threads share them: as many as in this process.
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    when_reached(here, killed.kill)
    assert killed.wait() == -signal.SIGKILL
    assert len(metrics(part)) == 2
    result = call("train", *arguments, "--resume")
    assert result.exit_code == 0, result.stderr
    assert_same_run(whole, part, 6)


@pytest.mark.parametrize(
    ("number", "settings"),
    [
        pytest.param(signal.SIGINT, [], marks=pytest.mark.slow),
        # Advantages are known after the reference then, and it has not been asked when this stops.
        (
            signal.SIGTERM,
            [
                *("--set", "grpo.use_kl_in_reward=true", "--set", "grpo.beta=0.5"),
                *("--set", "grpo.top_entropy_quantile=0.4"),
            ],
        ),
    ],
)
def test_a_signal_ends_the_phase_and_saves_what_is_in_hand(
    tiny_model_dir, tmp_path, number, settings
):
    whole = undisturbed(tiny_model_dir, tmp_path, *reward_file(tmp_path)[0], *settings)
    reward, here = reward_file(tmp_path, WAIT)
    part = tmp_path / "part"
    arguments = ["--model", tiny_model_dir, "--output", part, *TINY, *reward, *settings]
    signaller = threading.Thread(
        target=when_reached, args=(here, lambda: os.kill(os.getpid(), number))
    )
    signaller.start()
    stopped = call("train", *arguments, "--steps", "6")
    signaller.join()
    assert stopped.exit_code == 4
    state = json.loads((part / "checkpoints/step-000002/state.json").read_text())
    assert state["step"] == 2
    assert state["groups"][0]["rewards"]  # sampled and scored: neither is done again
    assert state["groups"][0]["rollouts"][0]["ref_logprobs"] is None
    result = call("train", *arguments, "--steps", "6", "--resume")
    assert result.exit_code == 0, result.stderr
    assert (here / "calls").read_text() == "6"
    assert_same_run(whole, part, 6)


def test_a_signal_in_the_last_step_leaves_its_evaluation_to_be_made(
    tiny_model_dir, tmp_path, monkeypatch
):
    run, function, calls = tmp_path / "run", lowmem_grpo.train.apply_update, []

    def signalled(*args, **how):
        calls.append(None)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return function(*args, **how)

    arguments = ["--model", tiny_model_dir, "--output", run, *TINY, "--steps", "2"]
    arguments += ["--eval-every", "1", "--set", "eval.num_problems=2"]
    with monkeypatch.context() as patch:
        patch.setattr(lowmem_grpo.train, "apply_update", signalled)
        stopped = call("train", *arguments)
    assert stopped.exit_code == 4
    assert "SIGTERM: stops after the phase in hand" in stopped.stderr
    assert not (run / "adapter").exists()
    assert call("train", *arguments, "--resume").exit_code == 0
    lines = [json.loads(line) for line in (run / "eval.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 1, 2]
    assert (run / "adapter").is_dir()


@pytest.mark.parametrize(
    ("act", "says"),
    [
        ("raise KeyError('colour')", "KeyError: 'colour'"),
        pytest.param("return []", "0 values for 1 completions", marks=pytest.mark.slow),
        pytest.param("return [float('nan')] * len(completions)", "nan", marks=pytest.mark.slow),
    ],
)
def test_a_reward_that_is_to_stop_the_run_costs_no_step(tiny_model_dir, tmp_path, act, says):
    reward, here = reward_file(tmp_path, act)
    part = tmp_path / "part"
    arguments = ["--model", tiny_model_dir, "--output", part, *TINY, *reward]
    arguments += ["--set", "rewards.on_error=stop"]
    failed = call("train", *arguments, "--steps", "4")
    assert failed.exit_code == 1
    assert "reward 'scored'" in failed.stderr
    assert says in failed.stderr
    assert "Traceback" not in failed.stderr
    assert (part / "checkpoints/step-000002").is_dir()
    (here / "done").touch()
    assert call("train", *arguments, "--steps", "4", "--resume").exit_code == 0
    assert [m["step"] for m in metrics(part)] == [1, 2, 3, 4]


def test_settings_that_change_the_mathematics_are_refused(tiny_model_dir, tmp_path):
    part = tmp_path / "part"
    train(tiny_model_dir, part, "--steps", "1")
    again = ["train", "--output", part, "--resume", "--steps", "2", "--quiet"]
    refused = call(*again, "--set", "grpo.beta=0.1")
    assert refused.exit_code == 2
    assert "grpo.beta is 0.1, and the run was started with 0.04" in refused.stderr
    assert metrics(part)[-1]["step"] == 1
    changed = call(*again[:-1], "--set", "grpo.beta=0.1", "--allow-changed", "grpo.beta")
    assert changed.exit_code == 0
    assert "changed since it was started: grpo.beta" in changed.stderr


def test_other_memory_settings_change_the_rounding_alone(tiny_model_dir, tmp_path):
    settings = ["--reward", "overlong:max=6,cache=5", "--set", "memory.micro_batch_tokens=400"]
    train(tiny_model_dir, tmp_path / "whole", "--steps", "4", *settings)
    part = tmp_path / "part"
    train(tiny_model_dir, part, "--steps", "2", *settings)
    less = ["--set", "memory.micro_batch_tokens=30", "--set", "memory.rollout_batch_size=1"]
    assert call("train", "--output", part, "--resume", "--steps", "4", *less).exit_code == 0
    for one, other in zip(metrics(tmp_path / "whole"), metrics(part), strict=True):
        same = ("reward_mean", "tokens_generated", "completion_length_mean", "frac_reward_zero_std")
        assert [one[name] for name in same] == [other[name] for name in same]
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4)
        assert one["kl"] == pytest.approx(other["kl"], rel=1e-3, abs=1e-7)
    assert metrics(part)[3]["tokens_trunk"] > metrics(part)[1]["tokens_trunk"]  # prompts repeated


def test_checkpoints_are_pruned_and_line_files_rewound(tiny_model_dir, tmp_path):
    part = tmp_path / "part"
    train(tiny_model_dir, part, "--steps", "4", "--save-every", "1", "--set", "run.keep_last=2")
    assert [p.name for p in sorted((part / "checkpoints").iterdir())] == [
        "step-000003",
        "step-000004",
    ]
    with (part / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "reward_mean": 1}\n{"step": 6, "rew')  # cut off by a crash
    train(tiny_model_dir, part, "--steps", "5", "--resume")
    assert [m["step"] for m in metrics(part)] == [1, 2, 3, 4, 5]


def test_a_run_from_before_a_setting_goes_on_with_its_default(tiny_model_dir, tmp_path):
    train(tiny_model_dir, tmp_path / "run", "--steps", "1")
    state = tmp_path / "run/checkpoints/step-000001/state.json"
    saved = unsealed(state.read_text())
    assert saved["config"]["grpo"].pop("baseline") == "mean"
    state.write_text(sealed(saved))
    resumed = ("train", "--output", tmp_path / "run", "--resume", "--steps", "2", "-q")
    refused = call(*resumed, "--set", "grpo.baseline=leave_one_out")
    assert refused.exit_code == 2
    assert "grpo.baseline is 'leave_one_out'" in refused.stderr
    assert call(*resumed).exit_code == 0
