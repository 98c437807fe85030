"""A long run takes as much at its end as near its beginning."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.runs import TINY

ROOT = Path(__file__).parents[2]
REWARD = """
def scored(completions, **fields):
    return [float(len(text) % 5) for text in completions]
"""
STEPS = 500


@pytest.mark.slow
def test_five_hundred_steps_grow_nothing_but_the_line_files(tiny_model_dir, tmp_path):
    (tmp_path / "reward.py").write_text(REWARD)
    command = [
        *(sys.executable, str(ROOT / "tools/soak.py"), "--model", str(tiny_model_dir)),
        *("--output", str(tmp_path / "run"), *TINY, "--steps", str(STEPS), "--save-every", "100"),
        *("--reward", f"{tmp_path}/reward.py:scored", "--set", "rollout.dynamic_sampling=1"),
        *("--eval-every", "50", "--set", "eval.num_problems=4"),
        *("--metric-for-best", "lenient_accuracy", "--set", "grpo.num_iterations=2"),
        *("--set", "grpo.sync_ref_model=true", "--set", "grpo.ref_model_sync_steps=2"),
    ]
    own = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | own)
    assert done.returncode == 0, done.stderr
    print(done.stdout)
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["steps"] == STEPS
    for name in ("open_files", "threads", "children"):
        assert found[name]["least"] == found[name]["most"], name
    assert found["children"]["most"] > 0  # the reward's worker
    growth = {name: g["last"] - g["first"] for name, g in found.items() if name != "steps"}
    assert growth["tensor_bytes"] < 1024
    # Less than a hundred bytes a step, where a step's record alone has a thousand.
    assert growth["python_bytes"] < 100 * STEPS * 0.64
    assert growth["resident_bytes"] < 2 * 2**20
    lines = found["line_bytes"]
    assert lines["slope"] > 100 * lines["error"]  # a straight line
    # Ten evaluations and five checkpoints that last are not of every step.
    assert found["files"]["most"] - found["files"]["least"] <= 10
    assert growth["file_bytes"] < 0.5 * found["file_bytes"]["first"]
