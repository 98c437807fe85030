"""How large a step is: the shapes that decide its memory, of the longest step and of one that was.

Shapes: numbers of tokens, as the model's trunk sees them (a completion of C tokens feeds C - 1).
"""

from __future__ import annotations

from typing import NamedTuple

from lowmem_grpo.config import Config
from lowmem_grpo.grpo.packing import PackedBatch, pack
from lowmem_grpo.rollout.types import Group, Rollout
from lowmem_grpo.tasks.base import Problem

__all__ = [
    "Shapes",
    "Tiles",
    "Wave",
    "budgets",
    "completions",
    "equal_parts",
    "evaluated",
    "evaluation",
    "fullest",
    "groups_of",
    "longest",
    "met",
    "packed",
    "pieces",
    "rollout_sizes",
    "tiles_of",
    "tokens",
    "wave",
]

Batch = tuple[tuple[int, tuple[int, ...]], ...]
"""((prompt tokens, (completion tokens, ...)), ...) of the groups in a micro-batch."""
MOST_BATCHES = 4
ENOUGH_TOKENS = 16384  # of a micro-batch
MOST_TOKENS = 1 << 62  # of a micro-batch whose shape is given


class Wave(NamedTuple):
    """Completions that are decoded together: prompts in tokens, rows of each, tokens to decode."""

    prompts: tuple[int, ...]
    rows: int
    tokens: int
    capacity: int
    """Tokens of a completion that there is room for."""


class Shapes(NamedTuple):
    """What a step holds at once. `evaluation` is None where the run has none; `scored` are batches
    of each reward model, None for the largest ones.
    """

    rollout: Wave
    batches: tuple[Batch, ...]
    evaluation: Wave | None = None
    scored: tuple[tuple, ...] | None = None


class Tiles(NamedTuple):
    """Tokens of an MLP's tiles (0: all at once); tokens and vocabulary entries of the head's."""

    mlp: int
    tokens: int
    vocab: int


def tiles_of(config: Config) -> Tiles:
    """The tiles of a run whose memory settings are numbers."""
    m = config.memory
    return Tiles(m.mlp_tile_tokens, m.logits_tile_tokens, m.logits_tile_vocab)


def longest(config: Config, padded: bool = False) -> Shapes:
    """The largest step that a run's settings allow; `padded`: see `fullest`."""
    held_out = evaluation(config) if config.eval.every else None
    return Shapes(wave(config), fullest(config, padded), held_out)


def met(rounds: list[list[Group]], batches: list[PackedBatch], config: Config) -> Shapes:
    """The shapes of a step that was taken, as far as they matter. `rounds`: the groups that were
    sampled together.
    """
    waves = [_wave_of(groups, config) for groups in rounds]
    largest = max(waves, key=lambda wave: sum(wave.prompts) + len(wave.prompts) * wave.rows)
    rollout = largest._replace(tokens=max(wave.tokens for wave in waves))
    heaviest = sorted(batches, key=lambda batch: (-batch.tokens, -len(batch.members)))
    return Shapes(rollout, tuple(_lengths(batch) for batch in heaviest[:MOST_BATCHES]))


def _wave_of(groups: list[Group], config: Config) -> Wave:
    size = config.memory.rollout_batch_size
    rows = min(len(groups[0].rollouts), size)
    together = max(1, min(size // rows, len(groups)))
    prompts = [len(group.prompt_ids) for group in groups]
    start = max(range(0, len(groups), together), key=lambda at: sum(prompts[at : at + together]))
    tokens = max(len(r.completion_ids) for group in groups for r in group.rollouts)
    capacity = config.rollout.max_completion_length
    return Wave(tuple(prompts[start : start + together]), rows, tokens, capacity)


def wave(config: Config) -> Wave:
    """The largest wave of the sampler, at its longest."""
    r, most = config.rollout, config.memory.rollout_batch_size
    rows = min(r.num_generations, most)
    problems = min(r.problems_per_step, most // rows)
    length = r.max_completion_length
    return Wave((r.max_prompt_length,) * problems, rows, length, length)


def evaluated(config: Config) -> int:
    """The completions of an evaluation."""
    return config.eval.num_problems * config.eval.num_generations


def evaluation(config: Config) -> Wave:
    """The largest wave of an evaluation."""
    e, r = config.eval, config.rollout
    length = e.max_completion_length or r.max_completion_length
    rows = min(e.num_generations, e.batch_size)
    problems = min(e.num_problems, e.batch_size // rows)
    return Wave((r.max_prompt_length,) * problems, rows, length, length)


def fullest(config: Config, padded: bool = False) -> tuple[Batch, ...]:
    """Two full micro-batches: with the longest completions, and with the most. With `padded`, for
    an attention that pads the completions of a group to its longest, also those with one long
    completion, with some, and otherwise short ones.

    Which one is heavier depends on the model: of the second, attention keeps a copy of the prompt's
    keys and values for each completion.
    """
    r, budget = config.rollout, config.memory.micro_batch_tokens
    prompt, longest = r.max_prompt_length, r.max_completion_length - 1  # in trunk tokens
    first, room = [], budget
    for _ in range(r.problems_per_step):
        if room <= prompt and first:
            break
        room -= prompt
        lengths = []
        for _ in range(r.num_generations):
            # A completion that fits nowhere is a micro-batch of its own, whatever its length.
            take = longest if not (lengths or first) else min(longest, room)
            if take <= 0 and lengths:
                break
            lengths.append(max(take, 0) + 1)
            room -= max(take, 0)
        first.append((prompt, tuple(lengths)))
    first = tuple(first)
    groups = min(r.problems_per_step, budget // (prompt + r.num_generations))
    take = min(longest, (budget - groups * prompt) // (groups * r.num_generations)) if groups else 0
    most = ((prompt, (take + 1,) * r.num_generations),) * groups
    # Twice, if they are the same: a second one meets the gradients that the first left.
    return first, most or first, *(_uneven(config) if padded else ())


def pieces(config: Config) -> int:
    """Micro-batches that a group of the longest completions is cut into: so often is its prompt
    computed in one pass over the step.
    """
    r, budget = config.rollout, config.memory.micro_batch_tokens
    longest = r.max_completion_length - 1  # in trunk tokens
    if longest == 0:
        return 1
    together = max(1, (budget - r.max_prompt_length) // longest)  # one at least, however long
    return -(-r.num_generations // together)


def _uneven(config: Config) -> list[Batch]:
    """Groups of which one completion, or a quarter, or half are as long as the budget lets them be,
    and the others of two tokens.
    """
    r = config.rollout
    room = config.memory.micro_batch_tokens - r.max_prompt_length
    found = {}
    for long in sorted({1, r.num_generations // 4, r.num_generations // 2} - {0}):
        short = r.num_generations - long
        length = min(r.max_completion_length - 1, (room - short) // long)
        if length > 1:
            found[((r.max_prompt_length, (length + 1,) * long + (2,) * short),)] = None
    return list(found)


def budgets(config: Config) -> list[int]:
    """Tokens of a micro-batch that make sense: equal parts of a group of the longest completions,
    or whole ones, of which more than `ENOUGH_TOKENS` gain nothing; ascending.
    """
    r = config.rollout
    row = r.max_completion_length - 1
    parts = [r.max_prompt_length + n * row for n in equal_parts(r.num_generations)]
    group = r.max_prompt_length + r.num_generations * row
    whole = [n * group for n in range(2, r.problems_per_step + 1)]
    return parts + [tokens for tokens in whole if tokens <= ENOUGH_TOKENS]


def rollout_sizes(problems: int, group: int) -> list[int]:
    """Completions at once that make sense: whole groups, or equal parts of one; ascending."""
    return equal_parts(group)[:-1] + [n * group for n in equal_parts(problems)]


def equal_parts(count: int) -> list[int]:
    """The sizes of parts that divide a number as evenly as can be; ascending."""
    return sorted({-(-count // parts) for parts in range(1, count + 1)})


def groups_of(batch: Batch) -> list[Group]:
    """Groups of these lengths, of tokens, log-probs and entropies that are all 0 and advantages
    that are 1.
    """
    problem = Problem("plan", ({"role": "user", "content": ""},), "")
    groups = []
    for prompt, lengths in batch:
        rollouts = [Rollout([0] * n, [0.0] * n, "length", "", entropies=[0.0] * n) for n in lengths]
        groups.append(Group(problem, [0] * prompt, rollouts, advantages=[1.0] * len(lengths)))
    return groups


def packed(batches: list[list[Group]], config: Config) -> list[PackedBatch]:
    """One micro-batch of each list of groups, whatever its size, with what a run has beside it."""
    threshold = 0.0 if config.grpo.masks_by_entropy else None
    old_policy, found = config.grpo.old_policy, []
    if old_policy == "base" and config.rollout.pool is None:
        old_policy = "sampler"  # the reference is yet to be asked
    for groups in batches:
        rollouts = [rollout for group in groups for rollout in group.rollouts]
        weights = [1.0 / len(rollouts)] * len(rollouts)
        if config.rollout.pool is not None:  # whose groups bring the reference's log-probs
            for rollout in rollouts:
                rollout.ref_logprobs = rollout.logprobs
        found += pack(
            groups,
            weights,
            max_tokens=MOST_TOKENS,
            entropy_threshold=threshold,
            old_policy=old_policy,
        )
    return found


def _lengths(batch: PackedBatch) -> Batch:
    return tuple(
        (prompt, tuple(length + 1 for length in lengths)) for prompt, lengths in batch.groups
    )


def tokens(batch: Batch) -> int:
    """Trunk tokens of a micro-batch."""
    return sum(prompt + sum(lengths) - len(lengths) for prompt, lengths in batch)


def completions(batch: Batch) -> int:
    """Completions in a micro-batch."""
    return sum(len(lengths) for _, lengths in batch)
