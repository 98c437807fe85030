"""Tiny random models of every family that trains, in shapes that hide nothing.

Each has what its family has and others lack: windows shorter than a row, grouped heads, partial
rotary embeddings, layers without positions, tied and untied ends, biases, experts. Weights and
biases are random throughout, so that what is left out shows.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tests.tiny import SHAPE, make_tokenizer

__all__ = ["FAMILIES", "WINDOW", "Family", "make_family"]

WINDOW = 6
"""Tokens that a layer with a sliding window sees: fewer than a row of the tests has."""


@dataclass(frozen=True)
class Family:
    """A name as people say it, transformers' `model_type`, and fields beside `tests.tiny.SHAPE`."""

    name: str
    model_type: str
    fields: dict[str, Any] = field(default_factory=dict)


def _rope(kind: str = "default", theta: float = 10000.0, **more) -> dict[str, Any]:
    return {"rope_type": kind, "rope_theta": theta, **more}


_UNTIED = {"tie_word_embeddings": False}
_LAYERS = ["sliding_attention", "full_attention"]
_EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2}
_PARTIAL = {"rope_parameters": _rope(partial_rotary_factor=0.5)}

FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        Family(
            "Llama",
            "llama",
            {
                **_UNTIED,
                "attention_bias": True,
                "mlp_bias": True,
                "rope_parameters": _rope(
                    "llama3",
                    factor=8.0,
                    low_freq_factor=1.0,
                    high_freq_factor=4.0,
                    original_max_position_embeddings=16,
                ),
            },
        ),
        Family(
            "Qwen2",
            "qwen2",
            {
                "use_sliding_window": True,
                "sliding_window": WINDOW,
                "max_window_layers": 1,
                "num_key_value_heads": 1,
            },
        ),
        Family("Qwen3", "qwen3", {"head_dim": 32, **_UNTIED}),
        Family(
            "Gemma 3 (text)",
            "gemma3_text",
            {
                "head_dim": 16,
                "query_pre_attn_scalar": 24,
                "sliding_window": WINDOW,
                "layer_types": _LAYERS,
                "rope_parameters": {
                    "sliding_attention": _rope(),
                    "full_attention": _rope("linear", 1e6, factor=8.0),
                },
            },
        ),
        Family(
            "Gemma 4 (text)",
            "gemma4_text",
            {
                "head_dim": 16,
                "global_head_dim": 32,
                "num_hidden_layers": 4,
                "layer_types": [*_LAYERS, *_LAYERS],
                "sliding_window": WINDOW,
                "num_kv_shared_layers": 0,
                "hidden_size_per_layer_input": 0,
                "final_logit_softcapping": None,
                "vocab_size_per_layer_input": 128,
            },
        ),
        Family("Phi-2", "phi", {**_UNTIED, **_PARTIAL, "qk_layernorm": True}),
        Family("Phi-3", "phi3", {**_UNTIED, **_PARTIAL, "sliding_window": WINDOW}),
        Family("Mistral", "mistral", {**_UNTIED, "sliding_window": WINDOW, "head_dim": 32}),
        Family(
            "Ministral 3",
            "ministral3",
            {
                "head_dim": 32,
                "sliding_window": None,
                "rope_parameters": _rope(
                    "yarn",
                    factor=16.0,
                    original_max_position_embeddings=16,
                    beta_fast=32.0,
                    beta_slow=1.0,
                    mscale=1.0,
                    mscale_all_dim=1.0,
                    llama_4_scaling_beta=0.1,
                ),
            },
        ),
        Family("SmolLM3", "smollm3", {"no_rope_layers": [1, 0]}),
        Family("GLM-4", "glm4", {**_UNTIED, **_PARTIAL, "head_dim": 16, "attention_bias": True}),
        Family("OLMo", "olmo", {"clip_qkv": 2.0, "num_key_value_heads": 4}),
        Family("OLMo 2", "olmo2", {**_UNTIED}),
        Family(
            "OLMo 3",
            "olmo3",
            {
                **_UNTIED,
                "sliding_window": WINDOW,
                "layer_types": _LAYERS,
                "rope_parameters": _rope(
                    "yarn",
                    factor=8.0,
                    original_max_position_embeddings=64,
                    attention_factor=1.2,
                    beta_fast=32.0,
                    beta_slow=1.0,
                ),
            },
        ),
        Family(
            "GPT-NeoX",
            "gpt_neox",
            {
                **_UNTIED,
                "rope_parameters": _rope(partial_rotary_factor=0.25),
                "use_parallel_residual": True,
            },
        ),
        Family("GPT-2", "gpt2", {"n_positions": 512}),
        Family("StarCoder2", "starcoder2", {"sliding_window": WINDOW, "use_bias": True}),
        Family(
            "EXAONE 4",
            "exaone4",
            {"sliding_window": WINDOW, "sliding_window_pattern": 2, "layer_types": _LAYERS},
        ),
        Family("HunYuan (dense)", "hunyuan_v1_dense", {"head_dim": 32}),
        Family("ERNIE 4.5", "ernie4_5", {"head_dim": 16, "use_bias": True}),
        Family("Arcee", "arcee", {**_UNTIED}),
        Family("Helium", "helium", {"head_dim": 16}),
        Family("Apertus", "apertus", {**_UNTIED}),
        Family("Mixtral", "mixtral", {**_UNTIED, **_EXPERTS, "sliding_window": WINDOW}),
        Family(
            "Qwen3-MoE",
            "qwen3_moe",
            {
                **_UNTIED,
                **_EXPERTS,
                "head_dim": 32,
                "moe_intermediate_size": 64,
                "mlp_only_layers": [0],
                "norm_topk_prob": True,
            },
        ),
        Family("OLMoE", "olmoe", {**_UNTIED, **_EXPERTS, "clip_qkv": 2.0}),
        Family(
            "GLM-4-MoE",
            "glm4_moe",
            {
                **_UNTIED,
                **_PARTIAL,
                "head_dim": 16,
                "n_routed_experts": 4,
                "num_experts_per_tok": 2,
                "n_group": 1,
                "topk_group": 1,
                "n_shared_experts": 1,
                "first_k_dense_replace": 1,
                "moe_intermediate_size": 64,
                "use_qk_norm": True,
            },
        ),
    )
}


def make_family(directory: Path, model_type: str, *, seed: int = 0, **overrides) -> Path:
    """Write a random model of a family of `FAMILIES` with a tokenizer and return its directory;
    `overrides` of its fields.
    """
    fields = {**SHAPE, **FAMILIES[model_type].fields, **overrides}
    write_random(directory, model_type, fields, seed)
    return Path(directory)


def write_random(directory: Path, model_type: str, fields: dict[str, Any], seed: int = 0) -> None:
    """Write a random causal LM of a `model_type` in float32, with a tokenizer."""
    config = AutoConfig.for_model(model_type, **fields)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim > 1:
                    parameter.normal_(0.0, 0.2)
                else:
                    parameter.add_(torch.randn_like(parameter), alpha=0.1)
    model.save_pretrained(directory)
    make_tokenizer().save_pretrained(directory)
