"""Merged models, as plain transformers loads them, beside the policy; and model cards."""

import copy
import errno
import json
import shutil

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

import lowmem_grpo.run.card
import lowmem_grpo.run.merge
from lowmem_grpo.config import build_config
from lowmem_grpo.errors import ExportError
from lowmem_grpo.policy.lora import ADAPTER
from lowmem_grpo.run import compare as comparing
from lowmem_grpo.run import merge as module
from lowmem_grpo.run.card import model_card
from lowmem_grpo.run.compare import (
    check_plain,
    check_probed,
    compare,
    plain_logits,
    probe_policy,
    read_plain,
)
from lowmem_grpo.run.merge import merge
from tests.families import FAMILIES, make_family
from tests.grpo.policies import move_adapters, open_policy
from tests.runs import call, train
from tests.tiny import make_4_bit_directory, make_tiny_model


@pytest.fixture(params=["llama", "qwen2", "qwen3"])
def policy(request, tmp_path):
    tied = request.param == "llama"
    directory = make_tiny_model(tmp_path / "tiny", request.param, tie_word_embeddings=tied)
    return open_policy(directory)


def exported(policy, output, dtype=torch.float32, **how):
    """A merged model that has been found to be the policy, and how far it is away."""
    assert merge(policy, output, dtype, **how) == dtype
    said = check_plain(policy, output, dtype, **how)
    return compare(probe_policy(policy, reference=not how.get("adapters", True)), said)


def test_a_merged_model_is_the_policy(policy, tmp_path, monkeypatch):
    monkeypatch.setattr(comparing, "ROWS", 3)
    found = exported(policy, tmp_path / "out")
    assert (found.tokens, found.agreement) == (192, 1.0)
    assert abs(found.kl) < 1e-9
    assert found.apart < 1e-5
    # And not its base, nor one whose adapters have moved on.
    probed = probe_policy(policy, reference=True)
    apart = compare(probed, plain_logits(read_plain(tmp_path / "out"), probed.texts))
    assert apart.kl > 1e-3
    move_adapters(policy, 0.1, seed=8)
    with pytest.raises(ExportError, match=r"14 of the .* tensors .* are not the policy's"):
        check_plain(policy, tmp_path / "out", torch.float32)


def test_files_are_those_of_a_plain_model_in_sixteen_bits(policy, tmp_path):
    assert merge(policy, tmp_path / "out") == torch.bfloat16
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert "quantization_config" not in config
    assert config["architectures"] == [type(policy.causal_lm).__name__]
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert {p.dtype for p in plain.parameters()} == {torch.bfloat16}
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template
    said = check_plain(policy, tmp_path / "out", torch.bfloat16)
    assert compare(probe_policy(policy), said).kl < 1e-2


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
    policy = open_policy(make_tiny_model(tmp_path / "tiny"), target_modules=("v_proj",))
    assert abs(exported(policy, tmp_path / "out").kl) < 1e-9


def test_the_base_is_exported_without_adapters(tmp_path):
    policy = open_policy(make_tiny_model(tmp_path / "tiny"))
    assert abs(exported(policy, tmp_path / "out", adapters=False).kl) < 1e-9


WRAPPED = {
    # In 4 bits but for these, as "dynamic" uploads are: linear layers in 16 bits, with a bias too.
    "llama": (["lm_head", "model.layers.0.mlp", "model.layers.1.self_attn.q_proj"], "all-linear"),
    # Conv1D, whose weight lies the other way round, in 4 bits and in 16.
    "gpt2": (["lm_head", "transformer.h.0.attn.c_attn"], "all-linear"),
    # Experts and their router: parameters of three and two dimensions, and a buffer beside them.
    "glm4_moe": (["lm_head"], "all-linear"),
    # An embedding with an adapter, which is the head as well and has none there.
    "gemma3_text": (["lm_head"], ("embed_tokens", "q_proj", "down_proj")),
}


@pytest.mark.parametrize("family", WRAPPED)
def test_whatever_has_an_adapter_is_merged(family, tmp_path):
    skip, targets = WRAPPED[family]
    make_4_bit_directory(make_family(tmp_path / "plain", family), tmp_path / "base", skip)
    policy = open_policy(tmp_path / "base", target_modules=targets)
    found = exported(policy, tmp_path / "out")
    assert (found.agreement, abs(found.kl) < 1e-9) == (1.0, True)
    # In the names of the model's own files, which other programs read too.
    one, other = (
        set(safe_open(tmp_path / name / "model.safetensors", "pt").keys())
        for name in ("plain", "out")
    )
    assert other - one == ({"lm_head.weight"} if family == "gemma3_text" else set())
    assert one <= other


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_merged(family, dtype, tmp_path):
    policy = open_policy(make_family(tmp_path / "base", family), dtype=dtype)
    found = exported(policy, tmp_path / "out", dtype)
    assert found.agreement > (0.9999 if dtype == torch.float32 else 0.85)


def test_an_adapter_that_is_nowhere_in_the_file_is_named(tmp_path):
    policy = open_policy(make_tiny_model(tmp_path / "tiny"))
    odd = torch.nn.ParameterDict({ADAPTER: torch.nn.Parameter(torch.zeros(2))})
    policy.causal_lm.model.lora_odd = odd
    with pytest.raises(ExportError, match="1 of the 29 tensors of the adapters are on no tensor"):
        merge(policy, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_is_further_away_than_rounding_is_refused(tmp_path):
    policy = open_policy(make_tiny_model(tmp_path / "tiny"), dtype=torch.bfloat16)
    merge(policy, tmp_path / "out")
    model, probed = read_plain(tmp_path / "out"), probe_policy(policy)
    check_probed(probed, copy.deepcopy(model))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "q_proj" in name:
                parameter.mul_(1.5)  # as of a rotary embedding or a scale that is read otherwise
    with pytest.raises(ExportError, match=r"nat from the policy's in the mean, and rounding expl"):
        check_probed(probed, model)


def test_what_is_not_the_policy_does_not_stay(tiny_model_dir, tmp_path, monkeypatch):
    train(tiny_model_dir, tmp_path / "run", "--steps", "1")
    written = lowmem_grpo.run.merge._of_files  # loses a tensor, as a rule of names might

    def less(plain):
        return (x for x in written(plain) if x[0] != "model.layers.1.self_attn.v_proj.weight")

    command = ["export", tmp_path / "run", "--format", "merged", "--output", tmp_path / "out"]
    with monkeypatch.context() as patch:
        patch.setattr(lowmem_grpo.run.merge, "_of_files", less)
        failed = call(*command)
    assert failed.exit_code == 1
    assert f"not exported to {tmp_path}/out: plain transformers finds 1 missing" in failed.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


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
    done = call("export", run, "--format", "gguf", "--output", tmp_path / "gguf", "-q")
    assert done.stdout.startswith(f"{tmp_path}/gguf/adapter.gguf: adapter from ")
    assert sorted(p.name for p in (tmp_path / "gguf").iterdir()) == ["README.md", "adapter.gguf"]


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
