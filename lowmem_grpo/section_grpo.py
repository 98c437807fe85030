"""The section [grpo] of a run's configuration: the loss, with a sentence under each setting."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from lowmem_grpo.sections import Fraction, Positive, Section

__all__ = ["GrpoConfig"]


class GrpoConfig(Section):
    """The loss; formulas and sources are in grpo/objective.py and grpo/advantages.py."""

    beta: Annotated[float, Field(ge=0.0)] = 0.04
    """Weight of the KL penalty towards the reference; 0 skips the reference's forward pass."""
    kl_estimator: Literal["k1", "k2", "k3", "exact"] = "k3"
    """Of the KL penalty, from the token alone; exact sums over the whole vocabulary, in the update,
    where the reference's forward pass then is.
    """
    use_kl_in_reward: bool = False
    """Take beta times a completion's KL from its reward (k1, summed over its tokens, as RLOO and
    PPO do), and nothing in the loss; reward_mean is without it.
    """
    sync_ref_model: bool = False
    """Move the reference to the policy every so many steps, by a copy of the adapters."""
    ref_model_sync_steps: Positive = 512
    """Optimizer steps from one such move to the next."""
    use_bias_correction_kl: bool = False
    """Multiply the KL penalty by the ratio."""
    epsilon: Fraction = 0.2
    """Lower clip of the ratio: 1 - epsilon."""
    epsilon_high: Annotated[float, Field(ge=0.0)] | None = None
    """Upper clip of the ratio: 1 + epsilon_high; epsilon when left out. With cispo: its bound."""
    delta: Annotated[float, Field(gt=1.0)] | None = None
    """Bound of the ratio where the advantage is negative."""
    loss_type: Literal["grpo", "bnpo", "dapo", "dr_grpo", "luspo", "cispo", "sapo", "vespo"] = (
        "grpo"
    )
    """What a token contributes, and how tokens are averaged."""
    importance_sampling_level: Literal["token", "sequence"] = "token"
    """Ratios of tokens, or of whole completions (GSPO)."""
    off_policy_mask_threshold: Annotated[float, Field(gt=0.0)] | None = None
    """A completion with a negative advantage that is further from the policy has no surrogate."""
    top_entropy_quantile: Fraction = 1.0
    """Share of the step's tokens that have a surrogate: those of the highest entropy, as they were
    sampled; 1 takes all.
    """
    entropy_coef: Annotated[float, Field(ge=0.0)] = 0.0
    """Weight of an entropy bonus: the mean entropy of the step's tokens (of those that have a
    surrogate), taken from the loss.
    """
    sapo_temperature_pos: Annotated[float, Field(gt=0.0)] = 1.0
    """sapo's, where the advantage is positive."""
    sapo_temperature_neg: Annotated[float, Field(gt=0.0)] = 1.05
    """sapo's, elsewhere."""
    vespo_k_pos: Annotated[float, Field(ge=0.0)] = 2.0
    """vespo's power, where the advantage is not negative."""
    vespo_lambda_pos: Annotated[float, Field(gt=0.0)] = 3.0
    """vespo's decay there."""
    vespo_k_neg: Annotated[float, Field(ge=0.0)] = 3.0
    """vespo's power, where the advantage is negative."""
    vespo_lambda_neg: Annotated[float, Field(gt=0.0)] = 2.0
    """vespo's decay there."""
    mask_truncated_completions: bool = False
    """Completions that were cut at the longest length do not count."""
    old_policy: Literal["sampler", "trainer", "base"] = "sampler"
    """Whose log-probs ratios start from: the sampler's as drawn, the trainer's of the same weights
    (what lies between the two is a factor of its own), or the base's, which then samples."""
    importance_sampling_clip_max: Annotated[float, Field(gt=0.0)] = 3.0
    """With old_policy = trainer: bound of trainer's over sampler's probability of a token."""
    num_iterations: Positive = 1
    """Optimizer steps on each batch of groups."""
    scale_rewards: Literal["group", "batch", "none"] = "group"
    """Divide advantages by the standard deviation of the group, of the whole step, or not."""
    baseline: Literal["mean", "leave_one_out"] = "mean"
    """What is taken from a reward: the mean of its group, or of the others in it (RLOO)."""
    multi_objective_aggregation: Literal["sum_then_normalize", "normalize_then_sum"] = (
        "sum_then_normalize"
    )
    """Of several rewards: the advantage of their sum, or each normalised by itself (GDPO)."""

    @model_validator(mode="after")
    def _goes_together(self) -> GrpoConfig:
        kind, level = self.loss_type, self.importance_sampling_level
        if kind == "cispo" and self.epsilon_high is None:
            raise ValueError(
                "grpo.loss_type = cispo bounds the ratio by grpo.epsilon_high: set it, "
                "to 5 as a start"
            )
        if (kind, level) in (("luspo", "token"), ("vespo", "sequence")):
            other = "sequence" if level == "token" else "token"
            raise ValueError(
                f"grpo.loss_type = {kind} with grpo.importance_sampling_level = {level} is not "
                f"{kind}: use {other}"
            )
        if self.old_policy == "base":
            self._base_is_both()
        if self.old_policy == "trainer" and kind == "vespo":
            raise ValueError(
                "grpo.loss_type = vespo weighs completions by the ratio to what sampled them: use "
                "grpo.old_policy = sampler"
            )
        if self.use_kl_in_reward:
            self._kl_is_a_reward_s()
        elif self.kl_estimator == "k1" and self.beta and not self.use_bias_correction_kl:
            raise ValueError(
                "grpo.kl_estimator = k1 has a gradient of zero in the mean, and no penalty: use k2 "
                "or k3, or grpo.use_bias_correction_kl = true with it"
            )
        if self.kl_estimator == "exact" and self.use_bias_correction_kl:
            raise ValueError(
                "grpo.kl_estimator = exact is no estimate from the sampled token, so there is no "
                "bias for grpo.use_bias_correction_kl to correct: leave that out"
            )
        if self.delta is not None and kind in ("cispo", "sapo", "vespo"):
            raise ValueError(f"grpo.delta has no place in grpo.loss_type = {kind}: leave it out")
        if self.multi_objective_aggregation == "normalize_then_sum" and (
            self.scale_rewards != "group" or self.baseline != "mean"
        ):
            raise ValueError(
                "grpo.multi_objective_aggregation = normalize_then_sum scales by itself: leave out "
                "grpo.scale_rewards and grpo.baseline"
            )
        return self

    def _base_is_both(self) -> None:
        for key, why in (
            ("sync_ref_model", "the reference is the base, which does not move"),
            ("use_kl_in_reward", "what was sampled has no KL from the base"),
        ):
            if getattr(self, key):
                raise ValueError(f"grpo.old_policy = base: {why}: leave out grpo.{key} = true")

    def _kl_is_a_reward_s(self) -> None:
        for key, value, way_out in (
            ("kl_estimator", "exact", "takes k1 of the tokens that were sampled"),
            ("mask_truncated_completions", True, "asks the reference about every completion"),
            ("multi_objective_aggregation", "normalize_then_sum", "takes it from their sum"),
        ):
            if getattr(self, key) == value:
                text = str(value).lower()
                raise ValueError(
                    f"grpo.use_kl_in_reward = true {way_out}: leave out grpo.{key} = {text}"
                )

    @property
    def loss_beta(self) -> float:
        """Weight of the KL penalty in the loss."""
        return 0.0 if self.use_kl_in_reward else self.beta

    @property
    def scores_reference(self) -> bool:
        """Whether the reference is asked for its log-probs, in a phase before the update."""
        if self.old_policy == "base":  # they are the old policy's, too
            return True
        return self.beta != 0.0 and self.kl_estimator != "exact"

    @property
    def moves_reference(self) -> bool:
        """Whether there is a reference that follows the policy."""
        return self.sync_ref_model and self.beta != 0.0

    def moves_reference_after(self, step: int) -> bool:
        """Whether the reference becomes the policy as it is after that optimizer step."""
        return self.moves_reference and step % self.ref_model_sync_steps == 0

    @property
    def masks_by_entropy(self) -> bool:
        """Whether tokens of little entropy have no surrogate."""
        return self.top_entropy_quantile < 1.0

    @property
    def upper_epsilon(self) -> float:
        """`epsilon_high`, or `epsilon` where that is not set."""
        return self.epsilon if self.epsilon_high is None else self.epsilon_high
