"""What only a card can tell: whether plans come true on it. Never run yet; `pytest -m gpu`."""

import json

import pytest
import torch

from lowmem_grpo.memory.replay import replay
from tests.runs import call

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("attention", ["torch_varlen", "sdpa"])
@pytest.mark.parametrize(
    "settings",
    [
        [],
        ["--set", "memory.gradient_checkpointing=true", "--set", "memory.micro_batch_tokens=2000"],
        [
            "--set",
            "memory.gradient_checkpointing=true",
            "--set",
            "memory.activation_offloading=true",
        ],
        ["--set", "optimizer.optim=adamw_8bit", "--set", "eval.every=1"],
    ],
)
def test_the_phases_take_what_was_planned(demo_model, tmp_path, attention, settings):
    snapshot = tmp_path / "snapshot.pickle"
    result = call(
        "memory", "profile", "--model", demo_model, "--set", f"model.attention={attention}",
        "--max-prompt-length", "200", "--max-completion-length", "400", *settings,
        "--snapshot", snapshot, "--json",
    )  # fmt: skip
    assert result.exit_code == 0, result.stderr
    rows = json.loads(result.stdout)["comparison"]
    print(json.dumps(rows, indent=1))
    assert {row["phase"] for row in rows} >= {"load", "rollout", "reference", "update", "optimizer"}
    for row in rows:
        if row["phase"] != "load":  # loading goes through transformers' own buffers
            assert abs(row["allocated_deviation"]) < 0.05, row
            assert abs(row["reserved_deviation"]) < 0.05, row
    assert replay(snapshot).exact


def test_a_run_on_a_card_agrees_with_its_plan(demo_model, tmp_path):
    run = tmp_path / "run"
    result = call("train", "--model", demo_model, "--output", run, "--steps", "2", "--rehearse")
    assert result.exit_code == 0, result.stderr
    for entry in json.loads((run / "memory.json").read_text()):
        for row in entry["comparison"]:
            assert abs(row["allocated_deviation"]) < 0.05, (entry["when"], row)
