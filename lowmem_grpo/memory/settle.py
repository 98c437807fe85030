"""Which memory settings a run gets where its configuration says "auto".

A setting is chosen by planning: the largest value, of a few sensible ones, that fits the card. What
fits is decided for each phase by itself, with loading before it, and in the end for all of them one
after another. Each choice has its reason.

- `rollout_batch_size`: all completions of a step at once, else whole groups, else fewer. The rows
  of a wave decode together at little more than the time of one.
- `gradient_checkpointing`: off, where full micro-batches fit without it. It computes every layer
  twice, a third more of the update's time.
- `kv_cache_bits`: 16, unless not even one completion fits in them.
- `activation_offloading`: off, unless one prompt and its longest completion fit only with it;
  then with `offload_overlap`, unless they fit only without that.
- `mlp_tile_tokens`: tiles where layers are computed again anyway; smaller ones at the last.
- `embedding_on_host`: off, unless nothing fits without it.
- `micro_batch_tokens`: the whole step, else whole groups, else equal parts of
  one. A group that is cut has its prompt computed once for each part. Of several groups, more than
  `ENOUGH_TOKENS` gain nothing.
- the head's tiles take at most a fiftieth of the card, unless pinned.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from typing import Any

from lowmem_grpo.config import Config
from lowmem_grpo.memory.phases import Alone
from lowmem_grpo.memory.plan import MemoryPlan, Planner, value_of
from lowmem_grpo.memory.shapes import (
    budgets,
    evaluated,
    evaluation,
    fullest,
    rollout_sizes,
    wave,
)
from lowmem_grpo.memory.simulate import add_up, simulate

__all__ = ["AUTO", "Search", "settle", "settle_evaluation", "settle_sampling"]

GOOD_TOKENS = 4096  # with fewer, checkpointing and more tokens are as fast as none
EVALUATED = 64  # rows of an evaluation's wave
TILES = ((1024, 32768), (1024, 16384), (1024, 8192), (512, 8192), (256, 4096))
TILE_BYTES = {"torch": 10, "triton": 2}  # an element: 16 bits, with torch two of float32
TILE_SHARE = 0.02
MLP_TILE, LEAST_MLP_TILE = 4096, 1024  # tokens
AUTO, ORIGIN = "auto", "plan"
UNSCORED = {"rewards.functions": []}  # no reward model is loaded to evaluate or to sample


def settle(planner: Planner, config: Config) -> tuple[Config, MemoryPlan]:
    """The run with a value for every "auto", and its plan; the plan says whether it fits.

    Where nothing fits, the values are the smallest ones, and the plan shows what is missing.
    """
    search = Search(planner, config)
    search.choose()
    plan = planner.plan(search.settled())
    while plan.headroom_bytes < planner.card.margin_bytes and search.lower(plan):
        plan = planner.plan(search.settled())
    return search.settled(), plan


def settle_evaluation(planner: Planner, config: Config) -> Config:
    """A configuration for evaluating, with as many problems at once as fit."""
    search = Search(planner, config.settled(UNSCORED, "command line"))
    search.choose_evaluation()
    return search.config


def settle_sampling(planner: Planner, config: Config, count: int) -> Config:
    """A configuration for `count` completions of one prompt, as many at once as fit."""
    # A group has two at least.
    one = {"rollout.problems_per_step": 1, "rollout.num_generations": max(count, 2), **UNSCORED}
    search = Search(planner, config.settled(one, "command line"))
    search.choose_rows()
    return search.config


class Search:
    """One run whose "auto" settings are being chosen."""

    def __init__(self, planner: Planner, config: Config):
        self.planner, self.given, self.config = planner, config, config
        self.open = {
            key
            for key in (
                "memory.rollout_batch_size",
                "memory.micro_batch_tokens",
                "memory.gradient_checkpointing",
                "memory.activation_offloading",
                "memory.offload_overlap",
                "memory.mlp_tile_tokens",
                "memory.logits_tile_tokens",
                "memory.logits_tile_vocab",
                "memory.kv_cache_bits",
                "memory.embedding_on_host",
                "eval.batch_size",
            )
            if value_of(config, key) == AUTO
        }
        self.reasons: dict[str, str] = {}
        self.room = planner.card.available_bytes - planner.card.margin_bytes
        r = config.rollout
        self.row = r.max_completion_length - 1  # trunk tokens
        self.group = r.max_prompt_length + r.num_generations * self.row
        self._set_tiles()
        for key, value in (
            ("memory.rollout_batch_size", 1),
            ("memory.micro_batch_tokens", r.max_prompt_length + self.row),
            ("memory.gradient_checkpointing", True),
            ("memory.activation_offloading", False),
            ("memory.offload_overlap", False),
            ("memory.mlp_tile_tokens", MLP_TILE),
            ("memory.kv_cache_bits", 16),
            ("memory.embedding_on_host", False),
            ("eval.batch_size", 1),
        ):
            self.set(key, value)

    def set(self, key: str, value: Any) -> None:
        """Give an open setting a value."""
        if key in self.open:
            self.config = self.config.settled({key: value}, ORIGIN)

    def _set_tiles(self) -> None:
        vocab = self.planner.model_config.vocab_size
        allowed = TILE_SHARE * self.planner.card.memory_bytes
        for rows, words in TILES:
            self.set("memory.logits_tile_tokens", rows)
            self.set("memory.logits_tile_vocab", min(words, vocab))
            if self._tile_bytes() <= allowed:
                break

    def _tile_bytes(self) -> int:
        m, kernels = self.config.memory, self.config.model.lm_head_kernels
        words = min(m.logits_tile_vocab, self.planner.model_config.vocab_size)
        return TILE_BYTES[kernels] * m.logits_tile_tokens * words

    # --- What fits, as a share of the room that there is: up to 1 does

    def rows_share(self) -> float:
        """Of the sampler's largest wave by itself; a pool's groups are not sampled."""
        return 0.0 if self.config.rollout.pool else self._share(wave(self.config))

    def evaluation_share(self) -> float:
        """Of the largest wave of an evaluation by itself."""
        return self._share(evaluation(self.config))

    def update_share(self) -> float:
        """Of full micro-batches by themselves, on the card and on the host."""
        return self._share(fullest(self.config, self.planner.padded))

    def optimizer_share(self) -> float:
        """Of the optimizer's step."""
        return self._share_of(self.planner.phases.optimizer_alone(self.config))

    def reward_share(self) -> float:
        """Of the reward models' largest batches; none of the settings here changes it."""
        models = self.planner.phases.reward_alone(self.config)
        return max(map(self._share_of, models), default=0.0)

    def _share(self, shapes) -> float:
        return self._share_of(self.planner.phases.alone(self.config, shapes))

    def _share_of(self, alone: Alone) -> float:
        card = self.planner.card
        room = self.room - alone.around_bytes
        if room <= 0:
            return float("inf")
        share = add_up(alone.events).peak_allocated / room
        if card.host_bytes is not None:
            share = max(share, alone.host_bytes / card.host_bytes)
        if share > 1 or not card.cuda:
            return share
        # Its bytes fit, and still the allocator may not find a place for it.
        refused = simulate(alone.events, card.allocator(room)).oom is not None
        return 1.0 + 1e-6 if refused else share

    def smallest_share(self) -> float:
        """Of the run at its smallest settings."""
        self.set("memory.activation_offloading", self._can_offload())
        self.set("memory.mlp_tile_tokens", LEAST_MLP_TILE)
        self.set("memory.kv_cache_bits", 8)
        self.set("memory.embedding_on_host", self._can_move_embedding())
        return max(self._shares())

    def _shares(self) -> list[float]:
        """Of each phase by itself."""
        phases = [self.optimizer_share, self.rows_share, self.reward_share, self.update_share]
        return [
            share() for share in phases + [self.evaluation_share] * bool(self.config.eval.every)
        ]

    def _can_offload(self) -> bool:
        return self.planner.card.cuda and value_of(self.config, "memory.gradient_checkpointing")

    def _can_move_embedding(self) -> bool:
        return self.planner.can_move_embedding

    def _embedding_may_help(self) -> bool:
        key = "memory.embedding_on_host"
        return key in self.open and not value_of(self.config, key) and self._can_move_embedding()

    # --- Choices, each with its reason

    def choose(self) -> None:
        """Give every open setting the largest value that fits by itself."""
        embedding = "memory.embedding_on_host"
        tied = "it is the head as well" if self.planner.card.cuda else "the host is the device"
        self.reasons[embedding] = "not needed" if self._can_move_embedding() else tied
        self._choose_sizes()
        least = Search(self.planner, self.given)
        if self._embedding_may_help() and max(self._shares()) > 1 >= least.smallest_share():
            self.move_embedding()
            self._choose_sizes()

    def move_embedding(self) -> None:
        """To the host."""
        self.set("memory.embedding_on_host", True)
        self.reasons["memory.embedding_on_host"] = "does not fit without it"

    def _choose_sizes(self) -> None:
        size = self._tile_bytes() >> 20
        for key in ("memory.logits_tile_tokens", "memory.logits_tile_vocab"):
            self.reasons[key] = f"a tile of the head takes about {size} MiB, a fiftieth of the card"
        self.reasons["memory.rollout_batch_size"] = self.choose_rows()
        if self.config.eval.every:
            self.reasons["eval.batch_size"] = self.choose_evaluation()
        self.reasons |= self.choose_update()

    def settled(self) -> Config:
        """The run with the values chosen so far, and their reasons as their sources."""
        config = self.given
        for key in self.open & self.reasons.keys():
            config = config.settled({key: value_of(self.config, key)}, f"plan: {self.reasons[key]}")
        return config

    def choose_rows(self) -> str:
        """Of `memory.rollout_batch_size`, with the bits of the cache; returns the reason."""
        r = self.config.rollout
        values = rollout_sizes(r.problems_per_step, r.num_generations)
        for bits in (16, 8):
            self.set("memory.kv_cache_bits", bits)
            fits = self._grow("memory.rollout_batch_size", values, self.rows_share)
            if fits:
                break
        whole = self.config.memory.kv_cache_bits == 16
        self.reasons["memory.kv_cache_bits"] = (
            "samples from the policy as it is" if whole else "not one completion fits in 16 bits"
        )
        rows = self.config.memory.rollout_batch_size
        if not fits:
            return "not even one completion at a time fits"
        if rows == values[-1]:
            return "all completions of a step at once"
        groups = f"{rows // r.num_generations} groups" if rows >= r.num_generations else "a part"
        return f"the most that fits, {groups} of the step's {values[-1]} completions"

    def choose_evaluation(self) -> str:
        """Of `eval.batch_size`; returns the reason."""
        values = self._evaluation_sizes()
        if not self._grow("eval.batch_size", values, self.evaluation_share):
            return "not even one completion at a time fits"
        return "the most completions at once that fit, 64 at most"

    def _evaluation_sizes(self) -> list[int]:
        most = min(EVALUATED, evaluated(self.config))
        return sorted({most, *(1 << i for i in range(7) if 1 << i < most)})

    def choose_update(self) -> dict[str, str]:
        """Of micro-batches, of what is kept for backward and where, and of tiles; returns the
        reasons.
        """
        tokens, checkpointing = "memory.micro_batch_tokens", "memory.gradient_checkpointing"
        offloading, tile = "memory.activation_offloading", "memory.mlp_tile_tokens"
        values = budgets(self.config)
        fits = any(self._fits_in(way, values) for way in self._ways())
        m = self.config.memory
        reasons = {
            offloading: "does not fit without it" if m.activation_offloading else "not needed",
            "memory.offload_overlap": "nothing is copied",
            checkpointing: "needed, full micro-batches do not fit without it",
            tile: "layers are computed again anyway",
        }
        if m.offload_overlap:
            reasons["memory.offload_overlap"] = "copies run beside the kernels"
        elif m.activation_offloading:
            reasons["memory.offload_overlap"] = "does not fit with it"
        if m.mlp_tile_tokens == LEAST_MLP_TILE:
            reasons[tile] = "larger ones do not fit"
        if not self.planner.card.cuda:
            reasons[offloading] = "the host is the device"
        if not fits:
            least = "takes the least, and still nothing fits"
            return reasons | {tokens: "not even one completion fits", checkpointing: least}
        if m.activation_offloading:
            reasons[checkpointing] = "what lies on the host are its layers' inputs"
        elif checkpointing in self.open:
            with_it = self.config
            self.set(checkpointing, False)
            self.set(tile, 0)
            enough = min(GOOD_TOKENS, with_it.memory.micro_batch_tokens)
            first = next((v for v in values if v >= enough), values[-1])
            self.set(tokens, first)
            if self.update_share() <= 1:
                self._grow(tokens, [v for v in values if v >= first], self.update_share)
                reasons[checkpointing] = "not needed, micro-batches fit without it"
            else:
                self.config = with_it
        if self.config.memory.mlp_tile_tokens == 0:
            reasons[tile] = "not needed, micro-batches fit with whole ones"
        reasons[tokens] = self._why_tokens(values)
        return reasons

    def _fits_in(self, way: dict[str, Any], values: Sequence[int]) -> bool:
        for key, value in way.items():
            self.set(key, value)
        return self._grow("memory.micro_batch_tokens", values, self.update_share)

    def _ways(self) -> list[dict[str, Any]]:
        """What can be kept for backward, and where: from the fastest to what takes the least."""
        m, key = self.config.memory, "memory.activation_offloading"
        given = m.activation_offloading if key not in self.open else False
        # Without checkpointing a tile is computed once more than it would be.
        whole = MLP_TILE if m.gradient_checkpointing else 0
        ways = [(given, given, whole)]
        if given or self._can_offload():
            ways.append((True, True, MLP_TILE))
        ways.append((given or self._can_offload(), False, LEAST_MLP_TILE))
        keys = key, "memory.offload_overlap", "memory.mlp_tile_tokens"
        return [dict(zip(keys, way, strict=True)) for way in ways]

    def _why_tokens(self, values: Sequence[int]) -> str:
        tokens, r = self.config.memory.micro_batch_tokens, self.config.rollout
        if tokens == r.problems_per_step * self.group:
            return "the whole step at once"
        limit = "more gains nothing" if tokens == values[-1] else "more does not fit"
        if tokens >= self.group:
            count = tokens // self.group
            return f"{count} whole group{'s' * (count > 1)}, {limit}"
        rows = (tokens - r.max_prompt_length) // self.row if self.row else 1
        return f"{rows} of a group's {r.num_generations} longest completions, {limit}"

    def _grow(self, key: str, values: Sequence[int], share: Callable[[], float]) -> bool:
        """Set the largest of ascending values that fits, the first one if none does."""
        if key not in self.open:
            return share() <= 1

        def at(place: int) -> float:
            self.set(key, values[place])
            return share()

        low, high = 0, len(values) - 1
        if (above := at(high)) <= 1:
            return True
        below = at(low) if high else above
        fits = below <= 1
        while fits and high - low > 1:
            line = (1 - below) / (above - below) * (values[high] - values[low]) + values[low]
            guess = bisect_right(values, line) - 1
            middle = min(max(guess, low + 1), high - 1)
            found = at(middle)
            if found <= 1:
                low, below = middle, found
            else:
                high, above = middle, found
        self.set(key, values[low])
        return fits

    def lower(self, plan: MemoryPlan) -> bool:
        """Take one step down where the plan as a whole does not fit; False when there is none."""
        peak = max(plan.phases, key=lambda phase: phase.peak_reserved_bytes).name
        r = self.config.rollout
        sizes = {
            "memory.micro_batch_tokens": budgets(self.config),
            "memory.rollout_batch_size": rollout_sizes(r.problems_per_step, r.num_generations),
        }
        if self.config.eval.every:
            sizes["eval.batch_size"] = self._evaluation_sizes()
        own = {"rollout": "memory.rollout_batch_size", "evaluation": "eval.batch_size"}
        first = own.get(peak, "memory.micro_batch_tokens")
        # A reward model's batches are of no setting here, and smaller ones elsewhere no help.
        keys = [] if peak == "reward" else sorted(sizes, key=lambda key: key != first)
        for key in keys:
            less = [v for v in sizes[key] if v < value_of(self.config, key)]
            if key in self.open and less:
                self.set(key, less[-1])
                self.reasons[key] = "the most with which all phases together fit"
                return True
        if self._embedding_may_help():
            self.move_embedding()
            return True
        return False
