"""Policies on fake CUDA tensors, and what is run on them. Import after the guard is installed."""

import weakref
from functools import cached_property, partial

import bitsandbytes as bnb
import numpy as np
import torch
from bitsandbytes.functional import QuantState
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, AutoModelForCausalLM

from lowmem_grpo.grpo.objective import Objective
from lowmem_grpo.grpo.optimizer import build_optimizer
from lowmem_grpo.grpo.packing import pack
from lowmem_grpo.grpo.update import Scoring, accumulate, apply_update, score_reference
from lowmem_grpo.memory.unreal import Values
from lowmem_grpo.policy import activations
from lowmem_grpo.policy.attention import ATTENTION, PackedLayout
from lowmem_grpo.policy.base import AdapterSettings, Policy, attach_adapters
from lowmem_grpo.policy.check import check_forward, share_inputs
from lowmem_grpo.policy.classifier import Classifier, classifier_without_weights
from lowmem_grpo.policy.integrity import named_tensors
from lowmem_grpo.policy.lora import LoraLinear4bit
from lowmem_grpo.policy.skeleton import fill
from lowmem_grpo.rollout.sampler import Request, sample
from lowmem_grpo.rollout.sampling import Sampling
from tests.grpo.rollouts import make_groups
from tests.tiny import SHAPE

__all__ = ["CASES"]

DTYPE = torch.bfloat16


class OneDevice(TorchDispatchMode):
    """Custom operators take fake tensors of any device; their kernels would not.

    torch's own operators are checked by FakeTensorMode.
    """

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace in ("bitsandbytes", "torch_attn"):
            tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
            devices = {x.device.type for x in tensors}
            assert devices == {"cuda"}, f"{function} is given tensors on {sorted(devices)}"
        return function(*args, **(kwargs or {}))


def without_weights(architecture: str, tied: bool):
    """A model with NF4 layers and adapters on the meta device, by the product's own code."""
    config = AutoConfig.for_model(architecture, **{**SHAPE, "tie_word_embeddings": tied})
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            config, dtype=DTYPE, attn_implementation=ATTENTION
        ).requires_grad_(False)
        for name, linear in list(model.named_modules()):
            if isinstance(linear, torch.nn.Linear) and linear is not model.lm_head:
                layer = bnb.nn.Linear4bit(
                    linear.in_features, linear.out_features, linear.bias is not None, DTYPE
                )
                if linear.bias is not None:
                    layer.bias = linear.bias
                model.set_submodule(name, layer)
        return attach_adapters(model, AdapterSettings(r=4, lora_alpha=8), seed=0).train()


def quant_state(out: int, inside: int) -> QuantState:
    """Of a double-quantised NF4 weight [out, inside], as bitsandbytes makes it."""
    cuda = partial(torch.empty, device="cuda")
    blocks = out * inside // 64
    second = QuantState(cuda(-(-blocks // 256)), code=cuda(256), blocksize=256, dtype=torch.float32)
    return QuantState(
        cuda(blocks, dtype=torch.uint8),
        shape=torch.Size((out, inside)),
        code=cuda(16),
        blocksize=64,
        quant_type="nf4",
        dtype=DTYPE,
        offset=cuda(()),
        state2=second,
    )


def fake_policy(architecture: str, backend: str, tied: bool) -> Policy:
    """Every parameter and buffer replaced by a fake CUDA tensor (weights that are tied stay so)."""
    with unset_fake_temporarily():
        model = without_weights(architecture, tied)
    replaced = {}
    for module in model.modules():
        for name, tensor in module._buffers.items():
            module._buffers[name] = torch.empty(tensor.shape, dtype=tensor.dtype, device="cuda")
        for name, tensor in module._parameters.items():
            if tensor is None:
                continue
            shape, dtype = tensor.shape, tensor.dtype
            if isinstance(tensor, bnb.nn.Params4bit):
                shape, dtype = (tensor.numel() // 2, 1), torch.uint8
            if id(tensor) not in replaced:
                replaced[id(tensor)] = torch.nn.Parameter(
                    torch.empty(shape, dtype=dtype, device="cuda"), tensor.requires_grad
                )
            module._parameters[name] = replaced[id(tensor)]
        if isinstance(module, bnb.nn.Linear4bit):
            module.weight.quant_state = quant_state(module.out_features, module.in_features)
    return Policy(model, None, attention=backend, tile_tokens=16, tile_vocab=50)


def roll_out(policy, values: Values) -> list[int]:
    """Two completions for each of two prompts; their lengths."""
    values.rows_per_problem = 2
    requests = [Request([5] * n, [np.full(6, 0.5)] * 2) for n in (7, 4)]
    how = Sampling(max_completion_length=6, min_completion_length=2, entropies=True)
    with policy.as_sampler():
        found = sample(policy, requests, how, end_ids=(0,), batch_size=4)
    return [len(c.ids) for completions in found for c in completions]


def step(policy, groups, whole=False, **how) -> dict:
    """Reference, update and optimizer step as the trainer does them; what is then on the device.
    `whole`: with the exact divergence, and surrogates of the tokens of most entropy alone.
    """
    weights = [0.1] * 5
    scoring = Scoring(temperature=0.9, end_ids=(0,))
    layout = {"max_tokens": 24, "min_completion_length": 2}
    trunk = score_reference(policy, pack(groups, weights, **layout), scoring, lambda tokens: None)
    parameters = policy.adapter_parameters()
    optimizer = build_optimizer(
        parameters.values(), optim="adamw_torch", learning_rate=1e-3, betas=(0.9, 0.99), eps=1e-8,
        weight_decay=0.01,
    )  # fmt: skip
    kind = {"kl_estimator": "exact", "entropy_coef": 0.1} if whole else {}
    batches = pack(groups, weights, **layout, entropy_threshold=0.5 if whole else None)
    objective = Objective(epsilon=0.2, epsilon_high=0.28, beta=0.04, **kind)
    stats = accumulate(policy, batches, scoring, objective, **how)
    places = {f"{p.grad.device.type} {p.grad.dtype}" for p in parameters.values()}
    apply_update(list(parameters.values()), optimizer, learning_rate=1e-3, max_grad_norm=1.0)
    moments = {
        f"{state.device.type} {state.dtype}"
        for parameter in parameters.values()
        for name, state in optimizer.state[parameter].items()
        if name != "step"
    }
    return {
        "batches": len(batches),
        "layers": sum(isinstance(m, LoraLinear4bit) for m in policy.model.modules()),
        "parameters": len(parameters),
        "gradients": sorted(places),
        "moments": sorted(moments),
        "scored": stats.tokens_scored,
        "trunk": [trunk, stats.tokens_trunk],
    }


def run(
    architecture: str,
    *,
    backend="torch_varlen",
    layout=None,
    mlp_tile=0,
    cache_bits=16,
    ends=False,
    whole=False,
    **how,
) -> dict:
    """Load (as far as there is something to load), rollout, reference, update, optimizer step."""
    activations.LEAST_BYTES = 1
    activations.PAGE_BYTES = 1000
    how = {"checkpointing": True, **how}
    groups = make_groups([(7, [5, 3, 1]), (4, [6, 6])], vocab=128)
    values = Values()
    with FakeTensorMode(), OneDevice(), values:
        policy = fake_policy(architecture, backend, tied=not ends)
        if ends:
            policy.embedding_to_host()
        values.number = 0.0  # the difference between packed and plain logits
        share_inputs(policy, architecture)
        check_forward(policy, architecture)
        values.number = 1.0
        policy.set_mlp_tile(mlp_tile)
        policy.cache_bits = cache_bits
        if ends:
            policy.round_head()
        if whole:
            policy.keep_reference()
            policy.sync_reference()
        drawn = roll_out(policy, values)
        if layout is not None:
            policy.layout = lambda groups: layout(tuple(groups), backend, policy.device)
        for rollout in (rollout for group in groups for rollout in group.rollouts):
            rollout.entropies = [1.0, *[0.0] * (len(rollout.completion_ids) - 1)]
        return {"drawn": drawn, **step(policy, groups, whole, **how)}


def score(architecture: str) -> dict:
    """A reward model's way to the card, two batches there, and its way back."""
    config = AutoConfig.for_model(architecture, **{**SHAPE, "num_labels": 1})
    model = classifier_without_weights(architecture, config, DTYPE)
    values = Values()
    values.number = 0.0  # the difference between rows together and alone
    with FakeTensorMode(), OneDevice(), values:
        fill(model, "cuda", DTYPE)
        for layer in model.modules():
            if isinstance(layer, bnb.nn.Linear4bit):
                layer.quant_state = layer.weight.quant_state  # as bitsandbytes leaves it
        loaded = [weakref.ref(tensor) for _, tensor in named_tensors(model)]
        classifier = Classifier(model, "cuda")
        classifier.check_rows(architecture)
        classifier.to_host()
        host = dict(named_tensors(model))
        with classifier.on_device():
            inside = {tensor.device.type for _, tensor in named_tensors(model)}
            found = [classifier.logits(rows) for rows in ([[5] * 9, [5] * 4], [[5] * 7])]
        back = dict(named_tensors(model))
    return {
        "left": sum(tensor() is not None for tensor in loaded),
        "inside": sorted(inside),
        "logits": [f"{x.device.type} {x.dtype} {list(x.shape)}" for x in found],
        "same": back.keys() == host.keys() and all(back[n] is host[n] for n in host),
        "outside": sorted({tensor.device.type for tensor in back.values()}),
    }


# What these tests are there to find: one tensor made without its device.


class IndexOnTheCpu(PackedLayout):
    @cached_property
    def key_index(self) -> torch.Tensor:
        return super().key_index.cpu()


class LengthsOnTheCpu(PackedLayout):
    @cached_property
    def ragged(self):
        cu_query, *rest = super().ragged
        return cu_query.cpu(), *rest


CASES = {
    **{name: partial(run, name) for name in ("llama", "qwen2", "qwen3")},
    "nothing recomputed": partial(run, "llama", checkpointing=False),
    "inputs on the host": partial(run, "llama", offloading=True),
    "inputs on the host, overlapping": partial(run, "llama", offloading=True, overlapping=True),
    "MLPs in tiles": partial(run, "llama", mlp_tile=5),
    "MLPs in tiles, nothing recomputed": partial(run, "llama", mlp_tile=5, checkpointing=False),
    "cache of 8 bits": partial(run, "llama", cache_bits=8),
    "both ends": partial(run, "llama", ends=True),
    **{
        f"{name}, everything": partial(
            run, name, offloading=True, overlapping=True, mlp_tile=5, cache_bits=8, ends=True
        )
        for name in ("llama", "qwen2", "qwen3")
    },
    "exact divergence": partial(run, "llama", whole=True, ends=True),
    "sdpa": partial(run, "llama", backend="sdpa"),
    "tiled": partial(run, "llama", backend="tiled"),
    **{f"reward model, {name}": partial(score, name) for name in ("llama", "qwen3", "bert")},
    "index on the CPU": partial(run, "llama", layout=IndexOnTheCpu),
    "lengths on the CPU": partial(run, "llama", layout=LengthsOnTheCpu),
}
