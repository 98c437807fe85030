"""The head's Triton kernels: in the interpreter against float64, and compiled for every card."""

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lowmem_grpo.errors import ModelError
from lowmem_grpo.policy.load import load_policy

pytest.importorskip("triton", reason="triton has no wheel for this platform")
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def cases():
    # torch's CUDA builds choose the version; the interpreter of 3.6 and before fails under numpy 2.
    pytest.importorskip("triton", minversion="3.7")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    program = Path(__file__).with_name("run_head_kernels.py")
    run = subprocess.run(
        [sys.executable, str(program)], capture_output=True, text=True, env=environment
    )
    assert run.returncode == 0, run.stderr
    return [json.loads(line) for line in run.stdout.splitlines() if line.startswith("{")]


def test_kernels_are_as_exact_as_torchs_passes(cases):
    assert len(cases) == 12
    for case in cases:
        for ours, torchs in zip(case["kernels"], case["torch"], strict=True):
            floor = 2e-6 if case["case"].endswith("float32") else 1e-4
            assert ours <= 1.05 * torchs + floor, case
    exact = [case["kernels"] for case in cases if case["case"].endswith("float32")]
    assert all(max(errors) < 1e-5 for errors in exact)


@pytest.mark.slow
def test_they_compile_for_every_card_without_spilling(tmp_path):
    run = subprocess.run(
        [sys.executable, str(ROOT / "tools" / "compile_kernels.py"), "--json"],
        capture_output=True,
        text=True,
        env={**os.environ, "TRITON_CACHE_DIR": str(tmp_path)},
    )
    assert run.returncode == 0, run.stderr
    found = [json.loads(line) for line in run.stdout.splitlines()]
    assert {row["capability"] for row in found} == {"7.5", "8.0", "8.6", "8.9", "9.0", "12.0"}
    assert all(row["spill_bytes"] == 0 for row in found)


def test_on_a_cpu_they_are_refused(tiny_model_dir):
    from lowmem_grpo.policy.base import AdapterSettings

    with pytest.raises(ModelError, match="lm_head_kernels = triton needs a CUDA card"):
        load_policy(
            str(tiny_model_dir), device="cpu", dtype=None, attention="tiled", seed=0,
            tile_tokens=7, tile_vocab=50, adapters=AdapterSettings(r=4, lora_alpha=8),
            lm_head_kernels="triton",
        )  # fmt: skip


def test_they_are_launched_on_the_card_of_their_tensors(monkeypatch):
    """Triton launches on the current card, whichever card its pointers are of."""
    from lowmem_grpo.policy import head_kernels

    inside, launched = [], []

    @contextlib.contextmanager
    def device_of(tensor):
        inside.append(tensor)
        yield
        inside.pop()

    class Kernel:
        def __getitem__(self, grid):
            return lambda z_nv, *more, **how: launched.append(inside and inside[-1] is z_nv)

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    for name in ("merge_kernel", "probabilities_kernel"):
        monkeypatch.setattr(head_kernels, name, Kernel())
    z_nv, targets_n, max_n = torch.zeros(2, 5), torch.zeros(2, dtype=torch.int64), torch.zeros(2)
    head_kernels.merge(z_nv, targets_n, (max_n,) * 4, 0, 1.0)
    head_kernels.probabilities_(z_nv, targets_n, max_n, 0, 1.0)
    assert launched == [True, True]
