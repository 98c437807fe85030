"""Directories in bitsandbytes' 4 bits: which layers, and how, is told by the files' tensors."""

import json
import shutil

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from lowmem_grpo.errors import ModelError
from lowmem_grpo.policy.base import AdapterSettings
from lowmem_grpo.policy.integrity import named_tensors
from lowmem_grpo.policy.skeleton import read_model_config, skeleton_policy, without_weights
from tests.families import make_family
from tests.grpo.policies import open_policy
from tests.tiny import make_4_bit_directory, make_tiny_model, make_tokenizer

SKIP = ["lm_head", "model.layers.0.mlp", "model.layers.1.self_attn.q_proj"]


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("plain"))


@pytest.fixture(scope="module")
def dynamic(plain, tmp_path_factory):
    """Four layers are left in 16 bits."""
    return make_4_bit_directory(plain, tmp_path_factory.mktemp("dynamic"), SKIP)


def says(directory, copy, **fields):
    """A copy whose configuration says something else about its 4 bits; None takes a field out."""
    shutil.copytree(directory, copy)
    document = json.loads((copy / "config.json").read_text())
    stored = {**document["quantization_config"], **fields}
    document["quantization_config"] = {n: x for n, x in stored.items() if x is not None}
    (copy / "config.json").write_text(json.dumps(document))
    return copy


def weights(policy):
    """Every weight of the base, dequantised, with whether it is in 4 bits."""
    found = {}
    for name, p in policy.causal_lm.named_parameters():
        if "lora_" not in name:
            packed = type(p).__name__ == "Params4bit"
            value = dequantize_4bit(p.data, p.quant_state) if packed else p.data
            found[name.replace(".base_layer.", ".")] = value, packed
    return found


def same(policy, other) -> bool:
    ours, theirs = weights(policy), weights(other)
    return ours.keys() == theirs.keys() and all(
        value.equal(theirs[name][0]) and packed == theirs[name][1]
        for name, (value, packed) in ours.items()
    )


def test_the_list_of_an_older_library_is_not_needed(tmp_path):
    """As Gemma 3's uploads have it: names of a model that also sees pictures."""
    gemma = make_family(tmp_path / "plain", "gemma3_text")
    directory = make_4_bit_directory(gemma, tmp_path / "4", SKIP)
    older = ["lm_head", "vision_tower", *(f"language_model.{name}" for name in SKIP[1:])]
    changed = says(directory, tmp_path / "older", llm_int8_skip_modules=older)
    policy = open_policy(changed)
    assert sum(packed for _, packed in weights(policy).values()) == 14 - 4
    assert same(policy, open_policy(directory))


@pytest.mark.parametrize(
    "fields",
    [
        {"llm_int8_skip_modules": None},
        {"llm_int8_skip_modules": ["mlp", "self_attn"]},
        {"bnb_4bit_quant_storage": "bfloat16"},
        {"bnb_4bit_quant_type": "fp4", "bnb_4bit_use_double_quant": False},
    ],
    ids=["no list", "all in the list", "another storage", "another kind"],
)
def test_the_tensors_are_right_where_the_configuration_is_not(dynamic, tmp_path, fields):
    assert same(open_policy(says(dynamic, tmp_path / "m", **fields)), open_policy(dynamic))


def test_a_configuration_of_4_bits_over_plain_weights(plain, tmp_path):
    shutil.copytree(plain, tmp_path / "m")
    document = json.loads((plain / "config.json").read_text())
    document["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (tmp_path / "m" / "config.json").write_text(json.dumps(document))
    assert same(open_policy(tmp_path / "m"), open_policy(plain))


@pytest.mark.parametrize("storage", ["bfloat16", "float16", "float32", "int8"])
def test_bytes_that_are_stored_as_numbers(plain, dynamic, tmp_path, storage):
    way = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_quant_storage=storage,
        llm_int8_skip_modules=SKIP,
    )
    AutoModelForCausalLM.from_pretrained(plain, quantization_config=way).save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    policy = open_policy(tmp_path)
    assert same(policy, open_policy(dynamic))
    assert {p.dtype for n, p in policy.model.named_parameters() if p.shape[-1] == 1} == {
        torch.uint8
    }


@pytest.mark.parametrize(
    "way",
    [{"bnb_4bit_quant_type": "fp4"}, {"bnb_4bit_use_double_quant": True}, {}],
    ids=["fp4", "double", "single"],
)
def test_a_plan_knows_how_the_files_are_packed(plain, tmp_path, way):
    way = {"bnb_4bit_quant_type": "nf4", **way}
    way = BitsAndBytesConfig(load_in_4bit=True, llm_int8_skip_modules=SKIP, **way)
    AutoModelForCausalLM.from_pretrained(plain, quantization_config=way).save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    policy = open_policy(tmp_path)
    kind = {
        p.quant_type for n, p in policy.causal_lm.named_parameters() if hasattr(p, "quant_type")
    }
    assert kind == {way.bnb_4bit_quant_type}
    adapters = AdapterSettings(r=4, lora_alpha=8)
    built = without_weights(read_model_config(str(tmp_path)), torch.float32, adapters)
    how = {"attention": "sdpa", "tile_tokens": 7, "tile_vocab": 11}
    skeleton = skeleton_policy(built, device="meta", dtype=torch.float32, **how)

    def sizes(model):
        return {n: t.nbytes for n, t in named_tensors(model) if "lora_" not in n}

    assert sizes(skeleton.model) == sizes(policy.model)


def changed_weights(directory, copy, change):
    shutil.copytree(directory, copy)
    found = load_file(copy / "model.safetensors")
    change(found)
    save_file(found, copy / "model.safetensors", {"format": "pt"})
    return copy


LAYER = "model.layers.1.mlp.up_proj.weight"


def without_scales(found):
    del found[f"{LAYER}.absmax"]


def another_table(found):
    found[f"{LAYER}.quant_map"] = found[f"{LAYER}.quant_map"] * 2


def of_no_layer(found):
    for name in [name for name in found if name.startswith(LAYER)]:
        found[name.replace(LAYER, "model.embed_tokens.weight")] = found[name].clone()


def eight_bits(found):
    found["model.layers.0.mlp.up_proj.SCB"] = torch.ones(4)


def gptq(found):
    found["model.layers.0.mlp.up_proj.qweight"] = torch.ones(4, dtype=torch.int32)


def fp8(found):
    name = "model.layers.0.mlp.up_proj.weight"
    found[name] = found[name].to(torch.float8_e4m3fn)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without_scales, "up_proj.weight is in 4 bits and lacks its scales"),
        (another_table, "the 4 bits of model.layers.1.mlp.up_proj.weight stand for other numbers"),
        (of_no_layer, "model.embed_tokens.weight is in 4 bits, and no linear layer"),
        (eight_bits, "quantised as bitsandbytes' 8 bits .model.layers.0.mlp.up_proj.SCB."),
        (gptq, "quantised as GPTQ or AWQ .model.layers.0.mlp.up_proj.qweight."),
        (fp8, "model.layers.0.mlp.up_proj.weight in model.safetensors is of type F8_E4M3"),
    ],
)
def test_other_ways_to_quantise_are_refused_by_name(dynamic, tmp_path, change, message):
    with pytest.raises(ModelError, match=message):
        open_policy(changed_weights(dynamic, tmp_path / "m", change))


def test_a_head_in_4_bits_is_refused(tmp_path):
    untied = make_tiny_model(tmp_path / "plain", tie_word_embeddings=False)
    with pytest.raises(ModelError, match=r"its head lm_head\.weight is in 4 bits"):
        open_policy(make_4_bit_directory(untied, tmp_path / "4", []))
