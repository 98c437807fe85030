"""Adapters in GGUF, as llama.cpp's own converter writes them."""

import gguf
import pytest
import torch

from lowmem_grpo.errors import ConfigError, ExportError
from lowmem_grpo.policy.lora import ADAPTER
from lowmem_grpo.run.gguf_adapter import check_gguf_adapter, write_gguf_adapter
from tests.families import make_family
from tests.grpo.policies import move_adapters, open_policy
from tests.tiny import make_tiny_model


def permute(weights, n_head):
    """Llama's rows as llama.cpp has them (conversion/llama.py, `permute`), head by head."""
    size = weights.shape[0] // n_head
    rows = [
        head * size + half * (size // 2) + i
        for head in range(n_head)
        for i in range(size // 2)
        for half in (0, 1)
    ]
    return weights[rows]


def test_names_metadata_and_rows_are_llama_cpps(tmp_path):
    policy = open_policy(make_tiny_model(tmp_path / "tiny"))
    write_gguf_adapter(policy, tmp_path / "a.gguf", "sums")
    assert check_gguf_adapter(policy, tmp_path / "a.gguf") == 14
    reader = gguf.GGUFReader(tmp_path / "a.gguf")
    said = {key: reader.get_field(key).contents() for key in reader.fields if "." in key}
    expected = {
        "general.architecture": "llama", "general.type": "adapter", "general.name": "sums",
        "adapter.type": "lora", "adapter.lora.alpha": 8.0,
    }  # fmt: skip
    assert {key: said[key] for key in expected} == expected
    tensors = {t.name: torch.from_numpy(t.data.copy()) for t in reader.tensors}
    assert len(tensors) == 28
    layer = policy.causal_lm.model.layers[1]
    for name, module, heads in (
        ("attn_q", layer.self_attn.q_proj, 4),
        ("attn_k", layer.self_attn.k_proj, 2),
        ("attn_v", layer.self_attn.v_proj, None),
        ("ffn_down", layer.mlp.down_proj, None),
    ):
        b = module.lora_B[ADAPTER].weight.detach()
        b = b if heads is None else permute(b, heads)
        assert torch.equal(tensors[f"blk.1.{name}.weight.lora_b"], b)
        a = module.lora_A[ADAPTER].weight.detach()
        assert torch.equal(tensors[f"blk.1.{name}.weight.lora_a"], a)
    move_adapters(policy, 0.1, seed=9)
    with pytest.raises(ExportError, match=r"blk\.0\.attn_q differs from the policy's"):
        check_gguf_adapter(policy, tmp_path / "a.gguf")


@pytest.mark.slow
@pytest.mark.parametrize(
    "family", ["mistral", "arcee", "smollm3", "qwen2", "qwen3", "gemma3_text", "phi3", "starcoder2",
               "apertus"],
)  # fmt: skip
def test_other_architectures(family, tmp_path):
    policy = open_policy(make_family(tmp_path / "tiny", family))
    write_gguf_adapter(policy, tmp_path / "a.gguf", "sums")
    check_gguf_adapter(policy, tmp_path / "a.gguf")
    names = {t.name for t in gguf.GGUFReader(tmp_path / "a.gguf").tensors}
    assert len(names) == len(policy.adapter_parameters())


def test_scales_of_layers_are_in_b_and_embeddings_are_looked_up(tmp_path):
    from lowmem_grpo.policy.adapters import AdapterSettings
    from lowmem_grpo.policy.load import load_policy

    policy = load_policy(
        str(make_tiny_model(tmp_path / "tiny")), device="cpu", dtype=torch.float32,
        attention="sdpa", seed=0, tile_tokens=7, tile_vocab=19, adapters=AdapterSettings(
            r=4, lora_alpha=8, target_modules=("q_proj", "up_proj", "embed_tokens"),
            rank_pattern={"q_proj": 2}, alpha_pattern={"up_proj": 3}, use_rslora=True,
        ),
    )  # fmt: skip
    move_adapters(policy, 0.1)
    write_gguf_adapter(policy, tmp_path / "a.gguf", "sums")
    assert check_gguf_adapter(policy, tmp_path / "a.gguf") == 5
    shapes = {t.name: tuple(t.data.shape) for t in gguf.GGUFReader(tmp_path / "a.gguf").tensors}
    assert shapes["token_embd.weight.lora_a"] == (128, 4)  # as convert_lora_to_gguf.py turns it
    assert shapes["blk.0.attn_q.weight.lora_a"] == (2, 64)


def test_layers_and_models_that_llama_cpp_arranges_otherwise_are_refused(tmp_path):
    from lowmem_grpo.run.gguf_adapter import check_architecture

    with pytest.raises(ConfigError, match="not of gpt_neox: use --format adapter"):
        check_architecture("gpt_neox")
    policy = open_policy(
        make_family(tmp_path / "tiny", "gemma3_text"), target_modules=("embed_tokens", "q_proj")
    )
    with pytest.raises(ConfigError, match=r"takes no adapter on model\.embed_tokens"):
        write_gguf_adapter(policy, tmp_path / "a.gguf", "sums")
