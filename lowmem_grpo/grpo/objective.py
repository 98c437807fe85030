"""The GRPO objective over scored tokens (DeepSeekMath, arXiv 2402.03300, eq. 3) and its variants.

    rho  = exp(logp - old_logp)                                      of a token
    rho  = exp(mean_t (logp_t - old_logp_t))                         of a rollout (GSPO, 2507.18071)
    loss = sum_t w_t (-S_t + beta D_t)

S is the surrogate, by `loss_type`; sg[x] is x without its gradient:

    grpo, bnpo, dapo, dr_grpo, luspo    min(rho A, clip(rho, 1 - epsilon, 1 + epsilon_high) A)
                                        with `delta`, the first rho is at most that (INTELLECT-2,
                                        arXiv 2505.07291): A < 0 has a bound as well
    cispo                               sg[min(rho, epsilon_high)] A logp     (arXiv 2506.13585)
    sapo                                4 / tau sigmoid(tau (rho - 1)) A, tau one of two by the sign
                                        of A                                  (arXiv 2511.20347)
    vespo                               sg[phi(W)] A logp, W = prod_t rho_t of the rollout and
                                        phi(W) = exp(lambda) W^k exp(-lambda W), k and lambda by the
                                        sign of A                             (arXiv 2602.10693)

D estimates KL(policy || reference) from a token of the policy, r = ref - logp (Schulman, 2020):

    k1 = -r     k2 = r^2 / 2     k3 = exp(r) - r - 1       k3 is unbiased and never negative

or is no estimate: `exact` is the sum over the whole vocabulary (policy/divergence.py), which has no
variance and whose gradient is that of the divergence. An estimate is multiplied by rho with
`use_bias_correction_kl` (DeepSeek-V3.2, arXiv 2512.02556). From there also
`off_policy_mask_threshold`: a rollout with A < 0 whose mean of sampler_logp - logp is above it has
no surrogate. Nor has, with a threshold, a token whose distribution had less entropy (the top
quantile of the step's tokens: arXiv 2506.01939); its KL term stays, and it counts in the averages.
With `entropy_coef`, that times the mean entropy of the tokens that have a surrogate is taken from
the loss.

Where ratios start from the trainer's log-probs instead of the sampler's, S is multiplied by what
lies between them, min(exp(old_logp - sampler_logp), C) (truncated importance sampling: Yao et al.,
"Your efficient RL framework secretly brings you off-policy RL training", 2025; C is
`importance_sampling_clip_max`).

The weights w_t carry the averaging, and they belong to the step: whatever micro-batches it is cut
into, the losses add up to the step's loss. With R rollouts of C_i tokens in the step:

    grpo, sapo                  w = 1 / (R C_i)     within each completion, then over completions
    dapo, bnpo, cispo, vespo    w = 1 / sum_i C_i   over all tokens (DAPO, arXiv 2503.14476). In TRL
                                                    bnpo averages over a device's micro-batch; here
                                                    that is the step
    dr_grpo                     w = 1 / (R L)       L the longest completion allowed (2503.20783)
    luspo                       w = 1 / R           a rollout counts by its length (2602.05261)

Pure: tensors in, (loss, stats) out. Shapes: N scored tokens, R rollouts.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import log

import torch

__all__ = [
    "CLIPPED", "KL_ESTIMATORS", "LEVELS", "LOSS_TYPES", "Objective", "ObjectiveInputs",
    "entropy_threshold", "k3", "rollout_weights",
]  # fmt: skip

CLIPPED = ("grpo", "bnpo", "dapo", "dr_grpo", "luspo")
LOSS_TYPES = (*CLIPPED, "cispo", "sapo", "vespo")
LEVELS = ("token", "sequence")
KL_ESTIMATORS = ("k1", "k2", "k3", "exact")

# VESPO's own bounds: of a token's log-ratio, and of a rollout's.
MOST_LOG_RATIO, LEAST_LOG_WEIGHT = 20.0, log(1e-8)


@dataclass(frozen=True)
class ObjectiveInputs:
    """Per scored token, float32 [N]: `logprobs` (with gradient), `old_logprobs`, `advantages`,
    `weights`, and `ref_logprobs`, which may be None where beta is 0 or the divergence is exact:
    `divergences` (with gradient) are then there. `lengths`: tokens of each rollout, in order; None
    where nothing is asked of a rollout as a whole. `sampler_logprobs`: where `old_logprobs` are not
    the sampler's own. `kept` (bool): the tokens that have a surrogate, None for all. For an entropy
    bonus: `entropies` (with gradient) and how many `tokens` of the step have a surrogate.
    """

    logprobs_N: torch.Tensor
    old_logprobs_N: torch.Tensor
    advantages_N: torch.Tensor
    weights_N: torch.Tensor
    ref_logprobs_N: torch.Tensor | None = None
    lengths: tuple[int, ...] | None = None
    entropies_N: torch.Tensor | None = None
    tokens: int = 0
    divergences_N: torch.Tensor | None = None
    kept_N: torch.Tensor | None = None
    sampler_logprobs_N: torch.Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class Objective:
    """What the loss is. Names and defaults are TRL's, but for `loss_type`, the correction of the KL
    term (off) and `kl_estimator`, which TRL has no choice of. Raises ValueError for a name that
    there is not.
    """

    epsilon: float
    epsilon_high: float
    beta: float
    loss_type: str = "grpo"
    importance_sampling_level: str = "token"
    delta: float | None = None
    kl_estimator: str = "k3"
    use_bias_correction_kl: bool = False
    off_policy_mask_threshold: float | None = None
    entropy_coef: float = 0.0
    sapo_temperature_pos: float = 1.0
    sapo_temperature_neg: float = 1.05
    vespo_k_pos: float = 2.0
    vespo_lambda_pos: float = 3.0
    vespo_k_neg: float = 3.0
    vespo_lambda_neg: float = 2.0
    importance_sampling_clip_max: float = 3.0

    def __post_init__(self):
        _known("loss_type", self.loss_type, LOSS_TYPES)
        _known("importance_sampling_level", self.importance_sampling_level, LEVELS)
        _known("kl_estimator", self.kl_estimator, KL_ESTIMATORS)

    @property
    def exact(self) -> bool:
        """Whether it takes the exact divergence, and no log-probs, of the reference."""
        return self.beta != 0.0 and self.kl_estimator == "exact"

    def __call__(self, inputs: ObjectiveInputs) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The loss (a float32 scalar) and detached sums over tokens.

        Stats: `tokens`; `kl` (against the reference: the exact divergence or k3, by what is given);
        `clip_low`, `clip_high` (tokens whose ratio lies outside the clip range on the side where
        that stops the gradient; for cispo `clip_high` is what is above its bound, A > 0; none for
        sapo and vespo); `sampler_kl` (k3 of the sampler's against current log-probs).
        Raises ValueError when beta is not 0 and there is nothing of the reference.
        """
        if self.beta and (inputs.divergences_N if self.exact else inputs.ref_logprobs_N) is None:
            missing = "divergences from the reference" if self.exact else "reference log-probs"
            raise ValueError(f"beta is {self.beta} but there are no {missing}")
        log_ratio_N = inputs.logprobs_N - inputs.old_logprobs_N
        level_N = log_ratio_N
        if self.importance_sampling_level == "sequence":
            level_N = _by_rollout(log_ratio_N, inputs.lengths, torch.mean)
        ratio_N = level_N.exp()
        loss_N = -self._surrogate(inputs, log_ratio_N, ratio_N)
        sampler_N = inputs.old_logprobs_N
        if inputs.sampler_logprobs_N is not None:
            sampler_N = inputs.sampler_logprobs_N
        if self.off_policy_mask_threshold is not None:
            loss_N = loss_N * self._on_policy(inputs, inputs.logprobs_N - sampler_N)
        if inputs.kept_N is not None:
            loss_N = loss_N * inputs.kept_N
        if inputs.sampler_logprobs_N is not None:
            between_N = (inputs.old_logprobs_N - sampler_N).exp()
            loss_N = loss_N * between_N.clamp(max=self.importance_sampling_clip_max)
        stats = {}
        if self.beta:
            loss_N = loss_N + self.beta * self._divergence(inputs, ratio_N)
        if inputs.divergences_N is not None:
            stats["kl"] = inputs.divergences_N.detach().sum()
        elif inputs.ref_logprobs_N is not None:
            stats["kl"] = k3(inputs.logprobs_N.detach(), inputs.ref_logprobs_N).sum()
        with torch.no_grad():
            stats["tokens"] = torch.tensor(float(ratio_N.numel()), device=ratio_N.device)
            stats["clip_low"], stats["clip_high"] = self._stopped(ratio_N, inputs.advantages_N)
            stats["sampler_kl"] = k3(sampler_N, inputs.logprobs_N).sum()
        loss = (loss_N * inputs.weights_N).sum()
        if self.entropy_coef:
            entropies_N = inputs.entropies_N
            if inputs.kept_N is not None:
                entropies_N = entropies_N * inputs.kept_N
            loss = loss - self.entropy_coef * entropies_N.sum() / inputs.tokens
        return loss, stats

    def _surrogate(self, inputs: ObjectiveInputs, log_ratio_N, ratio_N) -> torch.Tensor:
        advantages_N = inputs.advantages_N
        if self.loss_type == "cispo":
            factor_N = ratio_N.detach().clamp(max=self.epsilon_high)
            return factor_N * advantages_N * inputs.logprobs_N
        if self.loss_type == "vespo":
            factor_N = self._phi(inputs, log_ratio_N.detach())
            return factor_N * advantages_N * inputs.logprobs_N
        if self.loss_type == "sapo":
            better_N = advantages_N > 0
            tau_N = _either(better_N, self.sapo_temperature_pos, self.sapo_temperature_neg, ratio_N)
            return (tau_N * (ratio_N - 1.0)).sigmoid() * 4.0 / tau_N * advantages_N
        clipped_N = ratio_N.clamp(1.0 - self.epsilon, 1.0 + self.epsilon_high)
        bounded_N = ratio_N if self.delta is None else ratio_N.clamp(max=self.delta)
        return torch.minimum(bounded_N * advantages_N, clipped_N * advantages_N)

    def _phi(self, inputs: ObjectiveInputs, log_ratio_N) -> torch.Tensor:
        each_N = log_ratio_N.clamp(-MOST_LOG_RATIO, MOST_LOG_RATIO)
        log_w_N = _by_rollout(each_N, inputs.lengths, torch.sum)
        log_w_N = log_w_N.clamp(LEAST_LOG_WEIGHT, MOST_LOG_RATIO)
        not_worse_N = inputs.advantages_N >= 0
        k_N = _either(not_worse_N, self.vespo_k_pos, self.vespo_k_neg, log_w_N)
        lambda_N = _either(not_worse_N, self.vespo_lambda_pos, self.vespo_lambda_neg, log_w_N)
        return (lambda_N + k_N * log_w_N - lambda_N * log_w_N.exp()).exp()

    def _on_policy(self, inputs: ObjectiveInputs, log_ratio_N) -> torch.Tensor:
        """1 for a token that has a surrogate, 0 for the others."""
        apart_N = _by_rollout(-log_ratio_N.detach(), inputs.lengths, torch.mean)
        kept_N = (inputs.advantages_N >= 0) | (apart_N <= self.off_policy_mask_threshold)
        return kept_N.to(log_ratio_N.dtype)

    def _divergence(self, inputs: ObjectiveInputs, ratio_N) -> torch.Tensor:
        if self.exact:
            return inputs.divergences_N
        if self.kl_estimator == "k3":
            found_N = k3(inputs.logprobs_N, inputs.ref_logprobs_N)
        else:
            found_N = inputs.logprobs_N - inputs.ref_logprobs_N
            if self.kl_estimator == "k2":
                found_N = found_N.square() / 2
        return found_N * ratio_N if self.use_bias_correction_kl else found_N

    def _stopped(self, ratio_N, advantages_N) -> tuple[torch.Tensor, torch.Tensor]:
        none = ratio_N.new_zeros(())
        if self.loss_type == "cispo":
            return none, ((ratio_N > self.epsilon_high) & (advantages_N > 0)).float().sum()
        if self.loss_type not in CLIPPED:
            return none, none
        low_N = (ratio_N < 1.0 - self.epsilon) & (advantages_N < 0)
        high_N = (ratio_N > 1.0 + self.epsilon_high) & (advantages_N > 0)
        return low_N.float().sum(), high_N.float().sum()


def k3(logprobs_N: torch.Tensor, other_N: torch.Tensor) -> torch.Tensor:
    """Schulman's k3 estimate of KL(p || q) over tokens of p: `logprobs` are p's, `other` q's."""
    difference_N = other_N - logprobs_N
    # expm1: near zero exp(d) - 1 would lose all its digits, and d^2 / 2 is what is wanted.
    return difference_N.expm1() - difference_N


def rollout_weights(
    completion_lengths: list[int],
    loss_type: str,
    max_completion_length: int,
    masked: Sequence[bool] = (),
) -> list[float]:
    """The weight w of every token of each rollout of a step; 0 for those that are `masked`, which
    still count as rollouts, and whose tokens do not count (TRL's `mask_truncated_completions`).
    Raises ValueError for another type.
    """
    _known("loss_type", loss_type, LOSS_TYPES)
    rollouts = len(completion_lengths)
    out = list(masked) or [False] * rollouts
    lengths = [0 if hidden else n for n, hidden in zip(completion_lengths, out, strict=True)]
    if loss_type in ("grpo", "sapo"):
        weights = [1.0 / (rollouts * max(length, 1)) for length in lengths]
    elif loss_type == "dr_grpo":
        weights = [1.0 / (rollouts * max_completion_length)] * rollouts
    elif loss_type == "luspo":
        weights = [1.0 / rollouts] * rollouts
    else:
        weights = [1.0 / max(sum(lengths), 1)] * rollouts
    return [0.0 if hidden else w for w, hidden in zip(weights, out, strict=True)]


def entropy_threshold(entropies: Sequence[float], quantile: float) -> float:
    """The least entropy of the `quantile` of a step's tokens that have the most: 0 leaves the
    highest, 1 all. Between two tokens it is interpolated, in float32 (as TRL does).
    """
    return torch.quantile(torch.tensor(entropies, dtype=torch.float32), 1.0 - quantile).item()


def _by_rollout(
    x_N: torch.Tensor, lengths: tuple[int, ...], reduce: Callable[[torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    """[N]: for each token what `reduce` makes of its rollout's. In pieces rather than by index:
    sums by index are not the same twice on a card.
    """
    return torch.cat([reduce(part).expand(part.numel()) for part in x_N.split(lengths)])


def _either(first_N: torch.Tensor, one: float, other: float, like_N: torch.Tensor) -> torch.Tensor:
    """`one` where `first_N` is true, else `other`, in the dtype of `like_N`."""
    return torch.full_like(like_N, other).masked_fill_(first_N, one)


def _known(setting: str, value: str, names: tuple[str, ...]) -> None:
    if value not in names:
        raise ValueError(f"{setting} is {value!r}, expected one of {names}")
