"""The exact divergence of the policy from the reference at each token, without full logits.

For hidden rows h of the policy and r of the reference, one head W, temperature tau, z = h W^T / tau
and y = r W^T / tau, p = softmax(z) and q = softmax(y):

    D = sum_v p_v (log p_v - log q_v) = sum_v p_v d_v - lse(z) + lse(y)        d = z - y

the whole sum over the vocabulary, of which k1, k2 and k3 (grpo/objective.py) are estimates from one
token. Its gradient needs no reference but d:

    dD / dz_v = p_v (d_v - sum_u p_u d_u)        dD / dh = sum_v (dD / dz_v) W_v / tau

Tiles of (rows x vocabulary) are walked once, as in logprobs.py: of either distribution the running
maximum and sum of exponentials are kept, and of the policy's also sum p d. Where a gradient will be
wanted, sum p W and sum p d W are summed up as well, so that backward has no product of a tile, and
neither h nor r has to be kept for it: one direction a row is.

d is counted from its value at the likeliest token so far: logits that are all moved by one number
are the same distribution, and of two large sums the difference would lack digits.

What is alive beyond inputs, outputs and directions is one tile of logits of each, whatever the
number of rows. Left out: gradients of the head and of the reference (both are frozen).

Shapes: N scored tokens, D hidden size, V vocabulary; n and v are the sizes of one tile.
Pure: tensors in, tensors out.
"""

import torch

from lowmem_grpo.policy.logprobs import along, forbid, logits_tile

__all__ = ["naive_token_divergence", "token_divergence"]


def token_divergence(
    hidden_ND: torch.Tensor,
    reference_ND: torch.Tensor,
    weight_VD: torch.Tensor,
    *,
    temperature: float = 1.0,
    bias_V: torch.Tensor | None = None,
    forbidden_ids: tuple[int, ...] = (),
    forbidden_N: torch.Tensor | None = None,
    tile_tokens: int = 1024,
    tile_vocab: int = 16384,
) -> torch.Tensor:
    """KL(policy || reference) in nat at each of N tokens, float32 [N], differentiable with respect
    to `hidden_ND`.

    `hidden_ND` and `reference_ND` are the last hidden states of the two, of the same floating dtype
    and device as `weight_VD`, which may be anything that gives tiles of rows (ends.py). In rows
    where `forbidden_N` (bool) is true both give the tokens `forbidden_ids` probability zero. Up to
    rounding it is never negative, and it is 0 where the rows are equal.

    Raises ValueError for a head or a reference that requires gradients, a temperature that is not
    positive, or a shape mismatch.
    """
    if weight_VD.requires_grad or (bias_V is not None and bias_V.requires_grad):
        raise ValueError("the LM head requires a gradient; token_divergence needs a frozen one")
    if reference_ND.requires_grad:
        raise ValueError("the reference requires a gradient: take its rows without one")
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    if hidden_ND.ndim != 2 or hidden_ND.shape != reference_ND.shape:
        shapes = f"{tuple(hidden_ND.shape)} and {tuple(reference_ND.shape)}"
        raise ValueError(f"policy and reference rows must have one shape [N, D], got {shapes}")
    return _TokenDivergence.apply(
        hidden_ND,
        reference_ND,
        weight_VD,
        bias_V,
        1.0 / temperature,
        forbidden_ids,
        forbidden_N if forbidden_ids else None,
        tile_tokens,
        tile_vocab,
    )


def naive_token_divergence(
    hidden_ND,
    reference_ND,
    weight_VD,
    *,
    temperature=1.0,
    bias_V=None,
    forbidden_ids=(),
    forbidden_N=None,
):
    """The definition, with full logits in the dtype of the rows: the twin of `token_divergence`."""
    both = []
    for rows_ND in (hidden_ND, reference_ND):
        logits_NV = torch.nn.functional.linear(rows_ND, weight_VD, bias_V) / temperature
        hidden_NV = torch.zeros_like(logits_NV, dtype=torch.bool)
        if forbidden_ids and forbidden_N is not None:
            hidden_NV[:, list(forbidden_ids)] = forbidden_N[:, None]
        both.append(logits_NV.masked_fill(hidden_NV, -torch.inf).log_softmax(-1))
    logp_NV, logq_NV = both
    each_NV = logp_NV.exp() * (logp_NV - logq_NV).masked_fill(hidden_NV, 0.0)
    return each_NV.sum(-1)


class _TokenDivergence(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, hidden_ND, reference_ND, weight_VD, bias_V, scale, banned, banned_N, tile_n, tile_v
    ):
        rows = hidden_ND.shape[0]
        found_N = torch.empty(rows, dtype=torch.float32, device=hidden_ND.device)
        ctx.tile_n, wanted = tile_n, ctx.needs_input_grad[0]
        direction_ND = torch.empty_like(hidden_ND) if wanted else None
        for low in range(0, rows, tile_n):
            row = slice(low, min(low + tile_n, rows))
            h_nD, r_nD = hidden_ND[row], reference_ND[row]
            policy, reference = _Sums(found_N[row]), _Sums(found_N[row])
            dot_n = torch.zeros_like(policy.sum_n)  # sum exp(z - max) (d - offset)
            offset_n = torch.zeros_like(dot_n)
            if wanted:
                plain_nD = h_nD.new_zeros(h_nD.shape, dtype=torch.float32)
                moved_nD = torch.zeros_like(plain_nD)
            for start in range(0, weight_VD.shape[0], tile_v):
                w_vD = weight_VD[start : start + tile_v]
                bias_v = None if bias_V is None else bias_V[start : start + tile_v]
                y_nv = logits_tile(r_nD, w_vD, bias_v, scale)
                forbid(y_nv, banned, banned_N, row, start)
                reference.merge(y_nv.amax(1))
                e_nv = y_nv.sub(reference.max_n[:, None]).exp_()
                reference.sum_n += e_nv.sum(1)
                del e_nv
                z_nv = logits_tile(h_nD, w_vD, bias_v, scale)
                forbid(z_nv, banned, banned_N, row, start)
                d_nv = y_nv.neg_().add_(z_nv)
                del y_nv
                # Forbidden to both: -inf minus -inf is NaN, and there is no difference.
                forbid(d_nv, banned, banned_N, row, start, 0.0)
                highest_n, place_n = z_nv.max(1)
                here_n = d_nv.gather(1, place_n[:, None])[:, 0]
                here_n = torch.where(highest_n > policy.max_n, here_n, offset_n)
                shrink_n = policy.merge(highest_n)
                # The sums so far, counted from there.
                dot_n = dot_n * shrink_n - (here_n - offset_n) * policy.sum_n
                if wanted:
                    plain_nD.mul_(shrink_n[:, None])
                    moved_nD.mul_(shrink_n[:, None])
                    moved_nD.addcmul_(plain_nD, (offset_n - here_n)[:, None])
                offset_n = here_n
                p_nv = z_nv.sub_(policy.max_n[:, None]).exp_()
                del z_nv
                policy.sum_n += p_nv.sum(1)
                d_nv.sub_(offset_n[:, None]).mul_(p_nv)
                dot_n += d_nv.sum(1)
                if wanted:
                    q_nv = p_nv.to(weight_VD.dtype)
                    del p_nv
                    plain_nD += q_nv @ w_vD
                    del q_nv
                    q_nv = d_nv.to(weight_VD.dtype)
                    del d_nv
                    moved_nD += q_nv @ w_vD
                    del q_nv
                else:
                    del p_nv, d_nv
                del w_vD
            mean_n = dot_n / policy.sum_n
            found_N[row] = mean_n + (offset_n - policy.lse() + reference.lse())
            if wanted:
                moved_nD.addcmul_(plain_nD, -mean_n[:, None])
                direction_ND[row] = moved_nD.mul_(scale / policy.sum_n[:, None])
                del plain_nD, moved_nD
        ctx.save_for_backward(direction_ND)
        return found_N

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_N):
        (direction_ND,) = ctx.saved_tensors
        return along(direction_ND, grad_N, ctx.tile_n), *(None,) * 8


class _Sums:
    """The running maximum of rows and their sum of exp(logit - maximum), float32 [n]."""

    def __init__(self, like_n: torch.Tensor):
        # Not -inf: a whole tile may be forbidden, and -inf minus -inf would be NaN.
        self.max_n = torch.full_like(like_n, torch.finfo(torch.float32).min)
        self.sum_n = torch.zeros_like(like_n)

    def merge(self, highest_n: torch.Tensor) -> torch.Tensor:
        """Take a tile's maximum in. Returns what sums so far have been multiplied by."""
        before_n, self.max_n = self.max_n, torch.maximum(self.max_n, highest_n)
        shrink_n = torch.exp(before_n - self.max_n)
        self.sum_n *= shrink_n
        return shrink_n

    def lse(self) -> torch.Tensor:
        return self.max_n + self.sum_n.log()
