"""Which memory settings a run gets where its configuration says "auto", and the largest run that
fits.

A setting is chosen by planning: the largest value, of a few sensible ones, that fits the card. What
fits is decided for each phase by itself, with loading before it, and in the end for all of them one
after another. Each choice has its reason.

- `rollout_batch_size`: all completions of a step at once, else whole groups, else fewer. The rows
  of a wave decode together at little more than the time of one.
- `gradient_checkpointing`: off, where full micro-batches fit without it. It computes every layer
  twice, a third more of the update's time.
- `activation_offloading`: off, unless one prompt and its longest completion fit only with it.
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
from lowmem_grpo.errors import ConfigError
from lowmem_grpo.memory.allocator import AllocatorSettings
from lowmem_grpo.memory.phases import Alone
from lowmem_grpo.memory.plan import MemoryPlan, Planner, value_of
from lowmem_grpo.memory.shapes import evaluation, fullest, wave
from lowmem_grpo.memory.simulate import add_up, simulate

__all__ = ["SOLVABLE", "largest", "least_value", "settle", "settle_evaluation", "settle_sampling"]

SOLVABLE = ("max_completion_length", "num_generations")
ENOUGH_TOKENS = 16384  # of a micro-batch
GOOD_TOKENS = 4096  # with fewer, checkpointing and more tokens are as fast as none
EVALUATED = 64  # rows of an evaluation's wave
TILES = ((1024, 32768), (1024, 16384), (1024, 8192), (512, 8192), (256, 4096))
TILE_BYTES = 10  # an element of a tile: its product in 16 bits, and two of float32
TILE_SHARE = 0.02
AUTO = "auto"
MOST_GENERATIONS = 1024
ORIGIN = "plan"


def settle(planner: Planner, config: Config) -> tuple[Config, MemoryPlan]:
    """The run with a value for every "auto", and its plan; the plan says whether it fits.

    Where nothing fits, the values are the smallest ones, and the plan shows what is missing.
    """
    search = _Search(planner, config)
    search.choose()
    plan = planner.plan(search.settled())
    while plan.headroom_bytes < planner.card.margin_bytes and search.lower(plan):
        plan = planner.plan(search.settled())
    return search.settled(), plan


def settle_evaluation(planner: Planner, config: Config) -> Config:
    """A configuration for evaluating, with as many problems at once as fit."""
    search = _Search(planner, config)
    search.choose_evaluation()
    return search.config


def settle_sampling(planner: Planner, config: Config, count: int) -> Config:
    """A configuration for `count` completions of one prompt, as many at once as fit."""
    one = {"rollout.problems_per_step": 1, "rollout.num_generations": count}
    search = _Search(planner, config.settled(one, "command line"))
    search.choose_rows()
    return search.config


def largest(planner: Planner, config: Config, name: str) -> int | None:
    """The largest value of a setting of `SOLVABLE` that fits the card; None if not even 1 does.

    Settings that are "auto" go as low as it takes, but for `num_generations` a whole group decodes
    at once: cut into pieces, a group of any size would fit.
    """
    key = f"rollout.{name}"
    window = getattr(planner.model_config, "max_position_embeddings", None) or 1 << 20
    most, least = MOST_GENERATIONS, least_value(config, name)
    if name == "max_completion_length":
        most = window - config.rollout.max_prompt_length
    if most < least:
        raise ConfigError(
            f"rollout.max_prompt_length = {config.rollout.max_prompt_length} leaves nothing of the "
            f"model's window of {window} tokens"
        )

    def share(value: int) -> float:
        tried = config.settled({key: value}, "solve")
        search = _Search(planner, tried)
        if name == "num_generations" and tried.memory.rollout_batch_size == AUTO:
            search.set("memory.rollout_batch_size", value)
        return search.smallest_share()

    return _last_below_one(share, least, most)


def least_value(config: Config, name: str) -> int:
    """The smallest legal value of a setting of `SOLVABLE`."""
    return 2 if name == "num_generations" else max(1, config.rollout.min_completion_length)


def _last_below_one(share: Callable[[int], float], low: int, high: int) -> int | None:
    """The largest of low..high, to about a hundredth, at which an ascending function is at most 1.

    Memory is all but linear in lengths, so the next value to try is where the line meets 1.
    """
    if (below := share(low)) > 1:
        return None
    if (above := share(high)) <= 1:
        return high
    slow = False
    while (step := _round(low)) < (width := high - low):
        line = (1 - below) / (above - below)
        # Not so close to either end that nothing is learnt; half-way where the line led astray.
        part = 0.5 if slow else min(max(line - 0.002, 0.05), 0.95)
        middle = max(int(low + width * part) // step * step, low + step)
        if middle >= high:
            break
        found = share(middle)
        if found <= 1:
            low, below = middle, found
        else:
            high, above = middle, found
        slow = not slow and high - low > width / 2
    return low


def _round(value: int) -> int:
    """A power of two of about a hundredth of a value, at least 1."""
    return 1 << max(value.bit_length() - 8, 0)


class _Search:
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
                "memory.logits_tile_tokens",
                "memory.logits_tile_vocab",
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
            if TILE_BYTES * rows * min(words, vocab) <= allowed:
                break

    # --- What fits, as a share of the room that there is: up to 1 does

    def rows_share(self) -> float:
        """Of the sampler's largest wave by itself."""
        return self._share(wave(self.config))

    def evaluation_share(self) -> float:
        """Of the largest wave of an evaluation by itself."""
        return self._share(evaluation(self.config))

    def update_share(self) -> float:
        """Of full micro-batches by themselves, on the card and on the host."""
        return self._share(fullest(self.config, self.planner.padded))

    def optimizer_share(self) -> float:
        """Of the optimizer's step."""
        return self._share_of(self.planner.phases.optimizer_alone(self.config))

    def _share(self, shapes) -> float:
        return self._share_of(self.planner.phases.alone(self.config, shapes))

    def _share_of(self, alone: Alone) -> float:
        card = self.planner.card
        room = self.room - alone.around_bytes
        if room <= 0:
            return float("inf")
        share = add_up(alone.events).peak_allocated / room
        if card.host_bytes is not None:
            share = max(share, alone.pinned_bytes / card.host_bytes)
        if share <= 1 and card.cuda:  # and still the allocator may not find a place for it
            settings = AllocatorSettings(card_memory=room)
            if simulate(alone.events, settings).oom is not None:
                return 1.0 + 1e-6
        return share

    def smallest_share(self) -> float:
        """Of the run at its smallest settings, with offloading where that is open."""
        self.set("memory.activation_offloading", self._can_offload())
        shares = [self.optimizer_share(), self.rows_share(), self.update_share()]
        if self.config.eval.every:
            shares.append(self.evaluation_share())
        return max(shares)

    def _can_offload(self) -> bool:
        return self.planner.card.cuda and value_of(self.config, "memory.gradient_checkpointing")

    # --- Choices, each with its reason

    def choose(self) -> None:
        """Give every open setting the largest value that fits by itself."""
        tiles = self.config.memory
        size = TILE_BYTES * tiles.logits_tile_tokens * tiles.logits_tile_vocab >> 20
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
            value = value_of(self.config, key)
            config = config.settled({key: value}, f"plan: {self.reasons[key]}")
        return config

    def choose_rows(self) -> str:
        """Of `memory.rollout_batch_size`; returns the reason."""
        r = self.config.rollout
        values = rollout_sizes(r.problems_per_step, r.num_generations)
        fits = self._grow("memory.rollout_batch_size", values, self.rows_share)
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
        fits = self._grow("eval.batch_size", values, self.evaluation_share)
        if not fits:
            return "not even one problem at a time fits"
        return "the most problems at once that fit, 64 at most"

    def _evaluation_sizes(self) -> list[int]:
        most = min(EVALUATED, self.config.eval.num_problems)
        return sorted({most, *(1 << i for i in range(7) if 1 << i < most)})

    def choose_update(self) -> dict[str, str]:
        """Of micro-batches, checkpointing and offloading; returns the reasons."""
        tokens, checkpointing = "memory.micro_batch_tokens", "memory.gradient_checkpointing"
        reasons = {
            "memory.activation_offloading": "not needed",
            checkpointing: "needed, full micro-batches do not fit without it",
        }
        if "memory.activation_offloading" in self.open and not self.planner.card.cuda:
            reasons["memory.activation_offloading"] = "the host is the device"
        values = self._budgets()
        if not self._grow(tokens, values, self.update_share):
            self.set("memory.activation_offloading", self._can_offload())
            if not self._grow(tokens, values, self.update_share):
                self.set("memory.activation_offloading", False)
                reasons[tokens] = "not even one completion fits"
                reasons[checkpointing] = "takes the least, and still nothing fits"
                return reasons
            if self.config.memory.activation_offloading:
                reasons["memory.activation_offloading"] = "does not fit without it"
        if self.config.memory.activation_offloading:
            reasons[checkpointing] = "what lies on the host are its layers' inputs"
        elif checkpointing in self.open:
            with_it = self.config
            self.set(checkpointing, False)
            enough = min(GOOD_TOKENS, with_it.memory.micro_batch_tokens)
            first = next((v for v in values if v >= enough), values[-1])
            self.set(tokens, first)
            if self.update_share() <= 1:
                self._grow(tokens, [v for v in values if v >= first], self.update_share)
                reasons[checkpointing] = "not needed, micro-batches fit without it"
            else:
                self.config = with_it
        reasons[tokens] = self._why_tokens(values)
        return reasons

    def _budgets(self) -> list[int]:
        r = self.config.rollout
        parts = [r.max_prompt_length + n * self.row for n in equal_parts(r.num_generations)]
        whole = [n * self.group for n in range(2, r.problems_per_step + 1)]
        return parts + [tokens for tokens in whole if tokens <= ENOUGH_TOKENS]

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
            "memory.micro_batch_tokens": self._budgets(),
            "memory.rollout_batch_size": rollout_sizes(r.problems_per_step, r.num_generations),
        }
        if self.config.eval.every:
            sizes["eval.batch_size"] = self._evaluation_sizes()
        own = {"rollout": "memory.rollout_batch_size", "evaluation": "eval.batch_size"}
        first = own.get(peak, "memory.micro_batch_tokens")
        keys = sorted(sizes, key=lambda key: key != first)
        for key in keys:
            less = [v for v in sizes[key] if v < value_of(self.config, key)]
            if key in self.open and less:
                self.set(key, less[-1])
                self.reasons[key] = "the most with which all phases together fit"
                return True
        return False


def rollout_sizes(problems: int, group: int) -> list[int]:
    """Completions at once that make sense: whole groups, or equal parts of one; ascending."""
    return equal_parts(group)[:-1] + [n * group for n in equal_parts(problems)]


def equal_parts(count: int) -> list[int]:
    """The sizes of parts that divide a number as evenly as can be; ascending."""
    return sorted({-(-count // parts) for parts in range(1, count + 1)})
