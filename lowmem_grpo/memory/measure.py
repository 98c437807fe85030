"""The phases of a step for real, on the device in use, in the shapes of a plan.

The rollout decodes every token of the longest completions, on random prompts; micro-batches are
full; with an optimizer, its step is taken too. On CUDA the numbers are the allocator's own peaks,
and its history may be kept as a snapshot; on a CPU the tensors are traced as a plan's are.

Nothing of it is a training run: the gradients are thrown away, and where an optimizer is given, so
are the adapters, by whoever gave it.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lowmem_grpo.config import Config
from lowmem_grpo.grpo.update import Scoring, accumulate, apply_update, score_reference
from lowmem_grpo.memory.components import REWARD_MODEL
from lowmem_grpo.memory.phases import PHASES
from lowmem_grpo.memory.reward_phase import longest_batches, rows_of
from lowmem_grpo.memory.shapes import Batch, Shapes, Wave, groups_of, packed
from lowmem_grpo.memory.simulate import add_up
from lowmem_grpo.memory.timeline import timeline
from lowmem_grpo.memory.trace import Recorder
from lowmem_grpo.policy.integrity import named_tensors
from lowmem_grpo.rollout.groups import end_token_ids
from lowmem_grpo.rollout.sampler import Request, sample
from lowmem_grpo.rollout.sampling import Sampling
from lowmem_grpo.setup import rollout_role, sampling_of, update_settings

__all__ = ["Gauge", "Measured", "alive", "measure"]

HISTORY = 1_000_000  # allocations and frees that CUDA's recorder keeps


@dataclasses.dataclass(frozen=True)
class Measured:
    """Peaks in bytes by phase ({"allocated": ..., "reserved": ... on CUDA only}), and how they were
    taken. `components` are those at a phase's peak, where they are known.
    """

    device: str
    how: str
    peaks: dict[str, dict[str, int]]
    timeline: dict[str, Any] | None = None
    snapshot: str | None = None

    def to_json(self) -> dict[str, Any]:
        phases = [
            {
                "name": name,
                "peak_allocated_bytes": peak["allocated"],
                "peak_reserved_bytes": peak.get("reserved"),
            }
            for name, peak in self.peaks.items()
        ]
        rest = {"timeline": self.timeline, "snapshot": self.snapshot}
        return {"device": self.device, "how": self.how, "phases": phases, **rest}


class Gauge:
    """Takes the peaks of phases on one device. A context manager; `phase` may be entered again.

    `snapshot`: a file for CUDA's history of allocations. On a CPU what is alive when it begins has
    to be told with `adopt`.
    """

    def __init__(self, device: torch.device, snapshot: Path | None = None):
        self.device, self.snapshot = device, snapshot
        self.peaks: dict[str, dict[str, int]] = {}
        self.running = ""
        self._cuda = device.type == "cuda"
        self._recorder = None if self._cuda else Recorder()

    def __enter__(self) -> Gauge:
        self._stack = contextlib.ExitStack()
        if self._recorder is not None:
            self._stack.enter_context(self._recorder)
        elif self.snapshot is not None:
            torch.cuda.memory._record_memory_history(stacks="python", max_entries=HISTORY)
            self._stack.callback(torch.cuda.memory._record_memory_history, None)
        return self

    def __exit__(self, *error) -> None:
        if self._cuda and self.snapshot is not None:
            torch.cuda.memory._dump_snapshot(str(self.snapshot))
        self._stack.close()

    @contextlib.contextmanager
    def phase(self, name: str):
        """Measure what runs within. `running` is its name."""
        self.running = name
        if self._recorder is not None:
            with self._recorder.phase(name):
                yield
            return
        torch.cuda.reset_peak_memory_stats(self.device)
        yield
        torch.cuda.synchronize(self.device)
        now = {
            "allocated": torch.cuda.max_memory_allocated(self.device),
            "reserved": torch.cuda.max_memory_reserved(self.device),
        }
        before = self.peaks.get(name, {})
        self.peaks[name] = {key: max(value, before.get(key, 0)) for key, value in now.items()}

    def adopt(self, tensors: Iterable[tuple[str, torch.Tensor]], model=None) -> None:
        """Tensors by name that exist already, and the model whose modules are to be named."""
        if self._recorder is not None:
            if model is not None:
                self._recorder.name(model)
            self._recorder.adopt(tensors)

    def measured(self) -> Measured:
        """What was measured; to be asked after the block."""
        if self._recorder is None:
            name = torch.cuda.get_device_name(self.device)
            kept = str(self.snapshot) if self.snapshot is not None else None
            how = "the allocator's peaks of each phase (torch.cuda.max_memory_allocated, _reserved)"
            return Measured(name, how, self.peaks, None, kept)
        events = self._recorder.events
        sums = add_up(events).timeline.allocated
        peaks: dict[str, dict[str, int]] = {}
        for event, bytes_ in zip(events, sums, strict=True):
            peak = peaks.setdefault(event.phase, {"allocated": 0})
            peak["allocated"] = max(peak["allocated"], bytes_)
        peaks = {name: peaks[name] for name in PHASES if name in peaks}
        how = "allocations and frees of real tensors, traced"
        return Measured("cpu", how, peaks, timeline(events, sums))


def alive(policy, optimizer=None, models=()) -> list[tuple[str, torch.Tensor]]:
    """The tensors by name that live through all phases: weights, adapters, gradients, moments, and
    on a CPU the weights of reward `models`.
    """
    found = [*named_tensors(policy.model), *policy.tensors_beside()]
    for model in models if policy.device.type == "cpu" else ():
        named = named_tensors(model.classifier.model)
        found += [(f"{REWARD_MODEL}.{name}", tensor) for name, tensor in named]
    parameters = policy.adapter_parameters()
    found += [(name, p.grad) for name, p in parameters.items() if p.grad is not None]
    if optimizer is not None:
        for name, parameter in parameters.items():
            for value in optimizer.state.get(parameter, {}).values():
                if isinstance(value, torch.Tensor) and value.device == policy.device:
                    found.append((name, value))
    return found


def measure(
    policy,
    config: Config,
    shapes: Shapes,
    gauge: Gauge,
    *,
    models=(),
    optimizer=None,
    steps: int = 1,
    advance=lambda tokens: None,
) -> None:
    """Run the phases of a step of these shapes within `gauge`, `steps` times. `models`: the reward
    models, which score their largest batches.

    Without an optimizer the gradients are dropped. `advance` is told of tokens that are done.
    """
    for _ in range(steps):
        if config.rollout.pool is None:
            with gauge.phase("rollout"):
                role = rollout_role(policy, config)
                _decode(policy, shapes.rollout, sampling_of(config, "rollout"), role, advance)
            policy.release()
        for model in models:
            with gauge.phase("reward"), model.classifier.on_device():
                for batch in longest_batches(model.spec):
                    model.classifier.logits(rows_of(batch))
        _update(policy, config, shapes.batches, gauge, optimizer, advance)
        policy.release()
        if shapes.evaluation is not None:
            with gauge.phase("evaluation"):
                _decode(
                    policy,
                    shapes.evaluation,
                    sampling_of(config, "evaluation"),
                    policy.as_sampler(),
                    advance,
                )
            policy.release()


def _decode(policy, wave: Wave, sampling: Sampling, role, advance) -> None:
    """All tokens of a wave, none of which may end before, in a role of the policy."""
    sampling = dataclasses.replace(
        sampling, min_completion_length=wave.tokens, max_completion_length=wave.capacity
    )
    random = np.random.default_rng(0)
    vocab = policy.head_weight_VD.shape[0]
    requests = [
        Request(
            random.integers(0, vocab, length).tolist(),
            [random.random(wave.capacity) for _ in range(wave.rows)],
        )
        for length in wave.prompts
    ]
    with role:
        sample(
            policy,
            requests,
            sampling,
            end_ids=end_token_ids(policy),
            batch_size=wave.rows * len(wave.prompts),
            advance=advance,
        )


def _update(
    policy, config: Config, batches: tuple[Batch, ...], gauge: Gauge, optimizer, advance
) -> None:
    groups = [groups_of(batch) for batch in batches]
    scoring = Scoring(config.rollout.temperature, end_token_ids(policy))
    scaler = torch.amp.GradScaler(policy.device.type) if policy.dtype == torch.float16 else None
    parameters = list(policy.adapter_parameters().values())
    if config.asks_reference:
        with gauge.phase("reference"):
            score_reference(policy, packed(groups, config), scoring, advance)
    with gauge.phase("update"):
        accumulate(
            policy,
            packed(groups, config),
            scoring,
            **update_settings(config),
            loss_scale=scaler.scale if scaler is not None else None,
            advance=advance,
        )
    if optimizer is None:
        for parameter in parameters:
            parameter.grad = None
        return
    with gauge.phase("optimizer"):
        apply_update(
            parameters,
            optimizer,
            learning_rate=config.optimizer.learning_rate,
            max_grad_norm=config.optimizer.max_grad_norm,
            scaler=scaler,
        )
