"""One optimizer step: micro-batches, each with its own backward, then clipping and AdamW.

Nothing of one micro-batch is alive when the next begins; what adds up is the adapters' gradient.
The weights of the tokens carry the step's denominators, so the sum of the micro-batches' gradients
is the gradient of the step.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from math import isfinite
from typing import NamedTuple

import torch

from lowmem_grpo.errors import NonFiniteError
from lowmem_grpo.grpo.objective import Objective, ObjectiveInputs
from lowmem_grpo.grpo.packing import PackedBatch, store_old, store_reference

__all__ = [
    "Scored",
    "Scoring",
    "UpdateStats",
    "accumulate",
    "apply_update",
    "score_reference",
]

PART_BYTES = 16 << 20  # of the adapters, in one call of the optimizer


class Scored(NamedTuple):
    """Of each scored token, float32 [N]: log-probability, entropy, and where it was asked for the
    exact divergence from the reference.
    """

    logprobs_N: torch.Tensor
    entropies_N: torch.Tensor
    divergences_N: torch.Tensor | None = None


@dataclass(frozen=True)
class Scoring:
    """How log-probs are taken: at the sampler's temperature, no `end_ids` where `no_end_N`;
    entropies with their gradient, or without.
    """

    temperature: float
    end_ids: tuple[int, ...]
    entropy_gradient: bool = False

    def hidden(self, policy, batch: PackedBatch) -> torch.Tensor:
        """Last hidden states [N, D] that predict the scored tokens, of the policy in its role."""
        hidden_TD = policy.hidden(batch.input_ids_T, batch.positions_T, policy.layout(batch.groups))
        return hidden_TD.index_select(0, batch.rows_N)

    def __call__(self, policy, batch: PackedBatch, reference_ND=None) -> Scored:
        """Scores of a batch on the policy's device, in its role. `reference_ND`: what `hidden` gave
        of the reference, for divergences.
        """
        hidden_ND = self.hidden(policy, batch)
        return self.score(policy, hidden_ND, batch.targets_N, batch.no_end_N, reference_ND)

    def score(self, policy, hidden_ND, targets_N, no_end_N, reference_ND=None) -> Scored:
        """The head's part of it."""
        how = {
            "temperature": self.temperature,
            "forbidden_ids": self.end_ids,
            "forbidden_N": no_end_N,
        }
        scores = policy.score(hidden_ND, targets_N, entropy_gradient=self.entropy_gradient, **how)
        if reference_ND is None:
            return Scored(*scores)
        return Scored(*scores, policy.divergence(hidden_ND, reference_ND, **how))


@dataclass
class UpdateStats:
    """Sums over the micro-batches of one update."""

    loss: float = 0.0
    entropy: float = 0.0
    tokens_scored: int = 0
    tokens_trunk: int = 0
    sums: dict[str, float] = field(default_factory=dict)

    def mean(self, name: str) -> float | None:
        """A stat's mean over scored tokens; None where it was not taken."""
        return (
            self.sums[name] / self.tokens_scored
            if name in self.sums and self.tokens_scored
            else None
        )


def score_reference(
    policy,
    batches: list[PackedBatch],
    scoring: Scoring,
    advance: Callable[[int], None] = lambda tokens: None,
) -> int:
    """Write the reference's log-probs into the rollouts; returns the trunk tokens it took. Raises
    NonFiniteError, with nothing written.
    """
    found = []
    for batch in batches:
        with policy.as_reference():
            logprobs_N = scoring(policy, batch.to(policy.device)).logprobs_N
        found.append(logprobs_N.cpu())
        advance(batch.tokens)
    # All at the end: a run that fails half-way is saved, and must not hold half of the numbers.
    for place, logprobs_N in enumerate(found, 1):
        if not isfinite(sum(logprobs_N.tolist())):
            raise NonFiniteError(_where("the reference's log-probs are", place, batches))
    for batch, logprobs_N in zip(batches, found, strict=True):
        store_reference(batch, logprobs_N)
    return sum(batch.tokens for batch in batches)


def accumulate(
    policy,
    batches: list[PackedBatch],
    scoring: Scoring,
    objective: Objective,
    *,
    checkpointing: bool,
    offloading: bool = False,
    overlapping: bool = False,
    loss_scale: Callable[[torch.Tensor], torch.Tensor] | None = None,
    advance: Callable[[int], None] = lambda tokens: None,
) -> UpdateStats:
    """Add the gradient of the step's loss to the adapters, one micro-batch after another.

    Where the objective's divergence is exact, the reference's trunk goes over each micro-batch
    before the policy's: what is needed of it are hidden states, and those of a phase before would
    have to lie on the host, and in checkpoints. `tokens_trunk` counts the policy's alone. Where
    the trainer is the old policy, the log-probs of the first update on a batch are kept in its
    rollouts. Raises NonFiniteError after the micro-batch whose log-probs or loss are not finite.
    """
    stats, found = UpdateStats(), []
    scoring = replace(scoring, entropy_gradient=objective.entropy_coef != 0.0)
    tokens = sum(batch.kept for batch in batches)
    for place, cpu_batch in enumerate(batches, 1):
        batch, reference_ND = cpu_batch.to(policy.device), None
        if objective.exact:
            with policy.as_reference():
                reference_ND = scoring.hidden(policy, batch)
        with policy.as_trainable(
            checkpointing=checkpointing, offloading=offloading, overlapping=overlapping
        ):
            scored = scoring(policy, batch, reference_ND)
            del reference_ND
            old_N = batch.old_logprobs_N if batch.old_is_known else scored.logprobs_N.detach()
            inputs = ObjectiveInputs(
                logprobs_N=scored.logprobs_N,
                old_logprobs_N=old_N,
                sampler_logprobs_N=batch.sampler_logprobs_N,
                advantages_N=batch.advantages_N,
                weights_N=batch.weights_N,
                ref_logprobs_N=batch.ref_logprobs_N,
                lengths=batch.lengths,
                entropies_N=scored.entropies_N,
                tokens=tokens,
                divergences_N=scored.divergences_N,
                kept_N=batch.kept_N,
            )
            loss, sums = objective(inputs)
            (loss if loss_scale is None else loss_scale(loss)).backward()
        if not batch.old_is_known:
            found.append((cpu_batch, old_N.cpu()))
        sums["loss"], sums["entropy"] = loss.detach(), scored.entropies_N.detach().sum()
        sums["finite"] = scored.logprobs_N.detach().isfinite().all()
        # One transfer for all the numbers of a micro-batch: each waits for the device.
        values = dict(
            zip(sums, torch.stack([x.float() for x in sums.values()]).tolist(), strict=True)
        )
        if not values.pop("finite"):
            raise NonFiniteError(_where("the policy's log-probs are", place, batches))
        for name, value in values.items():
            if not isfinite(value):
                raise NonFiniteError(_where(f"the {name} is", place, batches))
        for name, value in values.items():
            stats.sums[name] = stats.sums.get(name, 0.0) + value
        stats.tokens_scored += batch.targets_N.numel()
        stats.tokens_trunk += batch.tokens
        advance(batch.tokens)
    for batch, old_N in found:  # all at the end, as of the reference
        store_old(batch, old_N)
    stats.loss = stats.sums.pop("loss", 0.0)
    return stats


def _where(what: str, place: int, batches: list[PackedBatch]) -> str:
    return f"{what} NaN or infinite in micro-batch {place} of {len(batches)}"


def apply_update(
    parameters: list[torch.nn.Parameter],
    optimizer,
    *,
    learning_rate: float,
    max_grad_norm: float,
    scaler=None,
) -> tuple[float, float]:
    """Clip, step, clear. Returns (gradient norm before clipping, norm of update / of adapters).

    Where no rollout took part the gradient is zero, and AdamW still takes its step of momentum:
    that is what the unabridged computation would have done. With a gradient scaler (float16), a
    step whose scaled gradients overflowed is left out and the scale lowered: the norm is then
    infinite or NaN and the change 0; see loss_scale.py.
    Raises NonFiniteError, with the adapters as they were, when the gradient norm is not finite for
    another reason.
    """
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    if scaler is not None:
        scaler.scale(parameters[0].new_zeros(()))  # makes its state, where no loss has done so yet
        scaler.unscale_(optimizer)
    limit = max_grad_norm if max_grad_norm > 0 else float("inf")
    norm = torch.nn.utils.clip_grad_norm_(parameters, limit, foreach=True).item()
    scale = 0.0 if scaler is None else scaler.get_scale()
    if scaler is not None:
        scaler.update()
    if not norm < float("inf"):
        optimizer.zero_grad()
        if scaler is not None and scaler.get_scale() < scale:
            return norm, 0.0
        raise NonFiniteError(f"the gradient norm is {norm}")
    change = _step(parameters, optimizer)
    size = torch.nn.utils.get_total_norm([p.detach() for p in parameters], foreach=True).item()
    return norm, change / size if size else 0.0


def _step(parameters: list[torch.nn.Parameter], optimizer) -> float:
    """Take the optimizer's step and drop the gradients; returns the norm of the update.

    A part of the adapters after the other, as they are to the optimizer anyway: what it allocates,
    and the copy of what they were before, are as large as a part.
    """
    gradients = [parameter.grad for parameter in parameters]
    for parameter in parameters:
        parameter.grad = None
    norms: list[torch.Tensor] = []
    for part in _parts(parameters):
        for parameter in part:
            parameter.grad = gradients.pop(0)
        before = [parameter.detach().clone() for parameter in part]
        optimizer.step()
        for parameter in part:
            parameter.grad = None
        torch._foreach_sub_(before, [parameter.detach() for parameter in part])
        norms += torch._foreach_norm(before)
        del before  # before the next part's is made
    return torch.linalg.vector_norm(torch.stack(norms)).item()


def _parts(parameters: list[torch.nn.Parameter]) -> Iterator[list[torch.nn.Parameter]]:
    """Parameters in their order, some at a time: `PART_BYTES` of them at most, or one."""
    part: list[torch.nn.Parameter] = []
    for parameter in parameters:
        if part and sum(p.nbytes for p in part) + parameter.nbytes > PART_BYTES:
            yield part
            part = []
        part.append(parameter)
    yield part
