"""Which models are refused for what their configuration says, and why, in the model's own terms.

What a configuration tells is told here, before any weight is read, so a plan refuses what training
refuses. What only the arithmetic tells is found by `policy/check.py`. Small numbers hide some of
it: a soft cap of 30 does nothing to the logits of an untrained model.
"""

import re
from typing import Any

from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from lowmem_grpo.errors import ModelError

__all__ = ["OWN_ATTENTION", "UnsupportedError", "check_composite", "check_config", "without_noise"]

OWN_ATTENTION = "its attention is its own, which cannot be replaced by ours"

_NOISE = re.compile(r"dropout|pdrop|layer_?drop|jitter_noise")
_ATTENTION = {"full_attention", "sliding_attention"}

# Fields, the value that means nothing is done, and what is done otherwise.
_HEAD = (
    (("final_logit_softcapping", "logits_soft_cap"), None, "soft-caps its logits at {}"),
    (("logits_scaling",), 1.0, "divides its logits by {}"),
    (
        ("logit_scale", "lm_head_multiplier", "output_multiplier"),
        1.0,
        "multiplies its logits by {}",
    ),
    (("attn_logit_softcapping",), None, "soft-caps its attention scores at {}"),
)
_LAYERS = ("layer_types", "layers_block_type", "block_types")


class UnsupportedError(Exception):
    """A model asks for something that is not computed here. Its message is the reason, in words
    that follow "is not supported:".
    """


def without_noise(config) -> None:
    """Turn every dropout and every noise of a configuration off: two passes over the same tokens
    must agree, in train mode as well, which the base is always in (see policy/base.py).
    """
    for name, value in vars(config).items():
        if _NOISE.search(name) and isinstance(value, (int, float)):
            setattr(config, name, 0.0)


def check_composite(path, fields: dict[str, Any]) -> None:
    """Raises ModelError for the fields of a `config.json` that joins several models."""
    if isinstance(fields.get("text_config"), dict):
        others = sorted(
            name.removesuffix("_config")
            for name, value in fields.items()
            if name.endswith("_config") and isinstance(value, dict) and name != "text_config"
            if name not in ("quantization_config", "generation_config")
        )
        beside = f" with {' and '.join(others)}" if others else ""
        raise ModelError(
            f"{path}: a {fields.get('model_type')} checkpoint is a language model{beside} in one, "
            "which is not supported: use a text-only checkpoint of the model"
        )


def check_config(name: str, config) -> None:
    """Raises ModelError for a model that cannot be trained, as far as its configuration tells."""
    if reason := _reason(config):
        raise ModelError(f"{name} ({config.model_type}) is not supported: {reason}")


def _reason(config) -> str | None:
    if getattr(config, "is_encoder_decoder", False):
        return "it has an encoder beside its decoder, and GRPO here trains decoders alone"
    if config.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        return "transformers has no causal language model of this architecture"
    for names, nothing, what in _HEAD:
        for name in names:
            value = getattr(config, name, None)
            if value is not None and value != nothing:
                return f"it {what.format(value)} ({name}), which is not computed here"
    if getattr(config, "alibi", False):
        return "its attention adds a bias for the distance (alibi), which is not computed here"
    for name in _LAYERS:
        kinds = getattr(config, name, None)
        others = sorted({*kinds} - _ATTENTION) if isinstance(kinds, (list, tuple)) else []
        if others:
            return (
                f"it has {' and '.join(map(str, others))} layers ({name}), and only causal "
                "attention, whole or with a sliding window, keeps completions apart here"
            )
    return None
