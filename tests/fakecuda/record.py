"""Two steps of a tiny policy, recorded as the planner records them, on tensors of three kinds.

- "cuda": fake CUDA tensors; the program must have installed the guard before torch was loaded.
- "cpu": fake CPU tensors. The host's are fake meta tensors, so that they are told from the card's.
- "meta": meta tensors, as the planner has them. The host's are real. torch has no foreach kernels
  for them, so of the optimizer only its last act, clearing the gradients, is done.
"""

import contextlib
import gc
from typing import NamedTuple

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from transformers import AutoConfig

from lowmem_grpo.grpo.objective import Objective
from lowmem_grpo.grpo.optimizer import build_optimizer
from lowmem_grpo.grpo.packing import pack
from lowmem_grpo.grpo.update import Scoring, accumulate, apply_update, score_reference
from lowmem_grpo.memory.allocator import Event
from lowmem_grpo.memory.rules import CudaRules
from lowmem_grpo.memory.trace import Recorder
from lowmem_grpo.policy.base import AdapterSettings
from lowmem_grpo.policy.skeleton import skeleton_policy, without_weights
from tests.grpo.rollouts import make_groups
from tests.tiny import SHAPE

__all__ = ["record_steps"]

HOST = {"cuda": "cpu", "cpu": "meta", "meta": "cpu"}
# Two micro-batches; completions of one token have no token in the trunk.
GROUPS = [(7, [5, 3, 1, 6]), (4, [6, 6, 2, 9])]


class Card(NamedTuple):
    """What the rules ask of a card: an RTX 4090."""

    compute_capability: tuple[int, int] = (8, 9)
    multiprocessors: int = 128


class Values(TorchFunctionMode):
    """Answers for values that are not there (ones), and moves to a host that cannot take them.

    `of_the_host`: ids of the events of tensors that code puts on "cpu" by name, for the host, where
    "cpu" is the card as well: AdamW's counts of steps.
    """

    def __init__(self, host: str):
        super().__init__()
        self.host, self.watch, self.of_the_host = host, None, set()

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is torch.Tensor.item:
            return 1.0
        if function is torch.Tensor.tolist:
            return [1.0] * args[0].numel()  # of vectors only
        if function is torch.Tensor.cpu:
            return torch.empty(args[0].shape, dtype=args[0].dtype, device=self.host)
        if function is torch.tensor and kwargs.get("device") == "cpu":
            before = len(self.watch.events)
            made = function(*args, **kwargs)
            self.of_the_host.update(event.id for event in self.watch.events[before:])
            return made
        return function(*args, **kwargs)


def record_steps(architecture: str, device: str, *, checkpointing: bool) -> list[Event]:
    """The events on the card ("cuda", "cpu" or "meta") of loading and of two steps."""
    config = AutoConfig.for_model(architecture, **SHAPE)
    model = without_weights(config, torch.bfloat16, AdapterSettings(r=4, lora_alpha=8))
    groups = make_groups(GROUPS, vocab=128)
    gc.collect()
    with contextlib.ExitStack() as stack:
        if device != "meta":
            # The model comes in real meta tensors, each of which is replaced.
            stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        if device == "cpu":
            stack.enter_context(torch.device("meta"))
        values = stack.enter_context(Values(HOST[device]))
        watch = stack.enter_context(Recorder(device_type=device, rules=CudaRules(Card())))
        values.watch = watch
        with watch.phase("load"):
            policy = skeleton_policy(
                model, device=device, dtype=torch.bfloat16, attention="torch_varlen",
                tile_tokens=16, tile_vocab=50,
            )  # fmt: skip
            watch.name(policy.model)
        optimizer = build_optimizer(
            policy.adapter_parameters().values(), optim="adamw_torch", learning_rate=1e-3,
            betas=(0.9, 0.99), eps=1e-8, weight_decay=0.01,
        )  # fmt: skip
        for _ in range(2):
            _step(policy, groups, optimizer, watch, checkpointing=checkpointing)
    return [event for event in watch.events if event.id not in values.of_the_host]


def _step(policy, groups, optimizer, watch: Recorder, *, checkpointing: bool) -> None:
    weights = [0.1] * sum(len(group.rollouts) for group in groups)
    scoring = Scoring(temperature=0.9, end_ids=(0,))
    layout = {"max_tokens": 24, "min_completion_length": 2}
    with watch.phase("reference"):
        score_reference(policy, pack(groups, weights, **layout), scoring)
    with watch.phase("update"):
        accumulate(
            policy, pack(groups, weights, **layout), scoring,
            Objective(epsilon=0.2, epsilon_high=0.28, beta=0.04), checkpointing=checkpointing,
        )  # fmt: skip
    parameters = list(policy.adapter_parameters().values())
    with watch.phase("optimizer"):
        if policy.device.type == "meta":
            optimizer.zero_grad()
        else:
            apply_update(parameters, optimizer, learning_rate=1e-3, max_grad_norm=1.0)
