"""The batch of groups in hand: what is sampled for it, what its completions are worth, and what
goes into the update.

With dynamic sampling (DAPO, arXiv 2503.14476, section 3.2) groups that have no signal, since all
their completions have the same reward, make way for groups of the next problems, in at most
`rollout.dynamic_sampling` more rounds. What is left without a signal after the last one stays: a
batch has always as many groups. What the others cost is in the metrics.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from math import nan

import torch

from lowmem_grpo.config import Config
from lowmem_grpo.curriculum import chosen
from lowmem_grpo.grpo.advantages import gdpo_advantages, group_advantages, step_advantages
from lowmem_grpo.grpo.objective import entropy_threshold, rollout_weights
from lowmem_grpo.grpo.packing import PackedBatch, pack
from lowmem_grpo.pool import Pool
from lowmem_grpo.rewards import Reward, score
from lowmem_grpo.rollout.groups import sample_groups
from lowmem_grpo.rollout.steps import step_ends
from lowmem_grpo.rollout.types import Group
from lowmem_grpo.run.checkpoint import State
from lowmem_grpo.setup import sampling_of, texts_of
from lowmem_grpo.tasks import Task

__all__ = [
    "complete",
    "has_signal",
    "judge",
    "most_completions",
    "most_tokens",
    "pack_groups",
    "roll_out",
    "set_advantages",
    "trunk_tokens",
]


def complete(state: State, config: Config) -> bool:
    """Whether the groups in hand are scored, and none is to make way for another."""
    if state.groups is None or not all(group.rewards for group in state.groups):
        return False
    last_round = state.rounds > config.rollout.dynamic_sampling
    return last_round or all(has_signal(group, config) for group in state.groups)


def most_completions(config: Config) -> int:
    """The completions of a batch."""
    return config.rollout.problems_per_step * config.rollout.num_generations


def most_tokens(config: Config) -> int:
    """The tokens of a batch whose completions are all as long as they may be."""
    return most_completions(config) * config.rollout.max_completion_length


def trunk_tokens(groups: list[Group], config: Config) -> int:
    """The trunk tokens of all micro-batches of scored groups."""
    return sum(batch.tokens for batch in pack_groups(groups, config, old_policy="sampler"))


def roll_out(
    state: State,
    policy,
    task: Task,
    config: Config,
    pool: Pool | None,
    advance: Callable[[int], None],
) -> list[Group]:
    """Sample the groups that the batch in hand lacks, or take them from the `pool`, and put them
    there; returns what was sampled. A new batch is begun where there is none.
    """
    r = config.rollout
    if state.groups is None:
        fresh = {"iteration": 0, "rounds": 0, "groups_away": 0, "tokens_away": 0}
        before = replace(state, batch=state.batch + 1, groups=[], **fresh)
    else:
        before = state
    kept = [group for group in before.groups if has_signal(group, config)]
    away = [group for group in before.groups if not has_signal(group, config)]
    count = r.problems_per_step - len(kept)
    ahead = range(before.problems, before.problems + count * r.curriculum)
    if pool is not None:
        candidates = [pool.group(index) for index in ahead]
        problems = [group.problem for group in candidates]
    else:
        problems = [task.train_problem(index) for index in ahead]
    places = chosen(problems, count, before.rates, r.curriculum_field)
    if pool is not None:
        new = [candidates[place] for place in places]
    else:
        new = sample_groups(
            policy,
            [problems[place] for place in places],
            num_generations=r.num_generations,
            sampling=sampling_of(config, "rollout"),
            seed=config.run.seed,
            step=before.batch - 1,
            first_place=before.groups_away + len(before.groups),
            max_prompt_length=r.max_prompt_length,
            chat_template_kwargs=config.model.chat_template_kwargs,
            batch_size=config.memory.rollout_batch_size,
            adapters=config.grpo.old_policy != "base",
            texts=texts_of(config, policy.tokenizer),
            advance=advance,
        )
    # All at the end: a run that fails in between is saved with the batch that it had.
    after = replace(
        before,
        groups=kept + new,
        problems=ahead.stop,
        rounds=before.rounds + 1,
        groups_away=before.groups_away + len(away),
        tokens_away=before.tokens_away
        + sum(len(x.completion_ids) for group in away for x in group.rollouts),
    )
    vars(state).update(vars(after))
    return [] if pool is not None else new


def has_signal(group: Group, config: Config) -> bool:
    """Whether its completions differ in what the advantages are made of."""
    if config.grpo.multi_objective_aggregation == "normalize_then_sum":
        each = list(group.rewards_by_name.values())
        weights = config.rewards.weights or [1.0] * len(each)
        counted = [values for values, weight in zip(each, weights, strict=True) if weight]
        return any(len(set(_there(group, values))) > 1 for values in counted)
    if len({value for steps in _steps(group) for value in steps}) > 1:
        return True
    return len(set(_there(group, group.outcomes or group.rewards))) > 1


def judge(state: State, rewards: list[Reward], config: Config, tokenizer) -> None:
    """Score the groups in hand that have no rewards yet. Raises RewardError as configured.
    `tokenizer`: tells where steps end, where there are any.
    """
    groups = [group for group in state.groups if not group.rewards]
    texts = [rollout.text for group in groups for rollout in group.rollouts]
    ids = [rollout.completion_ids for group in groups for rollout in group.rollouts]
    problems = [group.problem for group in groups for _ in group.rollouts]
    on_error = config.rewards.on_error
    separator, stop = config.rewards.step_separator, on_error == "stop"
    how = {"stop_on_failure": stop, "check_first": config.rewards.check_first_step}
    scores = score(rewards, texts, problems, ids, **how, separator=separator)
    dropped = scores.failed if on_error == "drop" else set()
    size = config.rollout.num_generations
    for i, group in enumerate(groups):
        places = range(i * size, (i + 1) * size)
        group.rewards_by_name = {
            name: [values[place] for place in places] for name, values in scores.by_name.items()
        }
        group.failures = {
            name: dict(Counter(failed[place].reason for place in places if place in failed))
            for name, failed in scores.failures.items()
        }
        group.dropped = [place in dropped for place in places]
        if separator:
            decoded = texts_of(config, tokenizer)
            group.step_ends = [
                step_ends(decoded, rollout.completion_ids, rollout.text, separator)
                for rollout in group.rollouts
            ]
            group.step_rewards = [scores.steps[place] for place in places]
            group.outcomes = [scores.outcomes[place] for place in places]
        group.rewards = [scores.total[place] for place in places]
    if config.rollout.curriculum > 1:
        state.rates.learn(groups, config.rollout.curriculum_field)


def set_advantages(groups: list[Group], rewards: list[Reward], config: Config) -> None:
    """Write the advantages of scored groups into them as configured; 0 for what was dropped.

    With `grpo.use_kl_in_reward`, where the reference has been asked, they are of rewards less
    `grpo.beta` times each completion's KL from it; the groups' rewards stay what they are.
    """

    def rewards_of(values_of: Callable[[Group], list[float | None]]) -> torch.Tensor:
        found = [[nan if x is None else x for x in values_of(group)] for group in groups]
        dropped = torch.tensor([group.dropped for group in groups], dtype=torch.bool)
        return torch.tensor(found, dtype=torch.float64).masked_fill(dropped, nan)

    if config.grpo.multi_objective_aggregation == "normalize_then_sum":
        rewards_FBG = torch.stack(
            [
                rewards_of(lambda group, r=reward: group.rewards_by_name[r.name])
                for reward in rewards
            ]
        )
        weights_F = torch.tensor([reward.weight for reward in rewards], dtype=torch.float64)
        found = gdpo_advantages(rewards_FBG, weights_F)
    else:
        rewards_BG = rewards_of(lambda group: _totals(group, config))
        found = group_advantages(rewards_BG, config.grpo.scale_rewards, config.grpo.baseline)
    for group, values in zip(groups, found.tolist(), strict=True):
        group.advantages = values
        group.step_advantages = _step_advantages(group)


def _step_advantages(group: Group) -> list[list[float]]:
    rewards = _steps(group)
    if not any(rewards):
        return []
    longest = max(map(len, rewards))
    rewards_GS = torch.tensor(
        [[*steps, *[nan] * (longest - len(steps))] for steps in rewards], dtype=torch.float64
    )
    found = step_advantages(rewards_GS).tolist()
    # Of a completion without rewards for steps, which still has its tokens.
    lengths = map(len, group.step_ends)
    return [
        row[:count] if steps else [0.0] * count
        for row, steps, count in zip(found, rewards, lengths, strict=True)
    ]


def _steps(group: Group) -> list[list[float]]:
    """The rewards for steps of the rollouts that count."""
    pairs = zip(group.step_rewards, group.dropped, strict=False)
    return [[] if gone else steps for steps, gone in pairs]


def pack_groups(
    groups: list[Group], config: Config, *, old_policy: str | None = None
) -> list[PackedBatch]:
    """The micro-batches of scored groups as configured. `old_policy`: in place of the configured
    one, whose log-probs may not be there yet.
    """
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    dropped = [gone for group in groups for gone in group.dropped]
    kept = [rollout for rollout, gone in zip(rollouts, dropped, strict=True) if not gone]
    cut = [rollout.finish_reason == "length" for rollout in kept]
    found = rollout_weights(
        [len(rollout.completion_ids) for rollout in kept],
        config.grpo.loss_type,
        config.rollout.max_completion_length,
        cut if config.grpo.mask_truncated_completions else (),
    )
    remaining = iter(found)
    weights = [0.0 if gone else next(remaining) for gone in dropped]
    threshold = None
    if config.grpo.masks_by_entropy:
        counted = zip(rollouts, weights, strict=True)
        entropies = [e for rollout, weight in counted if weight for e in rollout.entropies]
        quantile = config.grpo.top_entropy_quantile
        threshold = entropy_threshold(entropies, quantile) if entropies else None
    return pack(
        groups,
        weights,
        entropy_threshold=threshold,
        old_policy=old_policy or config.grpo.old_policy,
        max_tokens=config.memory.micro_batch_tokens,
        min_completion_length=config.rollout.min_completion_length,
        # With a KL penalty, or an entropy bonus, every rollout reaches the gradient, whatever its
        # advantage.
        skip_zero_advantage=config.grpo.beta == 0 == config.grpo.entropy_coef,
    )


def _totals(group: Group, config: Config) -> list[float]:
    rewards = group.outcomes or group.rewards
    if not (config.grpo.use_kl_in_reward and group.has_reference):
        return rewards
    return [
        reward if rollout.ref_logprobs is None else reward - config.grpo.beta * rollout.summed_kl
        for reward, rollout in zip(rewards, group.rollouts, strict=True)
    ]


def _there(group: Group, values: list[float | None]) -> list[float]:
    pairs = zip(values, group.dropped, strict=True)
    return [value for value, gone in pairs if value is not None and not gone]
