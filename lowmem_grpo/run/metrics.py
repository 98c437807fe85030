"""One record a step: what is in it, and where it goes."""

from collections import Counter
from collections.abc import Sequence
from math import expm1
from statistics import fmean, stdev
from typing import Any

from lowmem_grpo.errors import ConfigError
from lowmem_grpo.grpo.update import UpdateStats
from lowmem_grpo.rollout.types import Group
from lowmem_grpo.run.checkpoint import State
from lowmem_grpo.run.directory import RunDirectory
from lowmem_grpo.run.meter import Meter
from lowmem_grpo.sections import RunConfig

__all__ = ["MetricsWriter", "step_record"]


def step_record(
    state: State,
    *,
    stats: UpdateStats,
    trained: int,
    grad_norm: float,
    adapter_change: float,
    learning_rate: float,
    meter: Meter,
    base_samples: bool = False,
    from_pool: bool = False,
    out_of_memory: Sequence[dict[str, Any]] = (),
) -> dict[str, Any]:
    """The record of one optimizer step, which was taken from `state` (interfaces: `metrics.jsonl`).
    `trained`: rollouts that took part.

    Means over tokens are over the tokens that took part in the update. `sampler_kl` is taken in the
    first iteration on a batch, before the update; later the policy has moved, and it is None. None
    also stands for what was not computed: `kl` without a reference, token means when no rollout
    took part. A KL that is taken from rewards is in the advantages alone, and in none of these.
    `constant_rewards`: functions that gave every completion one value.
    `base_samples`: the base is the old policy; `from_pool`: and sampled before. Nothing but
    `groups_replaced` and `tokens_replaced` counts groups that made way for others, or were
    discarded. `discarded_batches`: since the step before; `out_of_memory`: see retry.py.
    `reward_failures`: scores that failed, by function and reason; means are without them, and
    `reward_mean` and `reward_std` without the `dropped_rollouts` (unless that leaves none).
    `seconds["save"]` is of the states since the record before: a record is written ahead of its
    step's checkpoint.
    """
    groups, iteration = state.groups, state.iteration
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    kept = [group.counted_rewards for group in groups]
    kept = kept if any(kept) else [group.rewards for group in groups]
    by_name = {
        name: [x for group in groups for x in group.rewards_by_name[name] if x is not None]
        for name in groups[0].rewards_by_name
    }
    lengths = [len(rollout.completion_ids) for rollout in rollouts]
    flat = sum(_flat(group) for group in groups)
    first = iteration == 0
    generated = first and not from_pool
    return {
        "step": state.step + 1,
        "iteration": iteration,
        "reward_mean": fmean(reward for rewards in kept for reward in rewards),
        "reward_std": fmean([stdev(rewards) for rewards in kept if len(rewards) > 1] or [0.0]),
        "rewards": {name: fmean(x) if x else None for name, x in by_name.items()},
        "constant_rewards": [name for name, values in by_name.items() if len(set(values)) == 1],
        "rollouts": len(rollouts),
        "reward_failures": _failures(groups),
        "dropped_rollouts": sum(sum(group.dropped) for group in groups),
        "frac_reward_zero_std": flat / len(groups),
        "loss": stats.loss,
        "kl": stats.mean("kl"),
        "entropy": stats.mean("entropy"),
        "clip_fraction_low": stats.mean("clip_low"),
        "clip_fraction_high": stats.mean("clip_high"),
        "grad_norm": grad_norm,
        # Of float16, what the step began with; None in another dtype.
        "loss_scale": state.scaler.get("scale"),
        "learning_rate": learning_rate,
        "adapter_change": adapter_change,
        "sampler_kl": _sampler_kl(groups, stats, base_samples) if first else None,
        "completion_length_mean": fmean(lengths),
        "completion_truncated_fraction": fmean(r.finish_reason == "length" for r in rollouts),
        "tokens_generated": sum(lengths) + state.tokens_away if generated else 0,
        "groups_replaced": state.groups_away if first else 0,
        "tokens_replaced": state.tokens_away if first else 0,
        "tokens_trained": stats.tokens_scored,
        "tokens_trunk": stats.tokens_trunk,
        "skipped_rollouts": len(rollouts) - trained,
        "discarded_batches": state.discarded,
        "out_of_memory": list(out_of_memory),
        "seconds": {name: round(value, 4) for name, value in meter.seconds.items()},
        "memory": meter.memory,
    }


def _sampler_kl(groups: list[Group], stats: UpdateStats, base_samples: bool) -> float | None:
    """k3 of sampler against trainer. Where the base samples, the trainer's numbers are the
    reference's: the policy is another one.
    """
    if not base_samples:
        return stats.mean("sampler_kl")
    asked = [x for group in groups for x in group.rollouts if x.ref_logprobs is not None]
    apart = [
        expm1(trainer - sampler) - (trainer - sampler)
        for rollout in asked
        for sampler, trainer in zip(rollout.logprobs, rollout.ref_logprobs, strict=True)
    ]
    return fmean(apart) if apart else None


def _failures(groups: list[Group]) -> dict[str, dict[str, int]]:
    found: dict[str, Counter[str]] = {}
    for group in groups:
        for name, reasons in group.failures.items():
            found.setdefault(name, Counter()).update(reasons)
    return {name: dict(reasons) for name, reasons in found.items() if reasons}


def _flat(group: Group) -> bool:
    """No advantages, or none but those of a KL among the rewards, which differs in any case."""
    if any(map(any, group.step_advantages)):
        return False
    each = group.rewards_by_name.values()
    constant = bool(each) and all(len(set(values)) == 1 for values in each)
    return constant or not any(group.advantages)


class MetricsWriter:
    """Appends records to the run's files; a context manager."""

    def __init__(self, run: RunDirectory, settings: RunConfig):
        self.run = run
        self.log_rollouts = settings.log_rollouts
        self.events = None
        if settings.tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError as error:
                raise ConfigError(
                    "run.tensorboard = true needs TensorBoard: pip install 'lowmem-grpo[report]'"
                ) from error
            self.events = SummaryWriter(str(run / "tensorboard"))

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(self, *_: object) -> None:
        if self.events is not None:
            self.events.close()

    def write(self, record: dict[str, Any]) -> None:
        """One step's record."""
        self.run.append("metrics.jsonl", record)
        self._scalars("", record, record["step"])

    def write_rollouts(self, step: int, groups: list[Group]) -> None:
        """The first `log_rollouts` rollouts of a step, taken from all groups in turn."""
        turns = [
            (group, i) for i in range(max(len(g.rollouts) for g in groups)) for group in groups
        ]
        records = []
        for group, i in turns[: self.log_rollouts]:
            rollout = group.rollouts[i]
            records.append(
                {
                    "step": step,
                    "problem": group.problem.id,
                    "prompt": list(group.problem.messages),
                    "answer": group.problem.answer,
                    "completion": rollout.text,
                    "tokens": len(rollout.completion_ids),
                    "finish_reason": rollout.finish_reason,
                    "reward": group.rewards[i],
                    "rewards": {name: values[i] for name, values in group.rewards_by_name.items()},
                    "advantage": group.advantages[i],
                    **({"step_advantages": steps[i]} if (steps := group.step_advantages) else {}),
                }
            )
        self.run.append("rollouts.jsonl", *records)

    def write_evaluation(self, step: int, summary: dict[str, Any]) -> None:
        """An evaluation during training."""
        self.run.append("eval.jsonl", {"step": step, **summary})
        self._scalars("eval/", summary, step)

    def _scalars(self, prefix: str, values: dict[str, Any], step: int) -> None:
        if self.events is None:
            return
        for name, value in values.items():
            if isinstance(value, dict):
                self._scalars(f"{prefix}{name}/", value, step)
            elif isinstance(value, (int, float)) and name != "step":
                self.events.add_scalar(prefix + name, value, step)
