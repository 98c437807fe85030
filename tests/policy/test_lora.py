"""The 4-bit LoRA layer against its definition, what it keeps for backward, and PEFT's files."""

import bitsandbytes as bnb
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from lowmem_grpo.policy.load import nf4_config
from lowmem_grpo.policy.lora import ADAPTER, LoraLinear4bit, lora_config

INSIDE, OUT, R, ALPHA = 128, 64, 3, 12


def make_layer(dtype=torch.float32, *, bias=False, seed=0) -> LoraLinear4bit:
    """A layer over a random quantised weight, with both adapters away from zero."""
    generator = torch.Generator().manual_seed(seed)
    base = bnb.nn.Linear4bit(
        INSIDE, OUT, bias=bias, compute_dtype=dtype, compress_statistics=True, quant_type="nf4"
    )
    weights = {"weight": torch.randn(OUT, INSIDE, generator=generator, dtype=torch.float32)}
    if bias:
        weights["bias"] = torch.randn(OUT, generator=generator)
    base.load_state_dict(weights)
    base = base.to(dtype).to("cpu").requires_grad_(False)  # quantises
    config = lora_config(r=R, lora_alpha=ALPHA, target_modules=["x"], init_lora_weights=True)
    layer = LoraLinear4bit(base, ADAPTER, config=config, r=R, lora_alpha=ALPHA)
    layer.lora_A.float(), layer.lora_B.float()  # as `get_peft_model` does
    with torch.no_grad():
        for part in (layer.lora_A, layer.lora_B):
            part[ADAPTER].weight.normal_(generator=generator)
    return layer.train()


def define(layer, x):
    """y = x W^T + b + (alpha / r) x A^T B^T in float32, from the dequantised weight."""
    base = layer.base_layer
    weight = bnb.functional.dequantize_4bit(base.weight.data, base.weight.quant_state).float()
    a, b = layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight
    y = x @ weight.T + ALPHA / R * (x @ a.T @ b.T)
    return y if base.bias is None else y + base.bias.float()


def run(layer, function, x, seed=3):
    """Result and gradients of x, A and B for a random weighting of the result."""
    y = function(x)
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(seed))
    parts = [x, layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight]
    return y, *torch.autograd.grad((y.float() * weights).sum(), parts)


def make_input(shape, dtype=torch.float32):
    x = torch.randn(*shape, INSIDE, generator=torch.Generator().manual_seed(5)).to(dtype)
    # Not a leaf, as inside a model: a base with a bias behaves differently then.
    return x.requires_grad_() * 1.0


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(1, 7), (7,), (2, 3), (1, 1), (1,)])
def test_forward_and_gradients_are_the_definition(shape, bias):
    layer, x = make_layer(bias=bias), make_input(shape)
    found = run(layer, layer, x)
    expected = run(layer, lambda x: define(layer, x), x)
    assert found[0].shape == (*shape, OUT)
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)


def test_bfloat16_products_of_float32_adapters():
    layer, x = make_layer(torch.bfloat16), make_input((1, 50), torch.bfloat16)
    y, grad_x, grad_a, grad_b = run(layer, layer, x)
    assert y.dtype == grad_x.dtype == torch.bfloat16
    assert grad_a.dtype == grad_b.dtype == torch.float32
    assert {p.dtype for n, p in layer.named_parameters() if "lora_" in n} == {torch.float32}
    expected = run(layer, lambda x: define(layer, x.float()), x)
    for mine, theirs in zip((y, grad_x, grad_a, grad_b), expected, strict=True):
        assert (mine.float() - theirs.float()).norm() < 0.01 * theirs.float().norm()


def test_adapters_off_is_the_base_to_the_bit():
    layer, x = make_layer(bias=True), make_input((2, 5))
    on = layer(x)
    layer.enable_adapters(False)
    assert torch.equal(layer(x), layer.base_layer(x))
    layer.enable_adapters(True)
    assert torch.equal(layer(x), on)
    assert not torch.equal(on, layer.base_layer(x))


@pytest.mark.parametrize("bias", [False, True])
def test_x_is_kept_once_and_never_in_float32(bias):
    layer, x = make_layer(torch.bfloat16, bias=bias), make_input((1, 200), torch.bfloat16)
    kept = []

    def keep(tensor):
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        y = layer(x)
    of_x = [t for t in kept if t.untyped_storage().data_ptr() == x.untyped_storage().data_ptr()]
    assert len(of_x) == 1
    others = [t for t in kept if t is not of_x[0]]
    # Else A x, and the two adapters in the compute dtype.
    assert sorted(t.numel() for t in others) == sorted([200 * R, R * INSIDE, R * OUT])
    assert {t.dtype for t in kept} == {torch.bfloat16}
    assert y.untyped_storage().data_ptr() not in {t.untyped_storage().data_ptr() for t in kept}


def test_saved_adapters_are_pefts(shared_policy, tiny_model_dir, tmp_path):
    """Names, shapes and results: the files load into plain transformers and PEFT."""
    shared_policy.save_adapter_config(tmp_path, str(tiny_model_dir))
    state = shared_policy.adapter_state()
    save_file(state, tmp_path / "adapter_model.safetensors", metadata={"format": "pt"})

    plain = AutoModelForCausalLM.from_pretrained(
        tiny_model_dir, quantization_config=nf4_config(torch.float32), dtype=torch.float32
    )
    loaded = PeftModel.from_pretrained(plain, tmp_path)
    assert not any(isinstance(m, LoraLinear4bit) for m in loaded.modules())
    loaded.train()  # in eval mode bitsandbytes computes in bfloat16 where the CPU can
    ids = torch.tensor([[4, 80, 33, 12, 60]])
    with torch.no_grad():
        theirs = loaded(input_ids=ids).logits[0]
        layout = shared_policy.layout([(5, ())])
        ours = shared_policy.logits(shared_policy.hidden(ids[0], torch.arange(5), layout))
        with loaded.disable_adapter():
            assert (loaded(input_ids=ids).logits[0] - theirs).abs().max() > 0.1
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)

    own = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    fresh = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_model_dir), own)
    expected = {n: t.shape for n, t in get_peft_model_state_dict(fresh).items()}
    assert {n: t.shape for n, t in state.items()} == expected
