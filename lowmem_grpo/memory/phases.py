"""The phases of a step at their largest, on tensors without values: load, rollout, reference,
update, optimizer.

Everything that runs is the product's own code (policy, cache, packing, scoring, objective,
optimizer step), except that

- the sampler's loop over tokens is restated: a completion of thousands of tokens is decoded at its
  first token, at some in between and at its last ones. The cache is allocated whole at the first.
- an 8-bit optimizer is `rules.StandInAdam8bit`: the real one refuses such tensors.
- numbers that are read from the device (norms, losses, token ids) are ones.
- the second step is the first one's events once more, less what the first left behind.

Tensors of the card are meta tensors: they are five times faster to trace than fake ones, need no
GPU, and the host's, which are real, are told from them. torch has no foreach kernels for them, so
the optimizer runs on fake tensors and its events are put in place.

Two micro-batches are run, since which one is heavier depends on the model: one with the *longest*
completions, and one with the *most* that fill it, whose attention keeps a copy of the prompt's keys
and values for each.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
)
from torch.overrides import TorchFunctionMode

from lowmem_grpo.config import Config
from lowmem_grpo.errors import ModelError
from lowmem_grpo.grpo.objective import rollout_weights
from lowmem_grpo.grpo.packing import PackedBatch, pack
from lowmem_grpo.grpo.update import Scoring, accumulate, apply_update, score_reference
from lowmem_grpo.memory.allocator import Event
from lowmem_grpo.memory.rules import CudaRules, StandInAdam8bit
from lowmem_grpo.memory.trace import Recorder
from lowmem_grpo.policy.skeleton import skeleton_policy, without_weights
from lowmem_grpo.rollout.cache import Prefill, WaveCache
from lowmem_grpo.rollout.sampling import Sampling, choose
from lowmem_grpo.rollout.types import Group, Rollout
from lowmem_grpo.setup import adapter_settings, open_optimizer
from lowmem_grpo.tasks.base import Problem

__all__ = ["Traced", "fullest", "trace_phases", "wave"]

DEVICE = "meta"  # tensors with shapes only; the host's are real, and not counted
DECODED = 4  # tokens of the longest completion that are decoded


@dataclass(frozen=True)
class Traced:
    """The events of loading and two steps. `batches`: trunk tokens and completions of each
    micro-batch; `adapter_bytes` and `optimizer_bytes`: what a checkpoint copies to the host.
    """

    events: list[Event]
    batches: list[tuple[int, int]]
    adapter_bytes: int
    optimizer_bytes: int


class _Reads(TorchFunctionMode):
    """Answers for values that fake tensors do not have: ones, and the wave's rows a problem."""

    def __init__(self, rules: CudaRules, rows_per_problem: int = 0):
        super().__init__()
        self.rules, self.rows_per_problem = rules, rows_per_problem

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is torch.Tensor.backward:
            return self._backward(function, args, kwargs)
        if function is torch.Tensor.item:
            return 1.0
        if function is torch.Tensor.tolist:
            return [1.0] * args[0].numel()  # of vectors only
        if function is torch.Tensor.cpu:
            return torch.zeros(args[0].shape, dtype=args[0].dtype)
        if function is torch.bincount:  # of problems: its length would depend on values
            return torch.empty(kwargs["minlength"], dtype=torch.int64, device=args[0].device)
        if function is torch.Tensor.repeat_interleave and isinstance(args[1], torch.Tensor):
            return args[0].new_empty(args[0].numel() * self.rows_per_problem)
        if function is torch.Tensor.__int__:
            return self.rows_per_problem
        return function(*args, **kwargs)

    def _backward(self, function, args, kwargs):
        """Modes are off while they are asked, and so for all of backward, which under checkpointing
        computes the layers again: the outermost module puts them on, as they were in forward.
        """
        running: list[contextlib.ExitStack] = []

        def before(module, args) -> None:
            running.append(contextlib.ExitStack())
            if len(running) == 1:
                running[0].enter_context(self)
                running[0].enter_context(self.rules.replacements())

        def after(module, args, output) -> None:
            running.pop().close()

        with contextlib.ExitStack() as hooks:
            hooks.callback(register_module_forward_pre_hook(before).remove)
            hooks.callback(register_module_forward_hook(after, always_call=True).remove)
            return function(*args, **kwargs)


class _Scaler(torch.amp.GradScaler):
    """Takes every step: whether gradients overflowed is a value, too."""

    def step(self, optimizer, *args, **kwargs):
        return optimizer.step(*args, **kwargs)


def wave(config: Config) -> tuple[int, int]:
    """Problems, and rows of each, in the largest wave of the sampler."""
    r, most = config.rollout, config.memory.rollout_batch_size
    if r.num_generations >= most:
        return 1, most
    return min(r.problems_per_step, most // r.num_generations), r.num_generations


def fullest(config: Config) -> list[list[tuple[int, list[int]]]]:
    """The shapes of a full micro-batch, ((prompt tokens, completion lengths), ...) each: with the
    longest completions, and with the most.
    """
    r, budget = config.rollout, config.memory.micro_batch_tokens
    prompt, longest = r.max_prompt_length, r.max_completion_length - 1  # in trunk tokens
    shapes, room = [[]], budget
    for _ in range(r.problems_per_step):
        if room <= prompt and shapes[0]:
            break
        room -= prompt
        lengths = []
        for _ in range(r.num_generations):
            # A completion that fits nowhere is a micro-batch of its own, whatever its length.
            take = longest if not (lengths or shapes[0]) else min(longest, room)
            if take <= 0 and lengths:
                break
            lengths.append(max(take, 0) + 1)
            room -= max(take, 0)
        shapes[0].append((prompt, lengths))
    groups = min(r.problems_per_step, budget // (prompt + r.num_generations))
    if groups:
        rows = groups * r.num_generations
        take = min(longest, (budget - groups * prompt) // rows)
        most = [(prompt, [take + 1] * r.num_generations)] * groups
        if most != shapes[0]:
            shapes.append(most)
    return shapes


def trace_phases(config: Config, model_config, card, *, dtype: torch.dtype, attention: str):
    """Run loading and two steps without values as on `card` (see `rules.Card`) -> Traced.

    Raises ModelError for an architecture that the packed forward pass does not take.
    """
    rules = CudaRules(card)
    problems, rows = wave(config)
    shapes = fullest(config)
    if len(shapes) == 1:  # a second one meets the gradients that the first left
        shapes *= 2
    groups = [_groups(shape) for shape in shapes]
    model = without_weights(model_config, dtype, adapter_settings(config))
    with _Reads(rules, rows), Recorder(device_type=DEVICE, rules=rules) as recorder:
        with recorder.phase("load"):
            policy = skeleton_policy(
                model,
                device=DEVICE,
                dtype=dtype,
                attention=attention,
                tile_tokens=config.memory.logits_tile_tokens,
                tile_vocab=config.memory.logits_tile_vocab,
            )
            recorder.name(policy.model)
        parameters = list(policy.adapter_parameters().values())
        loaded = len(recorder.events)
        try:
            with recorder.phase("rollout"):
                _roll_out(policy, config, problems, rows)
            batches = _score_and_accumulate(policy, config, groups, recorder)
        except (NotImplementedError, AttributeError, TypeError) as error:
            # What is passed to the attention, or asked of it, is this architecture's own affair.
            kind, reason = type(policy.causal_lm).__name__, str(error).strip().splitlines()[0]
            raise ModelError(f"{kind} is not supported: {reason}") from error
        before = len(recorder.events)
        for parameter in parameters:
            parameter.grad = None
    events, freed = recorder.events[:before], recorder.events[before:]
    shapes_of = [parameter.shape for parameter in parameters]
    optimizer, moments = _trace_optimizer(shapes_of, config, rules, half=dtype == torch.float16)
    step = events[loaded:] + _spliced(optimizer, [event.id for event in freed])
    return Traced(
        events[:loaded] + step + _again(step),
        [(batch.tokens, len(batch.members)) for batch in batches],
        sum(event.size for event in freed),  # a gradient is as long as its parameter
        moments,
    )


def _score_and_accumulate(policy, config: Config, groups, recorder) -> list[PackedBatch]:
    """Reference and update with full micro-batches."""
    scoring = Scoring(config.rollout.temperature, (0,))
    scaler = torch.amp.GradScaler("cpu") if policy.dtype == torch.float16 else None
    if config.grpo.beta:
        with recorder.phase("reference"):
            score_reference(policy, _pack(groups, config), scoring)
    with recorder.phase("update"):
        batches = _pack(groups, config)
        accumulate(
            policy,
            batches,
            scoring,
            epsilon=config.grpo.epsilon,
            epsilon_high=config.grpo.epsilon_high or config.grpo.epsilon,
            beta=config.grpo.beta,
            checkpointing=config.memory.gradient_checkpointing,
            loss_scale=scaler.scale if scaler is not None else None,
        )
    return batches


def _trace_optimizer(
    shapes, config: Config, rules, *, half: bool
) -> tuple[tuple[list[Event], list[int]], int]:
    """The optimizer's first step over parameters of these shapes: ((events, ids of the gradients),
    bytes of its state). On fake tensors: torch has no foreach kernels for meta ones.
    """
    with (
        FakeTensorMode(),
        _Reads(rules),
        Recorder(device_type="cpu", rules=rules) as recorder,
    ):
        parameters = [torch.nn.Parameter(torch.empty(shape)) for shape in shapes]
        for parameter in parameters:
            parameter.grad = torch.empty_like(parameter)
        known = [event.id for event in recorder.events]
        optimizer = _optimizer(parameters, config)
        with recorder.phase("optimizer"):
            apply_update(
                parameters,
                optimizer,
                learning_rate=config.optimizer.learning_rate,
                max_grad_norm=config.optimizer.max_grad_norm,
                scaler=_Scaler("cpu") if half else None,
            )
        state = [
            value.numel() * value.element_size()
            for parameter in parameters
            for value in optimizer.state[parameter].values()
            if isinstance(value, torch.Tensor)
        ]
        # AdamW counts its steps in a number for each parameter, which on CUDA stays on the host.
        events = [event for event in recorder.events if event.id not in known[: len(shapes)]]
    gradients = known[len(shapes) :]
    made = [event for event in events if event.phase == "optimizer"]
    return (made, gradients), sum(state)


def _spliced(optimizer: tuple[list[Event], list[int]], gradients: list[int]) -> list[Event]:
    """The optimizer's events in a trace in which the gradients have other ids."""
    events, own = optimizer
    names = dict(zip(own, gradients, strict=True))
    # Ids of the two recorders count from 1; negative ones are free.
    return [event._replace(id=names.get(event.id, -event.id)) for event in events]


def _again(step: list[Event]) -> list[Event]:
    """The step once more. What it left alive (moments, workspaces) is found, not made again."""
    ended = {event.id for event in step if event.action == "free"}
    made = {event.id for event in step if event.action == "alloc"} & ended
    number = 1 << 40
    return [event._replace(id=event.id + number) for event in step if event.id in made]


def _roll_out(policy, config: Config, problems: int, rows: int) -> None:
    """The sampler's loop for the largest wave, with some of its tokens; see rollout/sampler.py."""
    r, device = config.rollout, policy.device
    sampling = Sampling(
        temperature=r.temperature,
        min_completion_length=r.min_completion_length,
        max_completion_length=r.max_completion_length,
    )
    lengths = [r.max_prompt_length] * problems
    last = max(r.max_completion_length - 1, 1)
    with policy.as_sampler():
        cache = WaveCache(lengths, [rows] * problems, last, device)
        uniforms_RC = torch.empty(
            problems * rows, r.max_completion_length, dtype=torch.float64, device=device
        )
        layout = Prefill(cache, policy.layout([(length, ()) for length in lengths]))
        ids_T = torch.empty(sum(lengths), dtype=torch.int64, device=device)
        positions_T = torch.cat([torch.arange(length) for length in lengths]).to(device)
        last_B = torch.tensor(lengths, device=device).cumsum(0) - 1
        hidden_RD = policy.hidden(ids_T, positions_T, layout)[last_B][cache.problem_R]
        for t in _tokens(last):
            logits_RV = policy.logits(hidden_RD)
            if t < sampling.min_completion_length:
                logits_RV[:, [0]] = -torch.inf
            tokens_R, _ = choose(logits_RV, uniforms_RC[:, t], sampling)
            if t == r.max_completion_length - 1:
                break
            cache.tokens = t
            hidden_RD = policy.hidden(tokens_R, cache.positions(), cache)
            cache.advance()


def _tokens(last: int) -> list[int]:
    """Tokens to decode at: the first, some on the way (what is kept of them by the allocator
    counts), and the last ones.
    """
    between = [round(last * i / DECODED) for i in range(1, DECODED)]
    return sorted({0, *between, last - 1, last})


def _groups(shape) -> list[Group]:
    problem = Problem("plan", ({"role": "user", "content": ""},), "")
    groups = []
    for prompt, lengths in shape:
        rollouts = [Rollout([0] * n, [0.0] * n, "length", "") for n in lengths]
        groups.append(Group(problem, [0] * prompt, rollouts, advantages=[1.0] * len(lengths)))
    return groups


def _pack(shapes: list[list[Group]], config: Config) -> list[PackedBatch]:
    batches = []
    for groups in shapes:
        lengths = [len(rollout.completion_ids) for group in groups for rollout in group.rollouts]
        longest = config.rollout.max_completion_length
        batches += pack(
            groups,
            rollout_weights(lengths, config.grpo.loss_type, longest),
            max_tokens=config.memory.micro_batch_tokens,
            min_completion_length=config.rollout.min_completion_length,
        )
    return batches


def _optimizer(parameters, config: Config):
    o = config.optimizer
    if o.optim != "adamw_torch":
        paged = o.optim == "paged_adamw_8bit"
        return StandInAdam8bit(parameters, paged=paged, lr=o.learning_rate)
    return open_optimizer(config, parameters)
