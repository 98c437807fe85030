"""Adapters that come from elsewhere, go elsewhere, and are gone on with."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from lowmem_grpo import adapter_config
from lowmem_grpo.adapter_config import with_adapter
from lowmem_grpo.config import build_config
from lowmem_grpo.errors import ModelError
from lowmem_grpo.policy.adapter_files import DEMO_HOME, read_adapter_file
from lowmem_grpo.run.export import adapter_directory
from lowmem_grpo.run.sharing import shared_base
from tests.families import make_family
from tests.runs import TINY, assert_same_run, call, metrics, train
from tests.tiny import TEMPLATE, make_4_bit_directory, make_tiny_model, write_gguf


def make_adapter(base: Path, directory: Path, **settings) -> Path:
    """Write an adapter that does something, as another program would, and return its directory."""
    how = {"r": 8, "lora_alpha": 12, "target_modules": ["q_proj", "v_proj", "up_proj"]}
    model = AutoModelForCausalLM.from_pretrained(base)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        config = LoraConfig(**{**how, "task_type": "CAUSAL_LM", "lora_dropout": 0.05, **settings})
        model = get_peft_model(model, config)
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(directory)
    return Path(directory)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("base") / "model")


@pytest.fixture(scope="module")
def adapter(base, tmp_path_factory):
    return make_adapter(base, tmp_path_factory.mktemp("sft") / "adapter")


def edited(adapter: Path, directory: Path, **fields) -> Path:
    """A copy of an adapter with other settings."""
    shutil.copytree(adapter, directory)
    settings = json.loads((adapter / "adapter_config.json").read_text())
    (directory / "adapter_config.json").write_text(json.dumps({**settings, **fields}))
    return directory


VARIED = [
    "--reward",
    "repetition:ngram=1",
    "--max-completion-length",
    "16",
]  # of which a tiny model's completions have some


def start(adapter: Path, output: Path, *more):
    """Train a tiny model from an adapter."""
    return call("train", "--adapter", adapter, "--output", output, *TINY, *VARIED, *more)


def test_a_run_that_starts_from_an_adapter_refers_to_it(base, adapter, tmp_path):
    done = start(adapter, tmp_path / "run", "--steps", "3")
    assert done.exit_code == 0, done.stderr
    first, second, _ = metrics(tmp_path / "run")
    assert first["kl"] == 0.0
    assert second["kl"] > 1e-6
    assert first["sampler_kl"] < 1e-8
    text = (tmp_path / "run/config.toml").read_text()
    assert f"r = 8 # adapter {adapter}" in text
    assert f'name = "{base}" # adapter {adapter}' in text
    # Its adapter is one of the original base, and goes on from the other.
    was, now = (
        load_file(directory / "adapter_model.safetensors")
        for directory in (adapter, tmp_path / "run/adapter")
    )
    assert was.keys() == now.keys()
    apart = [(now[name] - tensor).abs().max().item() for name, tensor in was.items()]
    assert 0 < max(apart) < 0.05

    # Resumed to the bit, also where the adapter that it started from is gone.
    shutil.copytree(adapter, tmp_path / "sft")
    assert start(tmp_path / "sft", tmp_path / "cut", "--steps", "1").exit_code == 0
    shutil.rmtree(tmp_path / "sft")
    resumed = call("train", "--resume", "--output", tmp_path / "cut", "--steps", "3", "--quiet")
    assert resumed.exit_code == 0, resumed.stderr
    assert_same_run(tmp_path / "run", tmp_path / "cut", 3)

    # Without a penalty there is nothing to refer to; a reference that comes later is the adapter.
    how = ["--steps", "1", "--set", "grpo.beta=0"]
    assert start(adapter, tmp_path / "free", *how).exit_code == 0
    assert not list(tmp_path.glob("free/checkpoints/*/reference.safetensors"))
    later = call(
        "train", "--resume", "--output", tmp_path / "free", "--steps", "2", "--quiet",
        "--set", "grpo.beta=0.04", "--allow-changed", "grpo.beta",
    )  # fmt: skip
    assert later.exit_code == 0, later.stderr
    saved = load_file(tmp_path / "free/checkpoints/step-000002/reference.safetensors")
    kept = saved["base_model.model.model.layers.0.self_attn.q_proj.lora_reference_A"]
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    assert torch.equal(kept, was[name])


@pytest.mark.slow
@pytest.mark.parametrize("family", ["glm4_moe", "gpt2", "gemma3_text"])
def test_layers_of_every_kind_refer_to_the_adapter(family, tmp_path):
    plain, skip = make_family(tmp_path / "plain", family), ["lm_head"]
    targets = "all-linear"
    if family == "gpt2":
        skip += ["transformer.h.0.attn.c_attn"]
    if family == "gemma3_text":
        targets = ["embed_tokens", "q_proj"]
    directory = make_4_bit_directory(plain, tmp_path / "base", skip)
    adapter = make_adapter(plain, tmp_path / "sft", target_modules=targets, lora_dropout=0.0)
    # Planning a mixture of experts in float32 fails: torch has no rule for its product.
    dtype = "bfloat16" if family == "glm4_moe" else "float32"
    how = ["--model", directory, "--steps", "2", "--set", f"model.compute_dtype={dtype}"]
    done = start(adapter, tmp_path / "run", *how)
    assert done.exit_code == 0, done.stderr
    first, second = metrics(tmp_path / "run")
    assert first["kl"] == 0.0
    assert second["kl"] > 0.0


USED = {
    "layers_to_transform": {"layers_to_transform": [1]},
    "exclude_modules": {"exclude_modules": r".*\.0\..*"},
    "patterns": {"rank_pattern": {"q_proj": 4}, "alpha_pattern": {"up_proj": 3}},
    "rslora": {"use_rslora": True},
    "regex": {"target_modules": r".*\.(q|up)_proj"},
    "embedding": {"target_modules": ["embed_tokens", "q_proj"]},
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", USED)
def test_what_an_adapter_is_made_of_is_used(kind, base, tmp_path):
    adapter = make_adapter(base, tmp_path / "sft", **USED[kind])
    assert start(adapter, tmp_path / "run", "--steps", "1").exit_code == 0
    # What is exported has been compared with plain PEFT on the plain base.
    done = call("export", tmp_path / "run", "--output", tmp_path / "out", "-q")
    assert done.exit_code == 0, done.stderr
    was, now = (
        load_file(directory / "adapter_model.safetensors")
        for directory in (adapter, tmp_path / "out")
    )
    brought = {name for name in was if "lora_" not in name}  # the embedding, by PEFT
    assert was.keys() - brought == now.keys()


REFUSED = [
    ({"use_dora": True}, "use_dora = True is not computed here"),
    ({"bias": "lora_only"}, "bias = 'lora_only' is not computed here"),
    ({"modules_to_save": ["lm_head"]}, "modules_to_save = ['lm_head'] is not computed here"),
    ({"trainable_token_indices": [3]}, "trainable_token_indices = [3] is not computed here"),
    ({"lora_of_next_year": 2}, "lora_of_next_year = 2 is not known here"),
    ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights = pissa_niter_4 has changed the"),
    ({"peft_type": "IA3"}, "is an adapter of type IA3, not LORA"),
    ({"r": "8"}, "r = '8' must be a number above zero"),
    ({"target_modules": ["q_proj", "v_porj"]}, "'v_porj' (did you mean 'v_proj'?)"),
]


@pytest.mark.parametrize(("fields", "message"), REFUSED, ids=str)
def test_what_an_adapter_has_and_is_not_computed_is_refused(adapter, tmp_path, fields, message):
    other = edited(adapter, tmp_path / "other", **fields)
    done = call("plan", "--adapter", other, "--profile", "cpu")
    assert done.exit_code == 2
    assert message in done.stderr


def test_settings_that_are_not_the_adapter_s_are_refused(adapter, tmp_path):
    for setting, message in (
        ("lora.r=4", "lora.r = 4 (from --set), and the adapter in"),
        ('lora.target_modules="all-linear"', "lora.target_modules = 'all-linear' (from --set)"),
        ("grpo.old_policy=base", "samples from the base without it"),
    ):
        done = start(adapter, tmp_path / "run", "--set", setting)
        assert done.exit_code == 2
        assert message in done.stderr
    assert call("plan", "--adapter", adapter, "--set", "lora.r=8").exit_code == 0


@pytest.mark.slow
def test_files_that_do_not_fit_are_refused(base, adapter, tmp_path):
    tensors = load_file(adapter / "adapter_model.safetensors")
    first = min(tensors)
    bad = tmp_path / "bad"
    shutil.copytree(adapter, bad)
    head = AutoModelForCausalLM.from_pretrained(base).model.embed_tokens.weight.detach()
    embedding = "base_model.model.model.embed_tokens.weight"
    for changed, message in (
        ({n: t for n, t in tensors.items() if n != first}, f"{first}, which it lacks"),
        ({**tensors, first: tensors[first][:3].clone()}, "expected (8, "),
        ({**tensors, embedding: head * 2}, "embed_tokens.weight, which is not the base's"),
        ({**tensors, embedding: head.clone()}, None),
    ):
        save_file(changed, bad / "adapter_model.safetensors")
        done = start(bad, tmp_path / "run", "--steps", "1")
        assert (done.exit_code == 0) is (message is None), done.stderr
        assert message is None or message in done.stderr
    (bad / "adapter_model.safetensors").rename(bad / "adapter_model.bin")
    with pytest.raises(ModelError, match="which is a pickle"):
        read_adapter_file(bad)


@pytest.mark.slow
def test_adapters_are_sampled_and_evaluated_wherever_they_lie(base, adapter, tmp_path):
    assert start(adapter, tmp_path / "run", "--steps", "1").exit_code == 0
    exported = tmp_path / "run" / "exported"  # also within the run's own directory
    assert call("export", tmp_path / "run", "--output", exported, "-q").exit_code == 0
    how = ["--max-completion-length", "6", "--set", "model.compute_dtype=float32", "-q"]
    several = ["-n", "4", "--temperature", "0.5"]

    def said(target, *more):
        done = call("sample", target, "1+1=", *how, *several, *more)
        assert done.exit_code == 0, (target, done.stderr)
        return done.stdout

    of_run, plain = said(tmp_path / "run"), said(base)
    assert of_run != plain
    checkpoint = adapter_directory(tmp_path / "run").parent / "checkpoints/step-000001"
    for target in (tmp_path / "run/adapter", checkpoint, exported):
        assert said(target) == of_run
    assert said(adapter) not in (of_run, plain)
    assert call("eval", exported, "--num-problems", "2", *how).exit_code == 0
    # The base may be named otherwise, or not be here.
    odd = edited(adapter, tmp_path / "odd", base_model_name_or_path="nowhere")
    failed = call("sample", odd, "1+1=", *how)
    assert failed.exit_code == 2
    assert "names its base as nowhere" in failed.stderr
    assert said(odd, "--set", f"model.name={base}") == said(adapter)
    damaged = tmp_path / "run/adapter/adapter_model.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    assert call("sample", tmp_path / "run/adapter", "1+1=", *how).exit_code == 1


@pytest.mark.slow
def test_a_template_beside_an_adapter_is_the_one_it_was_trained_with(adapter, tmp_path):
    other = edited(adapter, tmp_path / "other")
    assert read_adapter_file(other).chat_template is None
    text = json.dumps({"chat_template": TEMPLATE.replace("<a>", "<u>")})
    (other / "tokenizer_config.json").write_text(text)
    assert start(other, tmp_path / "run", "--steps", "1").exit_code == 0
    assert f'chat_template = "{other}/tokenizer_config.json"' in (
        (tmp_path / "run/config.toml").read_text()
    )
    done = call("export", tmp_path / "run", "--output", tmp_path / "out", "-q")
    assert done.exit_code == 0, done.stderr
    assert (tmp_path / "out/chat_template.jinja").read_text() == TEMPLATE.replace("<a>", "<u>")


def snippet(directory: Path) -> str:
    card = (directory / "README.md").read_text()
    return re.search(r"```python\n(.*?)```", card, re.DOTALL)[1]


@pytest.mark.slow
def test_what_is_exported_is_loaded_as_its_card_says(base, tmp_path, monkeypatch, capsys):
    train(base, tmp_path / "run", "--steps", "1", "--set", "task.system_prompt=Answer.")
    done = call("export", tmp_path / "run", "--output", tmp_path / "out", "-q")
    assert f"its base is the directory {base}" in done.stdout
    assert "--base-model OWNER/NAME" in done.stdout
    monkeypatch.chdir(tmp_path)
    code = snippet(tmp_path / "out")
    assert "'content': 'Answer.'" in code
    capsys.readouterr()
    exec(compile(code, "README.md", "exec"), {})
    assert capsys.readouterr().out.endswith("\n")

    named = call(
        "export", tmp_path / "run", "--output", tmp_path / "x", "--base-model", "a/b", "-q"
    )
    assert named.stdout == f"{tmp_path}/x: adapter from {tmp_path}/run/adapter\n"
    settings = json.loads((tmp_path / "x/adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == "a/b"
    assert "base_model: a/b\n" in (tmp_path / "x/README.md").read_text()
    assert "base, adapter = 'a/b', 'x'" in snippet(tmp_path / "x")
    how = ["--format", "merged", "--output", tmp_path / "y", "--base-model", "a/b"]
    assert call("export", tmp_path / "run", *how).exit_code == 2


@pytest.mark.slow
def test_an_adapter_that_is_not_the_policy_does_not_stay(base, tmp_path, monkeypatch):
    train(base, tmp_path / "run", "--steps", "1", *VARIED)
    import lowmem_grpo.run.export as module

    written = module.export_adapter

    def less(source, output, base, tokenizer):
        written(source, output, base, tokenizer)
        path = output / "adapter_config.json"
        path.write_text(path.read_text().replace('"lora_alpha": 32', '"lora_alpha": 16'))

    monkeypatch.setattr(module, "export_adapter", less)
    failed = call("export", tmp_path / "run", "--output", tmp_path / "out", "-q")
    assert failed.exit_code == 1
    assert "nat from the policy's in the mean, and rounding explains" in failed.stderr
    assert not (tmp_path / "out").exists()


def test_bases_of_this_machine_are_named_for_others(tmp_path):
    plain = make_tiny_model(tmp_path / "qwen2", "qwen2")
    file = write_gguf(plain, tmp_path / "tiny.gguf")
    found = shared_base(str(file))
    assert (found.name, found.is_public) == (str(file), False)
    assert "tiny.gguf, which PEFT cannot load" in found.remark
    assert shared_base("smollm2-135m").name == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert "Q4_1" in shared_base("smollm2-135m").remark
    assert shared_base("Qwen/Qwen3-8B").is_public
    assert shared_base("Qwen/Qwen3-8B").remark is None
    cached = tmp_path / "hub/models--Qwen--Qwen3-8B/snapshots/0123"
    cached.mkdir(parents=True)
    assert shared_base(str(cached)).name == "Qwen/Qwen3-8B"


def test_the_demo_model_stands_for_its_home_where_that_is_not_here(adapter, tmp_path, monkeypatch):
    other = edited(adapter, tmp_path / "other", base_model_name_or_path=DEMO_HOME)
    monkeypatch.setenv("LOWMEM_GRPO_CACHE", str(tmp_path / "cache"))

    def base():
        return with_adapter(build_config([]), read_adapter_file(other)).model.name

    assert base() == DEMO_HOME
    (tmp_path / "cache/models/smollm2-135m").mkdir(parents=True)
    assert base() == "smollm2-135m"
    monkeypatch.setattr(adapter_config, "try_to_load_from_cache", lambda *names: "config.json")
    assert base() == DEMO_HOME
