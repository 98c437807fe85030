"""Files of a model that transformers would read on: what they hold is looked at, and named."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from lowmem_grpo.errors import ModelError
from lowmem_grpo.policy.load import load_tokenizer
from lowmem_grpo.policy.skeleton import read_model_config
from lowmem_grpo.policy.source import resolve
from tests.grpo.policies import open_policy


@pytest.fixture
def model(tiny_model_dir, tmp_path):
    """A copy that may be damaged."""
    return shutil.copytree(tiny_model_dir, tmp_path / "model")


def refusal(of, *arguments) -> str:
    with pytest.raises(ModelError) as caught:
        of(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def change(path, **fields):
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def in_two_files(model):
    """The weights in two files, with an index; returns the index's path."""
    weights = load_file(model / "model.safetensors")
    names = sorted(weights)
    files = {name: f"model-{i % 2}.safetensors" for i, name in enumerate(names)}
    for file in set(files.values()):
        of_file = {name: weights[name] for name in names if files[name] == file}
        save_file(of_file, model / file, {"format": "pt"})
    (model / "model.safetensors").unlink()
    index = model / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": files}))
    return index


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("several", [False, True])
def test_weights_that_are_no_numbers(model, value, several):
    file = model / "model.safetensors"
    if several:
        in_two_files(model)
        file = model / "model-1.safetensors"
    open_policy(model)
    weights = load_file(file)
    # A row of no token that the check of the forward pass meets, or one number of a layer.
    name = "model.layers.1.mlp.down_proj.weight"
    name = name if name in weights else "model.embed_tokens.weight"
    weights[name][-1, -1] = value
    save_file(weights, file, {"format": "pt"})
    assert f"the weight {name} in {file.name} has values that are NaN or inf" in refusal(
        open_policy, model
    )


def test_weights_of_whole_numbers(model):
    weights = load_file(model / "model.safetensors")
    weights["model.norm.weight"] = weights["model.norm.weight"].int()
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    assert "model.norm.weight in model.safetensors is of type I32" in refusal(open_policy, model)


@pytest.mark.parametrize("name", ["../secret.safetensors", "/secret.safetensors", "a/b", "."])
def test_an_index_that_leads_out_of_the_directory(model, name):
    index = in_two_files(model)
    (model.parent / "secret.safetensors").write_bytes((model / "model-0.safetensors").read_bytes())
    document = json.loads(index.read_text())
    document["weight_map"]["model.norm.weight"] = name
    index.write_text(json.dumps(document))
    assert f"{index} names '{name}', which is not in its directory" in refusal(resolve, str(model))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (
            '{"weight_map": {"a": "gone.safetensors"}}',
            "names 'gone.safetensors', which is not there",
        ),
        ('{"weight_map": {"a": 1}}', "has no weight_map"),
        ('{"weight_map": [1]}', "has no weight_map"),
        ("[]", "not a JSON object"),
        ('{"weight_map": {}, "weight_map": {}}', "comes twice"),
    ],
)
def test_an_index_that_is_none(model, text, says):
    in_two_files(model).write_text(text)
    assert says in refusal(resolve, str(model))


def test_layers_that_the_configuration_does_not_count(model):
    change(model / "config.json", num_hidden_layers=1)
    assert "have the layer model.layers.1, which config.json does not" in refusal(
        open_policy, model
    )


def test_weights_that_are_left_over_are_no_layers(model):
    weights = load_file(model / "model.safetensors")
    more = {"model.layers.2.eh_proj.weight": torch.ones(2, 2), "vision.weight": torch.ones(2)}
    more["model.layers.2.mlp.down_proj.weight"] = torch.ones(64, 128)
    save_file({**weights, **more}, model / "model.safetensors", {"format": "pt"})
    open_policy(model)


@pytest.mark.parametrize("damage", ["{", "[]", '{"eos_token_id": 0, "eos_token_id": 3}', "\0"])
def test_generation_settings_that_cannot_be_read(model, damage):
    (model / "generation_config.json").write_text(damage)
    assert str(model / "generation_config.json") in refusal(open_policy, model)


@pytest.mark.parametrize("end", [128, -1, "<e>", [0, 500], True])
def test_ends_that_are_no_tokens(model, end):
    change(model / "generation_config.json", eos_token_id=end)
    assert "is none of the model's 128 tokens" in refusal(open_policy, model)


def test_a_tokenizer_of_another_model(model):
    file = model / "tokenizer.json"
    document = json.loads(file.read_text())
    document["model"]["vocab"]["z"] = 128
    file.write_text(json.dumps(document))
    assert "its tokenizer has a token 128, and the model 128 tokens" in refusal(open_policy, model)


@pytest.mark.parametrize(
    ("name", "content"),
    [("tokenizer.json", b"{"), ("tokenizer_config.json", b"\xff"), ("config.json", b"[]")],
)
def test_a_file_that_cannot_be_read_is_named(model, name, content):
    (model / name).write_bytes(content)
    assert str(model / name) in refusal(load_tokenizer, str(model))


def test_weights_that_cannot_be_read_are_named(model):
    in_two_files(model)
    file = model / "model-1.safetensors"
    file.write_bytes(file.read_bytes()[:-9])
    assert f"cannot read {file}: " in refusal(open_policy, model)


def test_an_adapter_beside_a_model(model):
    (model / "adapter_config.json").write_text("{}")
    assert "has an adapter_config.json beside" in refusal(resolve, str(model))


def test_code_that_transformers_has_is_no_code_of_their_own(model):
    named = {"AutoConfig": "configuration_x.XConfig", "AutoModelForCausalLM": "x.LlamaForCausalLM"}
    change(model / "config.json", auto_map=named)
    change(model / "tokenizer_config.json", auto_map=["x.LlamaTokenizer", None])
    assert read_model_config(str(model)).hidden_size == 64
    load_tokenizer(str(model))
