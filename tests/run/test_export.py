"""Merged models, as plain transformers loads them, beside the policy; and model cards."""

import errno
import json
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import lowmem_grpo.run.card
from lowmem_grpo.config import build_config
from lowmem_grpo.policy.base import AdapterSettings
from lowmem_grpo.policy.load import load_policy
from lowmem_grpo.run import merge as module
from lowmem_grpo.run.card import model_card
from lowmem_grpo.run.merge import compare, merge
from tests.grpo.policies import move_adapters, open_policy
from tests.runs import call, train
from tests.tiny import make_tiny_model

PROMPTS = [[5, 9, 77, 3], [8, 33, 90, 14, 61, 20, 7]]


@pytest.fixture(params=["llama", "qwen2", "qwen3"])
def policy(request, tmp_path):
    tied = request.param == "llama"
    directory = make_tiny_model(tmp_path / "tiny", request.param, tie_word_embeddings=tied)
    return open_policy(directory)


def test_a_merged_model_is_the_policy(policy, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "ROWS", 3)
    assert merge(policy, tmp_path / "out", torch.float32) == torch.float32
    found = compare(policy, tmp_path / "out", torch.float32, PROMPTS)
    assert (found.tokens, found.agreement) == (11, 1.0)
    assert abs(found.kl) < 1e-9
    # And not its base, nor one whose adapters have moved on.
    move_adapters(policy, 0.1, seed=8)
    assert compare(policy, tmp_path / "out", torch.float32, PROMPTS).kl > 1e-3


def test_files_are_those_of_a_plain_model_in_sixteen_bits(policy, tmp_path):
    assert merge(policy, tmp_path / "out") == torch.bfloat16
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert "quantization_config" not in config
    assert config["architectures"] == [type(policy.causal_lm).__name__]
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert {p.dtype for p in plain.parameters()} == {torch.bfloat16}
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template
    assert compare(policy, tmp_path / "out", torch.bfloat16, PROMPTS).kl < 1e-2


def test_large_models_are_cut_into_files(policy, tmp_path, monkeypatch):
    merge(policy, tmp_path / "whole", torch.float32)
    monkeypatch.setattr(module, "SHARD_BYTES", 40_000)
    merge(policy, tmp_path / "cut", torch.float32)
    assert len(list((tmp_path / "whole").glob("*.safetensors"))) == 1
    assert len(list((tmp_path / "cut").glob("*.safetensors"))) > 3
    models = [AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("whole", "cut")]
    one, other = (model.state_dict() for model in models)
    assert one.keys() == other.keys()
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def test_layers_without_an_adapter_are_the_base_s(tmp_path):
    directory = make_tiny_model(tmp_path / "tiny")
    policy = load_policy(
        str(directory), device="cpu", dtype=torch.float32, attention="sdpa", seed=0, tile_tokens=7,
        tile_vocab=19, adapters=AdapterSettings(r=4, lora_alpha=8, target_modules=("v_proj",)),
    )  # fmt: skip
    move_adapters(policy, 0.1)
    merge(policy, tmp_path / "out", torch.float32)
    assert abs(compare(policy, tmp_path / "out", torch.float32, PROMPTS).kl) < 1e-9


def test_a_run_is_exported_as_one_model_with_a_card(tiny_model_dir, tmp_path):
    run = tmp_path / "run"
    train(tiny_model_dir, run, "--steps", "2", "--set", "eval.num_problems=3", "--eval-every", "1")
    result = call("export", run, "--format", "merged", "--output", tmp_path / "out", "-q")
    assert result.exit_code == 0, result.stderr
    assert "mean KL from the trained policy" in result.stdout
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    card = (tmp_path / "out/README.md").read_text()
    for part in ("merged 16-bit model", "2 steps", "| 1 to 1 |", "| 2 | 3 |"):
        assert part in card
    assert str(run) not in card
    assert "memory." not in card
    assert "- `optimizer.learning_rate = 0.01`" in card
    again = call("export", run, "--format", "merged", "--output", tmp_path / "out")
    assert again.exit_code == 2
    assert call("export", run, "--output", tmp_path / "adapter").exit_code == 0
    assert "LoRA adapter" in (tmp_path / "adapter/README.md").read_text()


def test_a_card_of_a_checkpoint_knows_nothing_of_later_steps(tiny_model_dir, tmp_path):
    run = tmp_path / "run"
    train(tiny_model_dir, run, "--steps", "3", "--save-every", "2", "--set", "run.keep_last=5")
    shutil.rmtree(run / "adapter")
    shutil.rmtree(run / "checkpoints/step-000003")  # as if it had been killed in its third step
    assert call("export", run, "--output", tmp_path / "out").exit_code == 0
    card = (tmp_path / "out/README.md").read_text()
    assert "2 steps" in card
    assert "| 3 to 3 |" not in card


def test_a_card_of_a_run_that_has_only_begun(tmp_path):
    card = model_card(tmp_path / "sums", build_config([]), "LoRA adapter", 0)
    assert "0 steps" in card
    assert "Reward" not in card


@pytest.mark.parametrize("kind", ["adapter", "merged"])
def test_what_cannot_be_written_whole_is_not_there(tiny_model_dir, tmp_path, monkeypatch, kind):
    train(tiny_model_dir, tmp_path / "run", "--steps", "1")
    (tmp_path / "out").mkdir()
    command = ["export", tmp_path / "run", "--format", kind, "--output", tmp_path / "out", "-q"]

    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(lowmem_grpo.run.card, "model_card", full)  # the last thing that is written
        failed = call(*command)
    assert failed.exit_code == 1
    assert f"cannot write {tmp_path}/out: [Errno 28] No space left on device" in failed.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "run"]
    assert list((tmp_path / "out").iterdir()) == []
    assert call(*command).exit_code == 0
    assert (tmp_path / "out/README.md").is_file()
