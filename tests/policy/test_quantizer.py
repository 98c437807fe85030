"""Loading in 4 bits takes nothing of the card beforehand, and is bitsandbytes' otherwise."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig
from transformers.modeling_utils import get_total_byte_count

from lowmem_grpo.policy.load import load_in_4_bits

BFLOAT16 = torch.bfloat16


def taken(model):
    """The bytes that `from_pretrained` takes of a card and frees again before it loads `model`."""
    places = {name: torch.device("cuda:0") for name, _ in model.named_parameters()}
    return sum(get_total_byte_count(model, places, model.hf_quantizer).values())


@pytest.fixture(scope="module")
def plain(tiny_model_dir):
    theirs = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=BFLOAT16,
    )  # fmt: skip
    return AutoModelForCausalLM.from_pretrained(
        tiny_model_dir, quantization_config=theirs, dtype=BFLOAT16, device_map={"": "cpu"}
    )


@pytest.mark.parametrize("files", ["16 bits", "4 bits"])
def test_loading_takes_nothing_beforehand_and_makes_the_same_model(
    plain, tiny_model_dir, tmp_path, files
):
    if files == "4 bits":
        plain.save_pretrained(tmp_path)
        tiny_model_dir = tmp_path
    config = AutoConfig.from_pretrained(tiny_model_dir)
    model = load_in_4_bits(AutoModelForCausalLM, str(tiny_model_dir), config, "cpu", BFLOAT16)
    assert taken(plain) > 10_000
    assert taken(model) == 0
    ours, theirs = model.state_dict(), plain.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    # Others read it: PEFT, and whoever loads what is saved.
    fields, wanted = (m.config.to_dict()["quantization_config"] for m in (model, plain))
    fields.pop("llm_int8_skip_modules"), wanted.pop("llm_int8_skip_modules")
    assert fields == wanted
    assert model.quantization_method == plain.quantization_method
    assert model.is_loaded_in_4bit
