"""The phases of a step on tensors without values: load, rollout, reward, reference, update,
optimizer, and the evaluation during training.

Everything that runs is the product's own code (policy, cache, packing, scoring, objective,
optimizer step), except that

- the sampler's loop over tokens is restated: a completion of thousands of tokens is decoded at its
  first token, at those where the sizes of tensors change, and at its last ones. The cache is
  allocated whole at the first.
- an 8-bit optimizer is `rules.StandInAdam8bit`: the real one refuses such tensors.
- numbers that are read from the device are ones (`memory/unreal.py`).
- of many tiles of a norm or an MLP four are run (`policy/tiles.py`).
- of a model whose layers are alike a few are traced, for all of them (`memory/layers.py`).
- the second step is the first one's events once more, less what the first left behind.

There is a reward phase where a reward model scores (`memory/reward_phase.py`).

For a card the tensors are meta tensors: they are five times faster to trace than fake ones, need no
GPU, and the host's, which are real, are told from them. torch has no foreach kernels for them, so
the optimizer runs on fake tensors and its events are put in place. For a CPU, where the host is the
device, all are fake CPU tensors.
"""

from __future__ import annotations

import contextlib
from dataclasses import replace
from typing import NamedTuple

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from lowmem_grpo.config import Config
from lowmem_grpo.grpo.update import Scoring, accumulate, apply_update, score_reference
from lowmem_grpo.memory.allocator import Event
from lowmem_grpo.memory.decoding import decode
from lowmem_grpo.memory.joining import Part, again, layers_by_name, together, without_host
from lowmem_grpo.memory.layers import alike, base_id, deepened, shortened
from lowmem_grpo.memory.reward_phase import RewardPhase
from lowmem_grpo.memory.rules import CudaRules, StandInAdam8bit
from lowmem_grpo.memory.shapes import Batch, Shapes, Tiles, Wave, groups_of, packed, tiles_of
from lowmem_grpo.memory.simulate import add_up
from lowmem_grpo.memory.trace import Recorder
from lowmem_grpo.memory.unreal import (
    CountedBuffers,
    FewTiles,
    NoKernels,
    Values,
    counted_table,
)
from lowmem_grpo.policy.base import Policy
from lowmem_grpo.policy.check import check_forward, share_inputs, supported
from lowmem_grpo.policy.skeleton import skeleton_policy, without_weights
from lowmem_grpo.policy.tiles import few_tiles
from lowmem_grpo.setup import (
    adapter_settings,
    open_optimizer,
    rollout_role,
    sampling_of,
    update_settings,
)

__all__ = ["PHASES", "Alone", "Phases", "Traced"]

PHASES = ("load", "rollout", "reward", "reference", "update", "optimizer", "evaluation")

DECODED = 4  # tokens on the way, where a few are enough
SMALLEST = (((2, (2,)),),)  # micro-batches: a prompt and a completion of two tokens
COUNTER = 4  # bytes of the number in which AdamW counts the steps of a parameter


class Traced(NamedTuple):
    """The events of loading and two steps. `adapter_bytes` and `optimizer_bytes`: what a checkpoint
    copies to the host; `host_bytes`: the most that lies there otherwise, during an update.
    """

    events: list[Event]
    adapter_bytes: int
    optimizer_bytes: int
    host_bytes: int


class Alone(NamedTuple):
    """The events of one phase, and the bytes that are alive all the while: weights and moments.
    `host_bytes`: see `Traced`.
    """

    events: list[Event]
    around_bytes: int
    host_bytes: int


class _UnlikeError(Exception):
    """The layers do not agree: every one of them has to be traced."""


class Phases:
    """The phases of one model with its adapters and optimizer on one card, each shape traced once.

    `card`: see `rules.Card`; without a compute capability it is a CPU. What may differ between the
    traces are shapes and memory settings. Raises ModelError for an architecture that the packed
    forward pass does not take.
    """

    def __init__(self, config: Config, model_config, card, *, dtype: torch.dtype, attention: str):
        self._config, self._model_config = config, model_config
        self._dtype, self._attention = dtype, attention
        self._cuda = card.compute_capability is not None
        self._device = "meta" if self._cuda else "cpu"
        rules = CudaRules(card) if self._cuda else None
        self._recorded = {"device_type": self._device, "rules": rules}
        self._values = Values(rules)
        self._fake = contextlib.nullcontext() if self._cuda else FakeTensorMode()
        self._short = alike(model_config)
        self._rewards = RewardPhase(self._unnamed, self._values, self._device, dtype)
        self._policy = None
        self._ends: tuple[bool, int] | None = None  # see `_ready`
        self._policies: dict[tuple[bool, int], Policy] = {}
        self._shapes: list[torch.Size] = []  # of the adapters' parameters
        self._parts: dict[tuple, Part] = {}

    def trace(self, config: Config, shapes: Shapes, steps: int = 2) -> Traced:
        """Loading and one or two steps of these shapes, under the memory settings of `config`."""
        load, models = self._ready(config), self._rewards.loads(config)
        parts = [*models, load]
        if config.rollout.pool is None:
            parts.append(self._rolled(config, "rollout", shapes.rollout))
        parts += self._rewards.scores(config, shapes.scored)
        score = self._scored(config, shapes.batches)
        optimizer = self._part(self._step)
        parts += [score, optimizer]
        if shapes.evaluation is not None:
            parts.append(self._rolled(config, "evaluation", shapes.evaluation))
        events = together(parts, score, optimizer)
        step = [event for event in events if event.phase != "load"]
        repeated = again(step) if steps > 1 else []
        copied = score.kept
        if config.keeps_reference:  # which a checkpoint copies, too
            copied += score.kept * self._dtype.itemsize // torch.float32.itemsize
        host = load.host + score.host + sum(model.host for model in models)
        return Traced(events + repeated, copied, optimizer.kept, host)

    def alone(self, config: Config, shapes: Wave | tuple[Batch, ...]) -> Alone:
        """One phase by itself: a wave of the sampler, or reference and update of micro-batches.

        Faster than `trace`, and nearly as exact: a wave is decoded at fewer places, a few tiles of
        the head stand for all, and the reference, which takes less than the update, is left out.
        """
        self._ready(config)
        if isinstance(shapes, Wave):
            part = self._rolled(config, "rollout", shapes, DECODED)
        else:
            part = self._scored(config, shapes, few=True)
        around, host = self._around(config)
        return Alone(part.events, around + self._optimizer(config).kept, host + part.host)

    def reward_alone(self, config: Config) -> list[Alone]:
        """The largest batches of each reward model."""
        around, host = self._around(config)
        around += self._optimizer(config).kept
        return [Alone(part.events, around, host) for part in self._rewards.scores(config, None)]

    def optimizer_alone(self, config: Config) -> Alone:
        """The optimizer's step, with all gradients alive around it."""
        (around, host), step = self._around(config), self._optimizer(config)
        gradients = sum(4 * shape.numel() for shape in self._shapes)
        known = set(step.gradients)
        events = [event for event in step.events if event.id not in known]
        return Alone(events, around + gradients, host)

    def _around(self, config: Config) -> tuple[int, int]:
        """Bytes of the weights on the device, and of what is in host memory, after loading."""
        loads = [self._ready(config), *self._rewards.loads(config)]
        return sum(load.kept for load in loads), sum(load.host for load in loads)

    def _optimizer(self, config: Config) -> Part:
        if not self._shapes:  # of the gradients, from which the optimizer's state follows
            self._scored(config, SMALLEST, few=True)
        return self._part(self._step)

    def forget(self) -> None:
        """Let go of all parts but loading and the optimizer's, which every step has."""
        self._rewards.forget()
        kept = self._load.__name__, self._step.__name__
        self._parts = {key: part for key, part in self._parts.items() if key[0] in kept}

    def _ready(self, config: Config) -> Part:
        """Loading; the policy with its ends as configured is there for the other phases."""
        self._ends = config.memory.embedding_on_host, config.model.lm_head_bits
        load = self._part(self._load)
        self._policy = self._policies[self._ends]
        return load

    def _rolled(self, config: Config, name: str, wave: Wave, places: int | None = None) -> Part:
        bits = config.memory.kv_cache_bits
        return self._part(self._roll_out, name, wave, tiles_of(config), bits, places)

    def _scored(self, config: Config, batches: tuple[Batch, ...], few: bool = False) -> Part:
        m = config.memory
        how = m.gradient_checkpointing, m.activation_offloading, m.offload_overlap
        return self._part(self._score, batches, how, tiles_of(config), few)

    def _part(self, run, *shape) -> Part:
        key = run.__name__, self._ends, *shape
        if key not in self._parts:
            try:
                self._parts[key] = run(*shape)
            except _UnlikeError:
                self._short = False
                self._policies.clear()
                self._load()
                self._parts[key] = run(*shape)
        return self._parts[key]

    @contextlib.contextmanager
    def _unnamed(self):
        """Records what runs within, without values."""
        with few_tiles(), self._fake, self._values, Recorder(**self._recorded) as recorder:
            yield recorder

    @contextlib.contextmanager
    def _recorder(self):
        """The same of the policy, once there is one."""
        with self._unnamed() as recorder:
            if self._policy is not None:
                recorder.name(self._policy.model)
            yield recorder

    def _deep(self, recorder: Recorder, layers: list[int] | None = None) -> list[Event]:
        """The recorded events, in a model of the whole depth."""
        if not self._short:
            return recorder.events
        depth = self._model_config.num_hidden_layers
        events = deepened(recorder.events, layers or recorder.layers, depth)
        if events is None:
            raise _UnlikeError
        return events

    def _load(self) -> Part:
        model_config = shortened(self._model_config) if self._short else self._model_config
        model = without_weights(model_config, self._dtype, adapter_settings(self._config))
        on_host, bits = self._ends
        self._policy = None
        with self._recorder() as recorder, recorder.phase("load"):
            self._policy = skeleton_policy(
                model,
                device=self._device,
                dtype=self._dtype,
                attention=self._attention,
                tile_tokens=1,
                tile_vocab=1,
            )
            recorder.name(self._policy.model)
            if on_host:
                self._policy.embedding_to_host(counted_table(recorder))
            weights = len(recorder.events)
            self._values.number = 0.0  # the difference between packed and plain logits
            share_inputs(self._policy, self._config.model.name)
            recorder.name(self._policy.model)  # with what sampling adds to it
            check_forward(self._policy, self._config.model.name)
            self._values.number = 1.0
            if self._config.model.lm_head_kernels == "triton":
                self._policy.head_kernels = NoKernels
            if bits == 8:
                self._policy.round_head()
            loaded = len(recorder.events)
            if self._config.keeps_reference:
                self._policy.keep_reference()
        self._policies[self._ends] = self._policy
        layers = layers_by_name(recorder.events[:weights]) + recorder.layers[weights:loaded]
        layers += layers_by_name(recorder.events[loaded:])
        events, host = without_host(self._deep(recorder, layers))
        return Part(events, recorder.workspaces, kept=add_up(events).final_allocated, host=host)

    def _set_tiles(self, tiles: Tiles) -> None:
        self._policy.set_mlp_tile(tiles.mlp)
        self._policy.tiles = {"tile_tokens": tiles.tokens, "tile_vocab": tiles.vocab}

    def _roll_out(
        self, name: str, wave: Wave, tiles: Tiles, cache_bits: int, places: int | None
    ) -> Part:
        self._values.rows_per_problem = wave.rows
        self._set_tiles(tiles)
        self._policy.cache_bits = cache_bits
        with (
            supported(self._policy, self._config.model.name),
            self._recorder() as recorder,
            recorder.phase(name),
        ):
            sampling = sampling_of(self._config, name)
            evaluated = name == "evaluation"
            role = (
                self._policy.as_sampler() if evaluated else rollout_role(self._policy, self._config)
            )
            decode(self._policy, role, wave, sampling, recorder, places)
        return Part(self._deep(recorder), recorder.workspaces)

    def _score(
        self, batches: tuple[Batch, ...], how: tuple[bool, bool, bool], tiles: Tiles, few: bool
    ) -> Part:
        """Reference and update. `how`: checkpointing, offloading, overlapping; `few`: without a
        reference before the update.
        """
        how = dict(zip(("checkpointing", "offloading", "overlapping"), how, strict=True))
        policy, config = self._policy, self._config
        settings = update_settings(config) | how
        referred = config.asks_reference and not few
        if few and not settings["objective"].exact:
            settings["objective"] = replace(settings["objective"], beta=0.0)
        self._set_tiles(tiles)
        groups = [groups_of(batch) for batch in batches]
        scoring = (FewTiles if few else Scoring)(config.rollout.temperature, (0,))
        scaler = torch.amp.GradScaler("cpu") if self._dtype == torch.float16 else None
        parameters = list(policy.adapter_parameters().values())
        with supported(policy, config.model.name), self._recorder() as recorder:
            if self._cuda:  # on a CPU the host's copies are the device's as well
                policy.buffers = CountedBuffers(recorder)
            if referred:
                with recorder.phase("reference"):
                    score_reference(policy, packed(groups, config), scoring)
            with recorder.phase("update"):
                accumulate(
                    policy,
                    packed(groups, config),
                    scoring,
                    **settings,
                    loss_scale=scaler.scale if scaler is not None else None,
                )
            done = len(recorder.events)
            for parameter in parameters:
                parameter.grad = None
        shapes = {
            event.id: parameter.shape
            for event, parameter in zip(recorder.events[done:], parameters, strict=True)
        }
        events, host = without_host(self._deep(recorder))
        ends = [e for e in events if e.action == "free" and base_id(e.id) in shapes]
        self._shapes = [shapes[base_id(event.id)] for event in ends]
        return Part(
            events[: len(events) - len(ends)],
            recorder.workspaces,
            tuple(event.id for event in ends),
            sum(event.size for event in ends),  # a gradient is as long as its parameter
            host,
        )

    def _step(self) -> Part:
        """The optimizer's first step. On fake tensors: torch has no foreach kernels for meta ones.
        Needs the shapes that scoring has found.
        """
        o = self._config.optimizer
        mode = FakeTensorMode() if self._cuda else self._fake
        how = {**self._recorded, "device_type": "cpu"}
        with mode, self._values, Recorder(**how) as recorder:
            parameters = [torch.nn.Parameter(torch.empty(shape)) for shape in self._shapes]
            for parameter in parameters:
                parameter.grad = torch.empty_like(parameter)
            known = [event.id for event in recorder.events]
            optimizer = _optimizer(parameters, self._config)
            with recorder.phase("optimizer"):
                apply_update(
                    parameters,
                    optimizer,
                    learning_rate=o.learning_rate,
                    max_grad_norm=o.max_grad_norm,
                    scaler=torch.amp.GradScaler("cpu") if self._dtype == torch.float16 else None,
                )
            state = [
                value.numel() * value.element_size()
                for parameter in parameters
                for value in optimizer.state[parameter].values()
                if isinstance(value, torch.Tensor)
            ]
            made = [event for event in recorder.events if event.phase == "optimizer"]
        if self._cuda:
            # AdamW counts its steps in a number for each parameter, which stays on the host.
            counters = {e.id for e in made if e.size == COUNTER} - {
                e.id for e in made if e.action == "free"
            }
            made = [event for event in made if event.id not in counters]
        gradients = tuple(known[len(parameters) :])
        return Part(made, recorder.workspaces, gradients, sum(state))


def _optimizer(parameters, config: Config):
    o = config.optimizer
    if o.optim != "adamw_torch":
        paged = o.optim == "paged_adamw_8bit"
        return StandInAdam8bit(parameters, paged=paged, lr=o.learning_rate)
    return open_optimizer(config, parameters)
