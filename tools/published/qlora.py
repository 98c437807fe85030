"""A step of supervised QLoRA as other libraries run it, traced on fake tensors.

transformers' model; every linear layer but the head in NF4 with double quantisation (blocks of 64
and 256), restated with PEFT's or torchtune's LoRA around it; checkpointing by transformers; flash
attention as torch's op for ragged batches, one row of T tokens. Two micro-batches with the
optimizer's step between them, so that the second one meets moments and gradients, as in every
accumulation step after the first.

Left out: gradient clipping (its scratch is small), evaluation, what loading needs beyond one
weight at a time.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention.varlen import varlen_attn
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface, AutoModelForCausalLM

from lowmem_grpo.memory.allocator import Event
from lowmem_grpo.memory.rules import CudaRules, StandInAdam8bit
from lowmem_grpo.memory.trace import Recorder
from lowmem_grpo.policy.skeleton import read_model_config

from .autocast import CudaAutocast
from .row import CONFIGS

ATTENTION = "published_ragged"
HALF = torch.bfloat16


@dataclass(frozen=True)
class Step:
    """What a run's memory depends on.

    `config`: a name in tests/memory/configs, or a path, without ".json". `documents`: sequences
    packed into the row of `tokens`. `peft`: PEFT's layer, float32 adapters under autocast;
    otherwise torchtune's, all in 16 bits. `optimizer`: "foreach" and "fused" are torch's AdamW,
    "8bit" is bitsandbytes'.
    `empties`: whether the cache is emptied after loading.
    """

    config: str
    tokens: int
    rank: int
    loss: Callable
    card: object
    documents: int = 1
    dropout: float = 0.0
    peft: bool = True
    optimizer: str = "foreach"
    reentrant: bool = False
    empties: bool = False


def trace_step(step: Step) -> list[Event]:
    """The events of loading and two micro-batches."""
    config = read_model_config(str(CONFIGS / f"{step.config}.json"))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=HALF, attn_implementation=ATTENTION)
    rules = CudaRules(step.card)
    model._set_gradient_checkpointing(
        enable=True, gradient_checkpointing_func=partial(_checkpointed, step, rules)
    )
    with FakeTensorMode(), Recorder(rules=rules) as recorder:
        with recorder.phase("load"):
            _load(model, step)
            recorder.name(model)
        loaded = len(recorder.events)
        optimizer = _optimizer(step, [p for p in model.parameters() if p.requires_grad])
        for first in (True, False):
            with recorder.phase("update"):
                _micro_batch(model, step)
            if first:
                with recorder.phase("optimizer"):
                    optimizer.step()
    emptied = [Event("empty_cache")] if step.empties else []
    return recorder.events[:loaded] + emptied + recorder.events[loaded:]


def _micro_batch(model, step: Step) -> None:
    with _autocast(step):
        ids_1T = torch.zeros(1, step.tokens, dtype=torch.long)
        starts = torch.empty(step.documents + 1, dtype=torch.int32)
        longest = step.tokens // step.documents
        hidden_1TD = model.model(
            ids_1T, use_cache=False, starts=starts, longest=longest
        ).last_hidden_state
        loss = step.loss(model.lm_head, hidden_1TD, ids_1T)
        del hidden_1TD
    loss.backward()


def _autocast(step: Step):
    return CudaAutocast() if step.peft else contextlib.nullcontext()


def _checkpointed(step: Step, rules: CudaRules, layer: Callable, *inputs):
    """Modes are off in backward: a layer that is computed again has to turn them on itself."""

    def run(*inputs):
        with rules.replacements(), _autocast(step):
            return layer(*inputs)

    # Fake tensors have no random state to keep.
    return checkpoint(run, *inputs, use_reentrant=step.reentrant, preserve_rng_state=False)


def _load(model, step: Step) -> None:
    """Make the tensors of a model without any, in the order of loading: base, then adapters."""
    head = model.get_output_embeddings()
    layers = []
    for name, module in list(model.named_modules()):
        if isinstance(module, torch.nn.Linear) and module is not head:
            layers.append(Lora4bit(module.in_features, module.out_features, step))
            model.set_submodule(name, layers[-1])
        elif type(module).__name__ == "XIELUActivation":
            model.set_submodule(name, FusedActivation())
        else:
            _fill(module)
    for layer in layers:
        layer.add_adapter(step)
    model.enable_input_require_grads()
    model.train()


def _fill(module) -> None:
    for name, tensor in module._parameters.items():
        if tensor is not None:
            made = torch.empty(tensor.shape, dtype=tensor.dtype)
            module._parameters[name] = torch.nn.Parameter(made, requires_grad=False)
    for name, tensor in module._buffers.items():
        if tensor is not None:
            module._buffers[name] = torch.empty(tensor.shape, dtype=tensor.dtype)


def _optimizer(step: Step, parameters):
    if step.optimizer == "8bit":
        return StandInAdam8bit(parameters)
    # Fused kernels have no temporaries; one parameter at a time, they hardly count.
    return torch.optim.AdamW(parameters, foreach=step.optimizer == "foreach")


def _attend(module, query, key, value, mask, *, scaling, starts, longest, **rest):
    """Flash attention: query [1, H, T, E] -> [1, T, H, E]. What autocast left in float32 is cast,
    as transformers does.
    """
    query, key, value = (x[0].transpose(0, 1).to(HALF) for x in (query, key, value))
    grouped = query.shape[1] != key.shape[1]
    sizes = (starts, starts, longest, longest)
    out = varlen_attn(
        query, key, value, *sizes, scale=scaling, window_size=(-1, 0), enable_gqa=grouped
    )
    return out[None], None


AttentionInterface.register(ATTENTION, _attend)


class Lora4bit(torch.nn.Module):
    """A linear layer in NF4 with LoRA. PEFT clones what the layer returns."""

    def __init__(self, inside: int, out: int, step: Step):
        super().__init__()
        self.inside, self.out, self.peft = inside, out, step.peft
        whole = torch.empty(out, inside, dtype=HALF)
        packed = torch.empty(out * inside // 2, 1, dtype=torch.uint8)
        self.weight = torch.nn.Parameter(packed, requires_grad=False)
        blocks = out * inside // 64
        self.register_buffer("absmax", torch.empty(blocks, dtype=torch.uint8))
        self.register_buffer("absmax_absmax", torch.empty(-(-blocks // 256)))
        del whole

    def add_adapter(self, step: Step) -> None:
        dtype = torch.float32 if step.peft else HALF
        dropout = step.dropout
        self.dropout = torch.nn.Dropout(dropout) if dropout else torch.nn.Identity()
        self.lora_A = torch.nn.Linear(self.inside, step.rank, bias=False, dtype=dtype)
        self.lora_B = torch.nn.Linear(step.rank, self.out, bias=False, dtype=dtype)

    def forward(self, x):
        result = _Linear4bit.apply(x.to(HALF), self).to(x.dtype)
        if self.peft:
            result = result.clone()
        return result + self.lora_B(self.lora_A(self.dropout(x))) * 2.0


class _Linear4bit(torch.autograd.Function):
    """The weight is dequantised in forward and in backward; only its packed form is kept."""

    @staticmethod
    def forward(ctx, x, layer):
        ctx.layer = layer
        return torch.nn.functional.linear(x, _dequantised(layer))

    @staticmethod
    def backward(ctx, grad):
        return grad @ _dequantised(ctx.layer), None


def _dequantised(layer):
    absmax = torch.empty_like(layer.absmax, dtype=torch.float32)
    return absmax.new_empty(layer.out, layer.inside, dtype=HALF)


class FusedActivation(torch.nn.Module):
    """Apertus' activation as its CUDA package computes it: one kernel each way."""

    def forward(self, x):
        return _Fused.apply(x)


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx, grad):
        return torch.empty_like(grad)
