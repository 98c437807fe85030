"""TinyLlama-1.1B, 4-bit + LoRA, forward and backward of 1 x 1000 tokens on a card before Hopper.

A recorded run of older versions of bitsandbytes, PEFT, transformers and torch. What they did
differently is restated below, read off the stack frames of the recording; everything else (what
autograd keeps, what operations allocate, CUDA's rules, the allocator) is what a plan uses.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from lowmem_grpo.memory import plain_pickle
from lowmem_grpo.memory.allocator import MIB
from lowmem_grpo.memory.replay import replay
from lowmem_grpo.memory.rules import CudaRules
from lowmem_grpo.memory.simulate import simulate
from lowmem_grpo.memory.trace import Recorder

from .row import CONFIGS, Row

RECORDED = "tinyllama_nf4_lora_fwd_bwd.pickle"
REPORTED = {
    "allocated at the start": 1052.5,
    "peak allocated": 5640.1,
    "peak reserved": 6172.0,
    "allocated at the end": 2190.9,
}
CARD = SimpleNamespace(compute_capability=(8, 0), multiprocessors=108)


class OldMatMul4bit(torch.autograd.Function):
    """bitsandbytes before 0.50: dequantise to float16, cast to x's dtype, multiply; x is kept as an
    attribute of the node, so that not even the end of backward frees it while the graph lives.
    """

    @staticmethod
    def forward(ctx, x, packed, shape):
        ctx.kept, ctx.packed, ctx.shape = x, packed, shape
        return torch.nn.functional.linear(x, dequantised(packed, shape, x.dtype))

    @staticmethod
    def backward(ctx, grad):
        return grad @ dequantised(ctx.packed, ctx.shape, grad.dtype), None, None


def dequantised(packed, shape, dtype):
    return packed.new_empty(shape, dtype=torch.float16).to(dtype)


class OldLinear4bit(torch.nn.Module):
    """FP4 in blocks of 64, without double quantisation."""

    def __init__(self, inside, out):
        super().__init__()
        self.shape = out, inside
        packed = torch.empty(out * inside // 2, 1, dtype=torch.uint8)
        self.weight = torch.nn.Parameter(packed, requires_grad=False)
        self.register_buffer("absmax", torch.empty(out * inside // 64))

    def forward(self, x):
        return OldMatMul4bit.apply(x, self.weight, self.shape)


class OldLora(torch.nn.Module):
    """PEFT's 4-bit LoRA layer of that time: r 16, alpha 32, dropout 0.05, float32."""

    def __init__(self, inside, out):
        super().__init__()
        self.base = OldLinear4bit(inside, out)
        self.dropout = torch.nn.Dropout(0.05)
        self.lora_A = torch.nn.Linear(inside, 16, bias=False)
        self.lora_B = torch.nn.Linear(16, out, bias=False)

    def forward(self, x):
        result = self.base(x)
        result = result.clone()
        output = self.lora_B(self.lora_A(self.dropout(x))) * 2.0
        return result + output


class OldMean(torch.autograd.Function):
    """The mean of the last dimension; torch then kept the input for backward, not its sizes."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.mean(-1, keepdim=True)

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return grad.expand(x.shape) / x.shape[-1]


class OldNorm(torch.nn.Module):
    def __init__(self, size):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.empty(size), requires_grad=False)

    def forward(self, x):
        variance = OldMean.apply(x.pow(2))
        x = x * torch.rsqrt(variance + 1e-5)
        return self.weight * x


class OldAttention(torch.nn.Module):
    """Rotary tables made in every layer; keys and values repeated for all query heads."""

    def __init__(self, config):
        super().__init__()
        size, self.heads = config["hidden_size"], config["num_attention_heads"]
        self.kv_heads, self.head = config["num_key_value_heads"], size // self.heads
        self.q_proj = OldLora(size, size)
        self.k_proj = OldLinear4bit(size, self.kv_heads * self.head)
        self.v_proj = OldLora(size, self.kv_heads * self.head)
        self.o_proj = OldLinear4bit(size, size)
        self.register_buffer("inv_freq", torch.empty(self.head // 2))

    def rotary(self, positions):
        frequency = self.inv_freq[None, :, None].float().expand(1, -1, 1)
        angles = (frequency @ positions[:, None, :].float()).transpose(1, 2)
        both = torch.cat((angles, angles), dim=-1)
        return both.cos(), both.sin()

    def forward(self, x, positions):
        query, key, value = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        query, key, value = (
            y.view(1, -1, y.shape[-1] // self.head, self.head).transpose(1, 2)
            for y in (query, key, value)
        )
        cos, sin = self.rotary(positions)
        cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
        query, key = rotated(query, cos, sin), rotated(key, cos, sin)
        key = repeated(key, self.heads // self.kv_heads)
        value = repeated(value, self.heads // self.kv_heads)
        out = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        return self.o_proj(out.transpose(1, 2).contiguous().view(x.shape))


def rotated(x, cos, sin):
    half = x.shape[-1] // 2

    def swapped():
        first, second = x[..., :half], x[..., half:]
        return torch.cat((-second, first), dim=-1)

    return (x * cos) + (swapped() * sin)


def repeated(x, times):
    batch, heads, tokens, size = x.shape
    x = whole(x, 4)[:, :, None, :, :].expand(batch, heads, times, tokens, size)
    return x.reshape(batch, heads * times, tokens, size)


def whole(x, times):
    """Slices of everything (`:`), for which torch then made nodes."""
    for _ in range(times):
        x = x.narrow(0, 0, x.shape[0])
    return x


class OldLayer(torch.nn.Module):
    def __init__(self, config):
        super().__init__()
        size, wide = config["hidden_size"], config["intermediate_size"]
        self.self_attn = OldAttention(config)
        self.gate_proj, self.up_proj = OldLinear4bit(size, wide), OldLinear4bit(size, wide)
        self.down_proj = OldLinear4bit(wide, size)
        self.input_layernorm, self.post_attention_layernorm = OldNorm(size), OldNorm(size)

    def mlp(self, x):
        silu = torch.nn.functional.silu
        return self.down_proj(silu(self.gate_proj(x)) * self.up_proj(x))

    def forward(self, x, positions):
        x = x + self.self_attn(self.input_layernorm(x), positions)
        return x + self.mlp(self.post_attention_layernorm(x))


class OldLlama(torch.nn.Module):
    """Norms, embedding and head in float32, as `prepare_model_for_kbit_training` leaves them, which
    also makes the embedding's result ask for a gradient. Adapters are in train mode.
    """

    def __init__(self, config):
        super().__init__()
        size, words = config["hidden_size"], config["vocab_size"]
        self.embed_tokens = torch.nn.Embedding(words, size)
        self.layers = torch.nn.ModuleList(
            OldLayer(config) for _ in range(config["num_hidden_layers"])
        )
        self.norm = OldNorm(size)
        self.lm_head = torch.nn.Linear(size, words, bias=False)
        self.embed_tokens.requires_grad_(False)
        self.lm_head.requires_grad_(False)

    def forward(self, ids):
        x = self.embed_tokens(ids).requires_grad_(True)
        positions = torch.arange(0, ids.shape[1]).unsqueeze(0)
        for layer in self.layers:
            x = layer(x, positions)
        return self.lm_head(self.norm(x))


def trace_tinyllama():
    """The events of loading, one forward and one backward pass."""
    config = json.loads((CONFIGS / "tinyllama-1.1b.json").read_text())
    with FakeTensorMode():
        ids = torch.zeros(1, 1000, dtype=torch.long)
        labels = torch.zeros(1, 1000, dtype=torch.long)
        with Recorder(rules=CudaRules(CARD)) as recorder:
            with recorder.phase("load"):
                model = OldLlama(config)
                recorder.name(model)
            with recorder.phase("update"):
                logits = model(ids)
                # The loss of that time: the logits shifted, not the labels.
                shifted = whole(logits[..., :-1, :], 1).contiguous().view(-1, logits.shape[-1])
                loss = torch.nn.functional.cross_entropy(
                    shifted, labels[..., 1:].contiguous().view(-1)
                )
                del shifted
                loss.backward()
    return recorder.events


def validate_tinyllama(snapshot: Path | None) -> tuple[list[Row], list]:
    """Rows of the table in MiB, and the events."""
    reported = dict(REPORTED)
    if snapshot is not None:
        report = replay(snapshot)
        names = ("start_allocated", "peak_allocated", "peak_reserved", "final_allocated")
        found = [getattr(report, name) / MIB for name in names]
        reported = dict(zip(REPORTED, found, strict=True))
    events = trace_tinyllama()
    usage = simulate(events)
    loaded = max(n for n, event in enumerate(events) if event.phase == "load")
    predicted = {
        "allocated at the start": usage.timeline.allocated[loaded] / MIB + 2 * 8519680 / MIB,
        "peak allocated": usage.peak_allocated / MIB,
        "peak reserved": usage.peak_reserved / MIB,
        "allocated at the end": usage.final_allocated / MIB,
    }
    run = "TinyLlama-1.1B FP4 + LoRA, 1 x 1000, forward and backward"
    note = "recorded on the card by torch, allocation by allocation"
    return [
        Row(run, name, "MiB", predicted[name], reported[name], note=note) for name in REPORTED
    ], events


def differences(events, snapshot: Path) -> list[tuple[int, int, int]]:
    """(bytes, predicted, recorded) of every allocation size whose counts do not agree."""
    recorded = plain_pickle.load(snapshot.read_bytes())
    (trace,) = [trace for trace in recorded["device_traces"] if trace]
    theirs = Counter(entry["size"] for entry in trace if entry["action"] == "alloc")
    ours = Counter(e.size for e in events if e.action == "alloc" and e.phase != "load")
    sizes = sorted(set(ours) | set(theirs), key=lambda size: -size * abs(ours[size] - theirs[size]))
    return [(size, ours[size], theirs[size]) for size in sizes if ours[size] != theirs[size]]
