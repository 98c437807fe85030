"""What a run's phases will take of a card, before anything is loaded.

    events    the phases traced on tensors without values     memory/phases.py
    bytes     the events through the simulated allocator      memory/simulate.py
    plan      each phase's peaks, and what is left of the card

Three numbers are kept apart: allocated (tensors), reserved (what the allocator holds of the card
for them) and device use (reserved plus the CUDA context, which is a range and an estimate).

Left out: evaluation during training, and everything outside of this process except the desktop.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from lowmem_grpo.config import Config
from lowmem_grpo.errors import ConfigError
from lowmem_grpo.hardware import Choice, Machine, choose_attention, choose_compute_dtype
from lowmem_grpo.memory.allocator import MIB, AllocatorSettings, Event
from lowmem_grpo.memory.components import COMPONENTS
from lowmem_grpo.memory.phases import Traced, trace_phases, wave
from lowmem_grpo.memory.simulate import Usage, simulate
from lowmem_grpo.policy.skeleton import read_model_config
from lowmem_grpo.profiles import Profile

__all__ = ["CONTEXT_BYTES", "MemoryPlan", "PhasePlan", "PlanCard", "make_plan", "plan_card"]

# Published: 287 MB (CUDA 11.7, lazy loading) to 667 MB (without); 426 MiB on an RTX 6000 Ada with
# torch 2.10. A range until it is measured on the card.
CONTEXT_BYTES = (300 * MIB, 600 * MIB)
PHASES = ("load", "rollout", "reference", "update", "optimizer")
SETTINGS = (
    "lora.r", "lora.target_modules", "rollout.num_generations", "rollout.problems_per_step",
    "rollout.max_prompt_length", "rollout.max_completion_length", "grpo.beta", "optimizer.optim",
    "memory.micro_batch_tokens", "memory.gradient_checkpointing", "memory.logits_tile_tokens",
    "memory.logits_tile_vocab", "memory.rollout_batch_size",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class PlanCard:
    """A card to plan for: memory as CUDA reports it, and what the desktop takes of it, in bytes."""

    name: str
    memory_bytes: int
    compute_capability: tuple[int, int]
    desktop_bytes: int = 0
    multiprocessors: int | None = None

    def __post_init__(self) -> None:
        if self.memory_bytes <= 0:
            raise ConfigError(f"a card of {self.memory_bytes} bytes: give its memory")

    @property
    def available_bytes(self) -> int:
        """For the allocator: without the desktop, and with a CUDA context at its largest."""
        return self.memory_bytes - self.desktop_bytes - CONTEXT_BYTES[1]


@dataclasses.dataclass(frozen=True)
class PhasePlan:
    """A phase's peaks in bytes; `components` add up to the allocated one."""

    name: str
    peak_allocated_bytes: int
    peak_reserved_bytes: int
    components: dict[str, int]


@dataclasses.dataclass(frozen=True)
class MemoryPlan:
    """See the module's docstring; `to_json` is what `plan --json` prints."""

    model: str
    profile: str
    card: PlanCard
    settings: dict[str, Any]
    reasons: dict[str, str]
    phases: list[PhasePlan]
    peak_reserved_bytes: int
    host_bytes: int

    @property
    def headroom_bytes(self) -> int:
        """What is left of the card at the peak; negative: what is missing."""
        return self.card.available_bytes - self.peak_reserved_bytes

    @property
    def fits(self) -> bool:
        return self.headroom_bytes >= 0

    def to_json(self) -> dict[str, Any]:
        return {
            "model": self.model,
            "profile": self.profile,
            "card": {"name": self.card.name, "memory_bytes": self.card.memory_bytes},
            "fits": self.fits,
            "settings": self.settings,
            "reasons": self.reasons,
            "context_bytes": list(CONTEXT_BYTES),
            "phases": [dataclasses.asdict(phase) for phase in self.phases],
            "peak_reserved_bytes": self.peak_reserved_bytes,
            "headroom_bytes": self.headroom_bytes,
            "host_bytes": self.host_bytes,
            "method": "trace",
        }

    def verdict(self) -> str:
        """One sentence for a person."""
        # By what is allocated: reserved memory only grows, and is all phases' in the end.
        peak = max(self.phases, key=lambda phase: phase.peak_allocated_bytes)
        which = f"{_gib(self.peak_reserved_bytes)} reserved at the peak, mostly for {peak.name}"
        rest = f"{self.card.name} has {_gib(max(self.card.available_bytes, 0))} for it"
        if self.fits:
            return f"Fits: {which}, {rest}, {_gib(self.headroom_bytes)} are left."
        return (
            f"Does not fit: {which}, {rest}, {_gib(-self.headroom_bytes)} are missing; lower "
            f"{_way_out(peak)}."
        )


def plan_card(profile: Profile) -> PlanCard:
    """The card of a profile. Raises ConfigError for one without a card (cpu)."""
    if profile.memory_bytes is None or profile.compute_capability is None:
        raise ConfigError(
            f"profile {profile.name} has no card to plan for: give one with --profile NAME "
            "(`lowmem-grpo profiles list`)"
        )
    return PlanCard(
        profile.card["name"],
        profile.memory_bytes,
        profile.compute_capability,
        profile.card.get("desktop_mib", 0) * MIB,
    )


def make_plan(config: Config, card: PlanCard, profile: str = "") -> MemoryPlan:
    """The plan of a run (`config.model.name`: see `read_model_config`) on a card.

    Raises ModelError for the model, ConfigError for settings that this card cannot run.
    """
    model_config = read_model_config(config.model.name)
    dtype, attention = _choices(config, card, getattr(model_config, "head_dim", None))
    backend = "torch_varlen" if attention.value == "flash_attn" else attention.value
    traced = trace_phases(
        config, model_config, card, dtype=getattr(torch, dtype.value), attention=backend
    )
    usage = _simulated(traced.events, card)
    settings = {
        "model.compute_dtype": dtype.value,
        "model.attention": attention.value,
        **{key: _value(config, key) for key in SETTINGS},
    }
    reasons = {key: config.sources.get(key, "default") for key in SETTINGS}
    reasons |= {"model.compute_dtype": dtype.reason, "model.attention": attention.reason}
    return MemoryPlan(
        model=config.model.name,
        profile=profile,
        card=card,
        settings=settings,
        reasons=reasons | _notes(config, card, attention.value, traced, usage),
        phases=_phases(traced.events, usage),
        peak_reserved_bytes=usage.peak_reserved,
        host_bytes=traced.adapter_bytes + traced.optimizer_bytes,
    )


def _choices(config: Config, card: PlanCard, head_dim: int | None) -> tuple[Choice, Choice]:
    """Compute dtype and attention backend as `train` would choose them on that card."""
    machine = Machine(
        device_type="cuda",
        name=card.name,
        memory_bytes=card.memory_bytes,
        compute_capability=card.compute_capability,
        cpu_name="",
        cpu_threads=0,
        host_memory_bytes=0,
        bf16_cpu=None,
        # A package that is asked for is taken to be installed there.
        versions={"flash_attn": "?"} if config.model.attention == "flash_attn" else {},
    )
    dtype = choose_compute_dtype(machine, config.model.compute_dtype)
    wanted = config.model.attention
    attention = choose_attention(machine, dtype.value, wanted, head_dim=head_dim)
    if wanted == "auto" and attention.value == "torch_varlen":
        attention = Choice("torch_varlen", "flash attention, which compute capability 8.0 has")
    return dtype, attention


def _simulated(events: list[Event], card: PlanCard) -> Usage:
    """Through an allocator on that card, which gives cached memory back before it is out of
    memory; if that does not help, on a card without a limit, to say how much is missing.
    """
    outside = card.desktop_bytes + CONTEXT_BYTES[1]
    if outside < card.memory_bytes:
        settings = AllocatorSettings(card_memory=card.memory_bytes, outside_bytes=outside)
        usage = simulate(events, settings)
        if usage.oom is None:
            return usage
    return simulate(events)


def _phases(events: list[Event], usage: Usage) -> list[PhasePlan]:
    allocated, reserved = usage.timeline
    peak_at: dict[str, int] = {}
    peak_reserved: dict[str, int] = {}
    for place, event in enumerate(events):
        name = event.phase
        if name not in peak_at or allocated[place] > allocated[peak_at[name]]:
            peak_at[name] = place
        peak_reserved[name] = max(peak_reserved.get(name, 0), reserved[place])
    wanted, found = {place: name for name, place in peak_at.items()}, {}
    live, owner, before = dict.fromkeys(COMPONENTS, 0), {}, 0
    for place, event in enumerate(events):
        # The difference is a block's size, which is what counts, and not the bytes asked for.
        if event.action == "alloc":
            owner[event.id] = event.component
        live[owner[event.id]] += allocated[place] - before
        before = allocated[place]
        if place in wanted:
            found[wanted[place]] = dict(live)
    return [
        PhasePlan(name, allocated[peak_at[name]], peak_reserved[name], found[name])
        for name in PHASES
        if name in found
    ]


def _notes(config, card: PlanCard, attention: str, traced: Traced, usage: Usage) -> dict[str, str]:
    """What the numbers rest on, by the name of the number."""
    problems, rows = wave(config)
    shapes = "; ".join(
        f"{tokens} tokens with {completions} completions" for tokens, completions in traced.batches
    )
    notes = {
        "method": "loading and two steps traced on tensors without values, CUDA's hidden "
        "allocations added by rules, replayed through a simulated allocator",
        "context_bytes": "an estimate, from published figures: not measured on this card",
        "load": "traced, with each 16-bit weight on the card while its 4-bit form is made",
        "rollout": f"traced: {problems} prompts of {config.rollout.max_prompt_length} tokens, "
        f"{problems * rows} rows; decoded at a few places up to token "
        f"{config.rollout.max_completion_length}",
        "update": f"traced with full micro-batches: {shapes}",
        "host_bytes": "the copies of adapters and optimizer state that a checkpoint makes; "
        "Python and torch themselves are not counted",
    }
    if card.multiprocessors is None:
        notes["workspace"] = (
            "the number of multiprocessors is not known: 4-bit products of few rows count as "
            "dequantised, which takes more"
        )
    if attention == "flash_attn":
        notes["attention"] = "traced as torch_varlen, which has the same kernels"
    if card.desktop_bytes:
        desktop = card.desktop_bytes // MIB
        notes["headroom_bytes"] = f"less {desktop} MiB for a desktop, and a context at its largest"
    if usage.retries:
        notes["peak_reserved_bytes"] = (
            f"cached memory must be given back {usage.retries} times to fit, which costs time"
        )
    if config.optimizer.optim != "adamw_torch":
        notes["optimizer"] = "8-bit moments by rule: bitsandbytes refuses tensors without values"
    return notes


def _way_out(peak: PhasePlan) -> str:
    largest = max((n for n in COMPONENTS if n != "base_weights"), key=peak.components.__getitem__)
    if peak.components["base_weights"] > sum(peak.components.values()) / 2:
        return "the size of the model"
    if peak.name == "rollout":
        return "memory.rollout_batch_size or --max-completion-length"
    if largest == "logits":
        return "memory.logits_tile_tokens or memory.logits_tile_vocab"
    return "memory.micro_batch_tokens or --max-completion-length"


def _value(config: Config, key: str) -> Any:
    section, name = key.split(".")
    return getattr(getattr(config, section), name)


def _gib(size: int) -> str:
    return f"{size / 1024**3:.2f} GiB"
