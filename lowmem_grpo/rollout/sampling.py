"""From logits to tokens: which distribution is sampled, the draw, and its log-prob.

The draw inverts the cumulative distribution with one uniform number a token: y is the first token
whose cumulative probability exceeds u. The uniforms of a completion are a function of (seed, step,
problem, rollout) alone, made by a counter-based generator on the host, so neither a resume, nor the
device, nor which completions are decoded together changes them.

Truncation follows the usual definitions: top_k keeps the k most likely tokens, top_p the fewest
whose probabilities reach p (Holtzman et al., arXiv 1904.09751), min_p those at least that fraction
of the most likely one (arXiv 2407.01082); in that order, after the temperature. Of equally likely
tokens top_k and top_p keep those with the smaller ids. The log-prob is always that of the
distribution drawn from.

Pure. Shapes: R rows, V vocabulary, C tokens.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

__all__ = ["Drawn", "Sampling", "choose", "distribution", "uniforms"]


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How completions are drawn. Temperature 0 is greedy. The end token counts towards the maximum
    length; at least the minimum of other tokens comes before it. `entropies`: whether those of what
    is drawn from are wanted.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    min_completion_length: int = 0
    max_completion_length: int = 256
    entropies: bool = False

    @property
    def truncates(self) -> bool:
        """Whether tokens that the policy could produce are never drawn."""
        return self.top_p < 1.0 or self.top_k > 0 or self.min_p > 0.0


class Drawn(NamedTuple):
    """Tokens (int64 [R]), their log-probs and, where they are wanted, the entropies of what they
    were drawn from (float32 [R], nat).
    """

    tokens_R: torch.Tensor
    logprobs_R: torch.Tensor
    entropies_R: torch.Tensor | None


def uniforms(seed: int, step: int, problem: int, rollout: int, count: int) -> np.ndarray:
    """float64 [count] in [0, 1): the uniform numbers of one completion."""
    sequence = np.random.SeedSequence([seed, step, problem, rollout])
    return np.random.Generator(np.random.Philox(sequence)).random(count)


def distribution(logits_RV: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """Log-probabilities [R, V] float32 of what is drawn from; -inf where truncated. Needs a
    temperature above 0.
    """
    if sampling.temperature != 1.0:
        logits_RV = logits_RV / sampling.temperature
    if sampling.top_k and sampling.top_k < logits_RV.shape[1]:
        kth_R1 = logits_RV.topk(sampling.top_k).values[:, -1:]
        more_RV, equal_RV = logits_RV > kth_R1, logits_RV == kth_R1
        # In 16 bits many tokens may be equally likely: of those at the end the first ones stay.
        room_R1 = sampling.top_k - more_RV.sum(1, keepdim=True)
        beyond_RV = equal_RV & (equal_RV.cumsum(1) > room_R1)
        logits_RV = logits_RV.masked_fill((logits_RV < kth_R1) | beyond_RV, -torch.inf)
    if sampling.top_p < 1.0:
        sorted_RV, order_RV = logits_RV.sort(descending=True, stable=True)
        p_RV = sorted_RV.softmax(1)
        # A token stays when what comes before it has not reached p: the first always does.
        beyond_RV = p_RV.cumsum(1) - p_RV >= sampling.top_p
        beyond_RV = torch.zeros_like(beyond_RV).scatter_(1, order_RV, beyond_RV)
        logits_RV = logits_RV.masked_fill(beyond_RV, -torch.inf)
    if sampling.min_p > 0.0:
        floor_R1 = logits_RV.amax(1, keepdim=True) + float(np.log(sampling.min_p))
        logits_RV = logits_RV.masked_fill(logits_RV < floor_R1, -torch.inf)
    return logits_RV.log_softmax(1)


def choose(logits_RV: torch.Tensor, uniforms_R: torch.Tensor, sampling: Sampling) -> Drawn:
    """Tokens from float32 logits and float64 uniforms, with what there is to know of their draw.

    Greedy choices are given their log-prob under the untruncated distribution at temperature 1.
    """
    if sampling.temperature == 0:
        logp_RV = logits_RV.log_softmax(1)
        tokens_R = logits_RV.argmax(1)
    else:
        logp_RV = distribution(logits_RV, sampling)
        # Sums in float64: in float32 those over a large vocabulary would swallow its unlikely
        # tokens. What is summed is as exact as the log-probs are, in float32.
        cumulative_RV = torch.empty_like(logp_RV, dtype=torch.float64)
        torch.exp(logp_RV, out=cumulative_RV).cumsum_(1)
        # Scaled by the total, which is 1 up to rounding, u stays below it; `right`: tokens of
        # probability zero, whose cumulative value equals their predecessor's, are never met.
        drawn_R1 = uniforms_R[:, None] * cumulative_RV[:, -1:]
        tokens_R = torch.searchsorted(cumulative_RV, drawn_R1, right=True)[:, 0]
        # NaN logits find no token: one is made up, so that its NaN log-prob can be returned.
        tokens_R = tokens_R.clamp_(max=logp_RV.shape[1] - 1)
        del cumulative_RV
    logprobs_R = logp_RV.gather(1, tokens_R[:, None])[:, 0]
    if not sampling.entropies:
        return Drawn(tokens_R, logprobs_R, None)
    p_RV = logp_RV.exp()
    # A token that cannot be drawn has p = 0 and log p = -inf, whose product would be NaN.
    return Drawn(tokens_R, logprobs_R, -p_RV.mul_(logp_RV.clamp_min_(-1e4)).sum(1))
