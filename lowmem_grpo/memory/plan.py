"""What a run's phases will take of a card, before anything is loaded.

    settings  those that are "auto" are chosen to fit          memory/settle.py
    events    the phases traced on tensors without values      memory/phases.py
    bytes     the events through the simulated allocator       memory/simulate.py
    plan      each phase's peaks, and what is left of the card

Three numbers are kept apart: allocated (tensors), reserved (what the allocator holds of the card
for them) and device use (reserved plus the CUDA context, which is a range and an estimate). On a
CPU there is no such allocator: what is reserved is what is allocated.

Left out: everything outside of this process except the desktop.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from lowmem_grpo.config import Config
from lowmem_grpo.memory.allocator import MIB, Event
from lowmem_grpo.memory.card import PlanCard, card_choices
from lowmem_grpo.memory.components import COMPONENTS
from lowmem_grpo.memory.phases import PHASES, Phases
from lowmem_grpo.memory.reward_phase import longest_batches
from lowmem_grpo.memory.shapes import Shapes, completions, longest, pieces, tokens
from lowmem_grpo.memory.simulate import Usage, add_up, simulate
from lowmem_grpo.memory.timeline import timeline
from lowmem_grpo.policy.adapters import adapts_embedding
from lowmem_grpo.policy.positions import check_window
from lowmem_grpo.policy.skeleton import read_model_config
from lowmem_grpo.policy.supported import check_config
from lowmem_grpo.setup import adapter_settings, choose, reward_models, window_of

__all__ = ["MemoryPlan", "PhasePlan", "Planner"]

SETTINGS = (
    "lora.r", "lora.target_modules", "rollout.num_generations", "rollout.problems_per_step",
    "rollout.max_prompt_length", "rollout.max_completion_length", "grpo.beta", "grpo.kl_estimator",
    "grpo.entropy_coef", "optimizer.optim",
    "memory.micro_batch_tokens", "memory.gradient_checkpointing", "memory.activation_offloading",
    "memory.offload_overlap", "memory.mlp_tile_tokens", "memory.logits_tile_tokens",
    "memory.logits_tile_vocab", "memory.rollout_batch_size", "memory.kv_cache_bits",
    "memory.embedding_on_host", "model.lm_head_bits", "model.lm_head_kernels",
    "eval.batch_size", "rewards.functions",
)  # fmt: skip


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
    timeline: dict[str, Any]

    @property
    def headroom_bytes(self) -> int:
        """What is left of the card at the peak; negative: what is missing."""
        return self.card.available_bytes - self.peak_reserved_bytes

    @property
    def host_missing_bytes(self) -> int:
        """What the host lacks for what is moved there; 0 where it has it, or is not known."""
        return max(0, self.host_bytes - (self.card.host_bytes or self.host_bytes))

    @property
    def fits(self) -> bool:
        return self.headroom_bytes >= 0 and not self.host_missing_bytes

    def to_json(self) -> dict[str, Any]:
        return {
            "model": self.model,
            "profile": self.profile,
            "card": {"name": self.card.name, "memory_bytes": self.card.memory_bytes},
            "allocator": self.card.options.to_json() if self.card.cuda else None,
            "fits": self.fits,
            "settings": self.settings,
            "reasons": self.reasons,
            "context_bytes": list(self.card.context_bytes),
            "phases": [dataclasses.asdict(phase) for phase in self.phases],
            "peak_reserved_bytes": self.peak_reserved_bytes,
            "headroom_bytes": self.headroom_bytes,
            "host_bytes": self.host_bytes,
            "method": "trace",
            "timeline": self.timeline,
        }

    def verdict(self) -> str:
        """One sentence for a person."""
        # By what is allocated: reserved memory only grows, and is all phases' in the end.
        peak = max(self.phases, key=lambda phase: phase.peak_allocated_bytes)
        kind = "reserved" if self.card.cuda else "allocated"
        which = f"{_gib(self.peak_reserved_bytes)} {kind} at the peak, mostly for {peak.name}"
        rest = f"{self.card.name} has {_gib(max(self.card.available_bytes, 0))} for it"
        if "per_process_memory_fraction" in self.card.options.given:
            rest += f" under {self.card.options.name}"
        if self.fits:
            return f"Fits: {which}, {rest}, {_gib(self.headroom_bytes)} are left.{self._on_host()}"
        if self.headroom_bytes >= 0:
            return (
                f"Does not fit: {_gib(self.host_bytes)} of host memory would be taken, "
                f"{_gib(self.host_missing_bytes)} more than there is; "
                f"{'take a smaller reward model, or ' if self._models_on_host else ''}lower "
                "memory.micro_batch_tokens or --max-completion-length."
            )
        return (
            f"Does not fit: {which}, {rest}, {_gib(-self.headroom_bytes)} are missing; lower "
            f"{_way_out(peak)}."
        )

    @property
    def _models_on_host(self) -> bool:
        return self.card.cuda and any(phase.name == "reward" for phase in self.phases)

    def _on_host(self) -> str:
        """What the host holds, where a setting moves something there."""
        moved = "memory.activation_offloading", "memory.embedding_on_host"
        if not self._models_on_host and not any(self.settings[key] for key in moved):
            return ""
        have = "" if self.card.host_bytes is None else f", which has {_gib(self.card.host_bytes)}"
        return f" {_gib(self.host_bytes)} lie in host memory{have}."


class Planner:
    """Plans of one model on one card, for any shape and any memory settings of a run.

    Raises ModelError for the model (`config.model.name`: see `read_model_config`), ConfigError for
    settings that this card cannot run.
    """

    def __init__(self, config: Config, card: PlanCard, profile: str = ""):
        self.card, self.profile = card, profile
        self.model_config = read_model_config(config.model.name)
        check_config(config.model.name, self.model_config)
        check_window(config.model.name, self.model_config, window_of(config))
        head_dim = getattr(self.model_config, "head_dim", None)
        tied = self.model_config.tie_word_embeddings
        self.can_move_embedding = card.cuda and not (
            tied or adapts_embedding(self.model_config, adapter_settings(config))
        )
        if card.cuda:
            self.dtype, self.attention = card_choices(config, card, head_dim)
        else:
            on_host = config.settled({"model.device": "cpu"}, "no card")
            _, chosen = choose(on_host)
            self.dtype, self.attention = chosen["compute_dtype"], chosen["attention"]
        backend = self.attention.value
        self.phases = Phases(
            config,
            self.model_config,
            card,
            dtype=getattr(torch, self.dtype.value),
            attention="torch_varlen" if backend == "flash_attn" else backend,
        )

    @property
    def padded(self) -> bool:
        """Whether attention pads a group's completions to the longest of them."""
        return self.attention.value == "sdpa"

    def plan(self, config: Config, shapes: Shapes | None = None, steps: int = 2) -> MemoryPlan:
        """The plan of settings of which none is "auto" (see `memory/settle.py`), for the longest
        shapes if none are given. In the second step the optimizer's moments are there from the
        start.
        """
        shapes = shapes or longest(config, self.padded)
        traced = self.phases.trace(config, shapes, steps)
        usage = self._simulated(traced.events)
        settings = {
            "model.compute_dtype": self.dtype.value,
            "model.attention": self.attention.value,
            **{key: value_of(config, key) for key in SETTINGS},
        }
        reasons = {key: config.sources.get(key, "default") for key in SETTINGS}
        reasons["model.compute_dtype"] = self.dtype.reason
        reasons["model.attention"] = self.attention.reason
        reserved = usage.timeline.reserved if self.card.cuda else None
        return MemoryPlan(
            model=config.model.name,
            profile=self.profile,
            card=self.card,
            settings=settings,
            reasons=reasons | self._notes(shapes, config, usage),
            phases=phase_plans(traced.events, usage),
            peak_reserved_bytes=usage.peak_reserved,
            host_bytes=traced.host_bytes + traced.adapter_bytes + traced.optimizer_bytes,
            timeline=timeline(traced.events, usage.timeline.allocated, reserved),
        )

    def forget(self) -> None:
        """Let go of the traces made so far: they take hundreds of megabytes."""
        self.phases.forget()

    def _simulated(self, events: list[Event]) -> Usage:
        """Through an allocator on that card, which gives cached memory back before it is out of
        memory: with the margin free, or without it; if that does not help, on a card without a
        limit, to say how much is missing.
        """
        card = self.card
        if not card.cuda:
            return add_up(events)
        for room in (card.available_bytes - card.margin_bytes, card.available_bytes):
            if room > 0:
                usage = simulate(events, card.allocator(room))
                if usage.oom is None:
                    return usage
        return simulate(events, card.allocator())

    def _notes(self, shapes: Shapes, config: Config, usage: Usage) -> dict[str, str]:
        """What the numbers rest on, by the name of the number."""
        card, wave = self.card, shapes.rollout
        batches = "; ".join(
            f"{tokens(batch)} tokens with {completions(batch)} completions"
            for batch in shapes.batches
        )
        notes = {
            "method": "loading and two steps traced on tensors without values, CUDA's hidden "
            "allocations added by rules, replayed through a simulated allocator",
            "context_bytes": "an estimate, from published figures: not measured on this card",
            "load": "traced, with each 16-bit weight on the card while its 4-bit form is made",
            "rollout": f"traced: {len(wave.prompts)} prompts of up to {max(wave.prompts)} tokens, "
            f"{len(wave.prompts) * wave.rows} rows; decoded at a few places up to token "
            f"{wave.tokens}",
            "update": f"traced with full micro-batches: {batches}{_cut(config)}",
            "host_bytes": "pinned pages, an embedding and reward models on the host, and the "
            "copies of adapters and optimizer state that a checkpoint makes; Python and torch "
            "themselves are not counted",
        }
        if specs := reward_models(config):
            largest = "; ".join(
                f"{batch.rows} of {batch.tokens} tokens"
                for spec in specs
                for batch in longest_batches(spec)
            )
            notes["reward"] = f"traced with each model's largest batches of its tokens: {largest}"
        if not card.cuda:
            notes["method"] = (
                "loading and two steps traced on tensors without values, added up: on a CPU what "
                "libraries allocate inside their kernels is not seen"
            )
            notes["context_bytes"] = "an estimate for Python and its libraries"
        elif card.multiprocessors is None:
            notes["workspace"] = (
                "the number of multiprocessors is not known: 4-bit products of few rows count as "
                "dequantised, which takes more"
            )
        if self.attention.value == "flash_attn":
            notes["attention"] = "traced as torch_varlen, which has the same kernels"
        if card.desktop_bytes:
            desktop = card.desktop_bytes // MIB
            notes["headroom_bytes"] = (
                f"less {desktop} MiB for a desktop, and a context at its largest"
            )
        if usage.retries:
            notes["peak_reserved_bytes"] = (
                f"cached memory must be given back {usage.retries} times to fit, which costs time"
            )
        if config.optimizer.optim != "adamw_torch":
            notes["optimizer"] = (
                "8-bit moments by rule: bitsandbytes refuses tensors without values"
            )
        return notes


def phase_plans(events: list[Event], usage: Usage) -> list[PhasePlan]:
    """Each phase's peaks, and what was alive at the first of them."""
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
        if event.action != "empty_cache":
            live[owner[event.id]] += allocated[place] - before
        before = allocated[place]
        if place in wanted:
            found[wanted[place]] = dict(live)
    return [
        PhasePlan(name, allocated[peak_at[name]], peak_reserved[name], found[name])
        for name in PHASES
        if name in found
    ]


def value_of(config: Config, key: str) -> Any:
    """The value of "section.key"."""
    section, name = key.split(".")
    return getattr(getattr(config, section), name)


def _cut(config: Config) -> str:
    """What cutting groups into several micro-batches costs."""
    r, count = config.rollout, pieces(config)
    if count == 1:
        return ""
    group = r.max_prompt_length + r.num_generations * (r.max_completion_length - 1)
    more = 100 * (count - 1) * r.max_prompt_length / group
    return (
        f"; a group of the longest completions is cut into {count}, and its prompt computed "
        f"{count} times: {more:.1f}% more tokens"
    )


def _way_out(peak: PhasePlan) -> str:
    largest = max((n for n in COMPONENTS if n != "base_weights"), key=peak.components.__getitem__)
    if peak.components["base_weights"] > sum(peak.components.values()) / 2:
        return "the size of the model"
    if peak.name == "reward":
        return "batch= and max= of the reward model, or take a smaller one"
    if peak.name == "optimizer":
        return "lora.r, or use optimizer.optim = paged_adamw_8bit"
    if peak.name == "evaluation":
        return "eval.batch_size or eval.max_completion_length"
    if peak.name == "rollout":
        return "memory.rollout_batch_size or --max-completion-length"
    if largest == "logits":
        return "memory.logits_tile_tokens or memory.logits_tile_vocab"
    return "memory.micro_batch_tokens or --max-completion-length"


def _gib(size: int) -> str:
    return f"{size / 1024**3:.2f} GiB"
