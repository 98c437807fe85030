"""The forward check, a rollout, the reference pass, the update and the optimizer step, and a reward
model, on fake CUDA tensors, by the real code.

No kernel runs: what these tests find is a tensor on the wrong device or of the wrong dtype, and an
operation that CUDA's dispatch would refuse. See tests/fakecuda.
"""

from pathlib import Path

import pytest

from tests.fakecuda.build import run_with_guard, why_not

pytestmark = pytest.mark.skipif(why_not() is not None, reason=why_not() or "")
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    """What every case of tests/fakecuda/cases.py reported, by name."""
    lines = run_with_guard(tmp_path_factory.mktemp("fakecuda"), "run_policy.py")
    return {line["case"]: line for line in lines}


@pytest.mark.parametrize(
    "case",
    [
        "llama", "qwen2", "qwen3", "nothing recomputed", "inputs on the host",
        "inputs on the host, overlapping", "MLPs in tiles", "MLPs in tiles, nothing recomputed",
        "cache of 8 bits", "both ends", "llama, everything", "qwen2, everything",
        "qwen3, everything", "exact divergence", "sdpa", "tiled",
    ],
)  # fmt: skip
def test_a_step_runs_on_cuda_and_keeps_float32_adapters(cases, case):
    found = cases[case]
    assert found["error"] is None
    assert found["drawn"] == [6] * 4
    assert found["batches"] == 2
    assert found["layers"] == 14  # seven linear layers in each of two blocks, all of them ours
    assert found["parameters"] == 28
    assert found["gradients"] == ["cuda torch.float32"]
    assert found["moments"] == ["cuda torch.float32"]
    assert found["scored"] == 21
    assert found["trunk"] == [27, 27]  # 7 + 4 + 2 + 0, and 4 + 5 + 5


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "bert"])
def test_a_reward_model_scores_on_cuda_and_goes_back_to_the_host(cases, architecture):
    found = cases[f"reward model, {architecture}"]
    assert found["error"] is None
    assert found["left"] == 0  # of what was loaded there
    assert found["inside"] == ["cuda"]
    assert found["logits"] == ["cuda torch.float32 [2, 1]", "cuda torch.float32 [1, 1]"]
    assert found["outside"] == ["cpu"]
    assert found["same"]


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("index on the CPU", "found at least two devices, cuda:0 and cpu"),
        ("lengths on the CPU", "_varlen_attn.default is given tensors on ['cpu', 'cuda']"),
    ],
)
def test_a_tensor_on_the_wrong_device_fails(cases, case, message):
    assert message in cases[case]["error"]
