"""Published numbers that are not traced: counted by hand, or named with the reason why not."""

from __future__ import annotations

import json

from .row import CONFIGS, Row

GIB = 1024**3
CONTEXT = 450 * 1024**2  # the middle of 300 to 600 MiB
UNSLOTH_SFT = {4: 7, 8: 8, 16: 10, 32: 16, 64: 25}  # K tokens: GB
FLOOR = (
    "counted, not traced: Unsloth's kernels are not restated. A lower bound of device use: 4-bit "
    "weights, 16-bit embedding and head, float32 adapters r 8 with gradient and moments, one "
    "16-bit hidden state a token and layer, 16-bit logits once (their loss writes the gradient "
    "over them), context 450 MiB; a layer's own activations are left out"
)
CALCULATED = (
    "Unsloth's table is calculated, not measured, so its totals are not comparable: no step to "
    "trace, and offloaded checkpoints and vLLM's pool are not in a model of the allocator"
)
KV = (
    "16-bit keys and values of all layers. Their row counts one of the eight sequences (2.5 GiB "
    "exactly); the prediction is for eight"
)
LOGITS = "float32 logits of eight sequences, once: their row, recomputed"
CLAIM = (
    "a claim that a setting fits, not a peak; experts in MXFP4 and vision towers are not expressed"
)


def config(name: str) -> dict:
    return json.loads((CONFIGS / f"{name}.json").read_text())


def nf4_bytes(fields: dict) -> int:
    """Of a Llama's linear layers without the head: NF4, blocks of 64, double quantisation."""
    size, wide = fields["hidden_size"], fields["intermediate_size"]
    kv = size * fields["num_key_value_heads"] // fields["num_attention_heads"]
    shapes = [(size, size)] * 2 + [(size, kv)] * 2 + [(size, wide)] * 3
    count = sum(inside * out for inside, out in shapes)
    return fields["num_hidden_layers"] * (count // 2 + count // 64 + 4 * count // (64 * 256))


def adapter_elements(fields: dict, rank: int) -> int:
    size, wide = fields["hidden_size"], fields["intermediate_size"]
    kv = size * fields["num_key_value_heads"] // fields["num_attention_heads"]
    sides = 2 * (size + size) + 2 * (size + kv) + 3 * (size + wide)
    return fields["num_hidden_layers"] * rank * sides


def unsloth_floor(tokens: int) -> float:
    """GiB of Llama-2-7B that no implementation of `FLOOR` can do without."""
    fields = config("llama-2-7b")
    embedding = 2 * fields["vocab_size"] * fields["hidden_size"]
    fixed = nf4_bytes(fields) + 2 * embedding + 16 * adapter_elements(fields, 8) + CONTEXT
    hidden = 2 * fields["hidden_size"] * fields["num_hidden_layers"]
    return (fixed + tokens * (hidden + 2 * fields["vocab_size"])) / GIB


def kv_cache(sequences: int, tokens: int) -> float:
    """GiB of Llama-3.1-8B's keys and values in 16 bits."""
    fields = config("llama-3.1-8b")
    width = fields["num_key_value_heads"] * fields["head_dim"]
    return 2 * 2 * fields["num_hidden_layers"] * width * sequences * tokens / GIB


def counted_rows() -> list[Row]:
    grpo = "Unsloth GRPO: Llama-3.1-8B, 8 x 20K"
    tokens = 20 * 1024
    logits = 4 * config("llama-3.1-8b")["vocab_size"] * 8 * tokens / GIB
    return [
        *(
            Row(
                f"Unsloth kernels: Llama-2-7B r 8, 1 x {kilo}K",
                "device, at least",
                "GiB",
                unsloth_floor(kilo * 1024),
                published,
                FLOOR,
            )
            for kilo, published in UNSLOTH_SFT.items()
        ),
        Row(grpo, "KV cache", "GiB", kv_cache(8, tokens), 2.5, KV),
        Row(f"{grpo}, TRL", "logits", "GiB", logits, 78.3, LOGITS),
        Row(grpo, "total, calculated", "GiB", None, 54.3, CALCULATED),
        Row(f"{grpo}, TRL", "total, calculated", "GiB", None, 510.8, CALCULATED),
        Row("Unsloth GRPO: gpt-oss-20B, 20K", "fits 24 GB", "GiB", None, None, CLAIM),
        Row("Unsloth GRPO: Qwen3-VL-8B, 32K", "fits 24 GB", "GiB", None, None, CLAIM),
    ]
