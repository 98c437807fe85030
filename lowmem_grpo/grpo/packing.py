"""Groups of rollouts -> packed micro-batches.

A micro-batch holds whole or partial groups end to end, [prompt, c1, c2, ...] for each, and at most
`max_tokens` trunk tokens (one completion that is longer is a micro-batch of its own). There is no
padding, and masks come from lengths, never from token ids: an end-of-sequence token that equals the
padding token is trained like any other.

The last token of a completion is scored but predicts nothing, so it does not go through the trunk:
a completion of C tokens costs C - 1. Its first token is predicted by the prompt's last position,
the others by their predecessors.

Shapes: T trunk tokens, N scored tokens.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch

from lowmem_grpo.rollout.types import Group, Rollout

__all__ = ["PackedBatch", "pack", "store_old", "store_reference"]


@dataclass(frozen=True)
class PackedBatch:
    """One micro-batch. Token tensors are int64 [T]; scored ones [N], numbers there float32.

    `groups`: ((prompt tokens, (completion trunk tokens, ...)), ...), for the attention layout.
    `rows_N`: the trunk row whose hidden state predicts each scored token. `no_end_N`: the sampler
    was not allowed to end here. `kept_N` (bool): the tokens that have a surrogate, None for all.
    `sampler_logprobs_N`: where `old_logprobs_N` are the trainer's; with `old_is_known` false they
    are to be those of the update itself. `members`: the rollouts in order of their scored tokens.
    """

    input_ids_T: torch.Tensor
    positions_T: torch.Tensor
    groups: tuple[tuple[int, tuple[int, ...]], ...]
    rows_N: torch.Tensor
    targets_N: torch.Tensor
    old_logprobs_N: torch.Tensor
    advantages_N: torch.Tensor
    weights_N: torch.Tensor
    no_end_N: torch.Tensor
    ref_logprobs_N: torch.Tensor | None
    kept_N: torch.Tensor | None
    sampler_logprobs_N: torch.Tensor | None
    old_is_known: bool
    members: tuple[Rollout, ...]

    @property
    def tokens(self) -> int:
        return self.input_ids_T.numel()

    @property
    def kept(self) -> int:
        """Scored tokens that have a surrogate."""
        return self.targets_N.numel() if self.kept_N is None else int(sum(self.kept_N.tolist()))

    @property
    def lengths(self) -> tuple[int, ...]:
        """Scored tokens of each rollout."""
        return tuple(len(rollout.completion_ids) for rollout in self.members)

    def to(self, device) -> "PackedBatch":
        """The same batch with its tensors on `device`."""
        moved = {
            name: value.to(device, non_blocking=True)
            for name, value in vars(self).items()
            if isinstance(value, torch.Tensor)
        }
        return replace(self, **moved)


@dataclass(frozen=True)
class _Part:
    """Some rollouts of one group, with what each carries: (rollout, its tokens' advantages,
    weight).
    """

    prompt_ids: list[int]
    rollouts: list[tuple[Rollout, list[float], float]]


def pack(
    groups: list[Group],
    weights: list[float],
    *,
    max_tokens: int,
    min_completion_length: int = 0,
    skip_zero_advantage: bool = False,
    entropy_threshold: float | None = None,
    old_policy: str = "sampler",
) -> list[PackedBatch]:
    """Micro-batches (on the CPU) of scored groups; `weights`: one for each rollout, in order.

    Rollouts of weight 0 are left out, and with `skip_zero_advantage` those whose advantage is zero:
    right when beta is 0, since then nothing else of theirs reaches the gradient. With an
    `entropy_threshold`, tokens that were drawn with less entropy have no surrogate. `old_policy`:
    whose log-probs ratios start from: the "sampler"'s, those of the "base" where the reference has
    been asked, or the "trainer"'s, which are not there before the first update. Rollouts keep their
    order; a prompt is repeated only where its group is cut. Raises ValueError where a rollout lacks
    log-probs or entropies that it has to have, or has another number of them than tokens.
    """
    lay = partial(
        _lay,
        min_completion_length=min_completion_length,
        entropy_threshold=entropy_threshold,
        old_policy=old_policy,
    )
    batches: list[PackedBatch] = []
    current: list[_Part] = []
    used = 0
    remaining = iter(weights)
    for group in groups:
        each = [group.token_advantages(place) for place in range(len(group.rollouts))]
        scored = zip(group.rollouts, each, remaining, strict=False)
        kept = [x for x in scored if x[2] and not (skip_zero_advantage and not any(x[1]))]
        prompt = len(group.prompt_ids)
        whole = prompt + sum(len(rollout.completion_ids) - 1 for rollout, _, _ in kept)
        if kept and used and used + whole > max_tokens:
            batches.append(lay(current))
            current, used = [], 0
        part = _Part(group.prompt_ids, [])
        for member in kept:
            cost = len(member[0].completion_ids) - 1
            if part.rollouts and used + cost > max_tokens:  # only a group that fits nowhere is cut
                batches.append(lay([part]))
                used, part = 0, _Part(group.prompt_ids, [])
            used += cost if part.rollouts else prompt + cost
            part.rollouts.append(member)
        if part.rollouts:
            current.append(part)
    if current:
        batches.append(lay(current))
    return batches


def store_reference(batch: PackedBatch, ref_logprobs_N: torch.Tensor) -> None:
    """Write the reference's log-probs of a batch into its rollouts, for the next packing."""
    for rollout, values in _by_member(batch, ref_logprobs_N):
        rollout.ref_logprobs = values


def store_old(batch: PackedBatch, old_logprobs_N: torch.Tensor) -> None:
    """Likewise the trainer's log-probs, of the policy that sampled."""
    for rollout, values in _by_member(batch, old_logprobs_N):
        rollout.old_logprobs = values


def _by_member(batch: PackedBatch, values_N: torch.Tensor) -> Iterator[tuple[Rollout, list[float]]]:
    values, at = values_N.tolist(), 0
    for rollout in batch.members:
        end = at + len(rollout.completion_ids)
        yield rollout, values[at:end]
        at = end


def _lay(
    parts: list[_Part],
    min_completion_length: int,
    entropy_threshold: float | None,
    old_policy: str,
) -> PackedBatch:
    ids, positions, rows, targets, old, reference, sampler = [], [], [], [], [], [], []
    advantages, weights, no_end, kept, layout, members = [], [], [], [], [], []
    # Those of one rollout are there where those of any are: half of them would be a defect.
    all_rollouts = [rollout for part in parts for rollout, _, _ in part.rollouts]
    has_reference = old_policy == "base" or any(r.ref_logprobs is not None for r in all_rollouts)
    has_old = old_policy == "trainer" and any(r.old_logprobs is not None for r in all_rollouts)
    for part in parts:
        prompt = len(part.prompt_ids)
        last_of_prompt = len(ids) + prompt - 1
        ids += part.prompt_ids
        positions += range(prompt)
        for rollout, own_advantages, weight in part.rollouts:
            tokens = rollout.completion_ids
            own = len(ids)
            ids += tokens[:-1]
            positions += range(prompt, prompt + len(tokens) - 1)
            rows += [last_of_prompt, *range(own, own + len(tokens) - 1)]
            targets += tokens
            sampler += _numbers("sampler's log-probs", rollout.logprobs, tokens)
            if has_reference:
                reference += _numbers("reference's log-probs", rollout.ref_logprobs, tokens)
            if has_old:
                old += _numbers("trainer's log-probs", rollout.old_logprobs, tokens)
            advantages += own_advantages
            weights += [weight] * len(tokens)
            no_end += [t < min_completion_length for t in range(len(tokens))]
            if entropy_threshold is not None:
                entropies = _numbers("sampler's entropies", rollout.entropies, tokens)
                kept += [entropy >= entropy_threshold for entropy in entropies]
            members.append(rollout)
        layout.append((prompt, tuple(len(r.completion_ids) - 1 for r, _, _ in part.rollouts)))
    # With the trainer as old policy, those of the sampler stand in before the first update.
    of_old = reference if old_policy == "base" else old if has_old else sampler
    return PackedBatch(
        input_ids_T=torch.tensor(ids),
        positions_T=torch.tensor(positions),
        groups=tuple(layout),
        rows_N=torch.tensor(rows),
        targets_N=torch.tensor(targets),
        old_logprobs_N=torch.tensor(of_old, dtype=torch.float32),
        sampler_logprobs_N=(
            torch.tensor(sampler, dtype=torch.float32) if old_policy == "trainer" else None
        ),
        old_is_known=old_policy != "trainer" or has_old,
        advantages_N=torch.tensor(advantages, dtype=torch.float32),
        weights_N=torch.tensor(weights, dtype=torch.float32),
        no_end_N=torch.tensor(no_end),
        ref_logprobs_N=torch.tensor(reference, dtype=torch.float32) if has_reference else None,
        kept_N=torch.tensor(kept) if entropy_threshold is not None else None,
        members=tuple(members),
    )


def _numbers(name: str, values: list[float] | None, tokens: list[int]) -> list[float]:
    found = 0 if values is None else len(values)
    if found != len(tokens):
        raise ValueError(f"a completion of {len(tokens)} tokens has {found} of the {name}")
    return values
