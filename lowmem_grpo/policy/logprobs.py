"""Log-probabilities and entropies of chosen tokens, without ever holding full logits.

For hidden rows h, head weights W, temperature tau and z = h W^T / tau:

    logp(y) = z_y - lse(z)                  lse(z) = log sum_v exp z_v
    H       = lse(z) - sum_v p_v z_v        p = softmax(z)

Tiles of (rows x vocabulary) are walked. The forward pass keeps three numbers a row: a running
maximum, sum exp(z - max) and sum exp(z - max) z (the online softmax of Milakov and Gimelshein,
arXiv 1805.02867). How logp changes with h does not depend on what is made of logp,

    d logp(y) / dh = (1 - p_y) W_y / tau - sum_{v != y} p_v W_v / tau

so where a gradient will be wanted the forward pass sums that up as well, while it has each tile:
one product of a tile more there, and the backward pass has none (it would compute the logits again
and multiply once more). W_y stands apart because 1 - p_y of a likely token would lose its digits
in a sum.

With `entropy_gradient` the backward pass does compute each tile of logits again, and turns it, in
place, into its gradient

    dz_v = g_logp (1[v = y] - p_v)  -  g_H p_v (log p_v + H)

What is alive beyond inputs, outputs and one direction a row is one tile of logits, whatever the
number of rows.

Left out: gradients of the head (the base is frozen; a head that asks for one is refused).

Shapes: N scored tokens, D hidden size, V vocabulary; n and v are the sizes of one tile.
Pure: tensors in, tensors out.
"""

import torch

__all__ = [
    "along",
    "forbid",
    "full_logits",
    "logits_tile",
    "naive_token_logprobs",
    "token_logprobs",
]


def token_logprobs(
    hidden_ND: torch.Tensor,
    weight_VD: torch.Tensor,
    targets_N: torch.Tensor,
    *,
    temperature: float = 1.0,
    bias_V: torch.Tensor | None = None,
    forbidden_ids: tuple[int, ...] = (),
    forbidden_N: torch.Tensor | None = None,
    entropy_gradient: bool = False,
    tile_tokens: int = 1024,
    tile_vocab: int = 16384,
    kernels=None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probability of each target and entropy of its distribution, both float32 of shape [N].

    `hidden_ND` and `weight_VD` share a floating dtype and device; `targets_N` is int64. Of
    `weight_VD` tiles of rows are taken as they are needed: it may be anything that gives them like
    a tensor (a head in 8 bits: ends.py). The products run in that dtype; everything after them is
    float32. In rows where `forbidden_N` (bool) is true the tokens `forbidden_ids` have probability
    zero: the sampler's "no end yet" rule, scored as it was sampled. Log-probabilities are
    differentiable with respect to `hidden_ND`, and entropies with `entropy_gradient`. `kernels`:
    what makes the passes over a tile (head_kernels.py) where torch is not to; unless an entropy's
    gradient is asked for.

    Raises ValueError for a head that requires gradients, a temperature that is not positive, or a
    shape mismatch.
    """
    if weight_VD.requires_grad or (bias_V is not None and bias_V.requires_grad):
        raise ValueError(
            "the LM head requires a gradient; token_logprobs supports a frozen head only"
        )
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    if hidden_ND.ndim != 2 or targets_N.shape != hidden_ND.shape[:1]:
        raise ValueError(f"hidden {tuple(hidden_ND.shape)} and targets {tuple(targets_N.shape)}")
    return _TokenLogprobs.apply(
        hidden_ND,
        weight_VD,
        bias_V,
        targets_N,
        1.0 / temperature,
        forbidden_ids,
        forbidden_N if forbidden_ids else None,
        entropy_gradient,
        tile_tokens,
        tile_vocab,
        None if entropy_gradient else kernels,
    )


def naive_token_logprobs(
    hidden_ND,
    weight_VD,
    targets_N,
    *,
    temperature=1.0,
    bias_V=None,
    forbidden_ids=(),
    forbidden_N=None,
):
    """The definition, with full logits: the twin that `token_logprobs` is tested against."""
    logits_NV = torch.nn.functional.linear(hidden_ND, weight_VD, bias_V).float() / temperature
    if forbidden_ids and forbidden_N is not None:
        for token in forbidden_ids:
            logits_NV = logits_NV.index_fill(
                1, torch.tensor([token], device=logits_NV.device), -torch.inf
            ).where(forbidden_N[:, None], logits_NV)
    logp_NV = logits_NV.log_softmax(-1)
    entropy_N = -(logp_NV.exp() * logp_NV.clamp_min(-1e4)).sum(-1)
    return logp_NV.gather(1, targets_N[:, None])[:, 0], entropy_N


def logits_tile(hidden_nD, weight_vD, bias_v=None, scale: float = 1.0) -> torch.Tensor:
    """One tile of scaled logits in float32, [n, v].

    The product itself runs in the inputs' dtype: the sampler and the trainer both come through
    here, so that what is sampled and what is scored are rounded in the same way.
    """
    logits_nv = torch.nn.functional.linear(hidden_nD, weight_vD, bias_v)
    if logits_nv.dtype != torch.float32:
        logits_nv = logits_nv.float()
    return logits_nv.mul_(scale) if scale != 1.0 else logits_nv


def full_logits(hidden_ND, weight_VD, bias_V=None, tile_vocab: int = 16384) -> torch.Tensor:
    """All logits of a few rows in float32, [N, V]; of a head in 8 bits by tiles."""
    if isinstance(weight_VD, torch.Tensor):
        return logits_tile(hidden_ND, weight_VD, bias_V)
    logits_NV = hidden_ND.new_empty((len(hidden_ND), weight_VD.shape[0]), dtype=torch.float32)
    for start in range(0, weight_VD.shape[0], tile_vocab):
        tile = slice(start, start + tile_vocab)
        bias_v = None if bias_V is None else bias_V[tile]
        logits_NV[:, tile] = logits_tile(hidden_ND, weight_VD[tile], bias_v)
    return logits_NV


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        hidden_ND,
        weight_VD,
        bias_V,
        targets_N,
        scale,
        banned,
        banned_N,
        entropy,
        tile_n,
        tile_v,
        kernels,
    ):
        rows = hidden_ND.shape[0]
        logp_N = torch.empty(rows, dtype=torch.float32, device=hidden_ND.device)
        entropy_N = torch.empty_like(logp_N)
        lse_N = torch.empty_like(logp_N)
        ctx.tiles = scale, banned, tile_n, tile_v
        ctx.set_materialize_grads(False)
        directed = ctx.directed = ctx.needs_input_grad[0] and not entropy
        direction_ND = torch.empty_like(hidden_ND) if directed else None
        for low in range(0, rows, tile_n):
            row = slice(low, min(low + tile_n, rows))
            h_nD, y_n = hidden_ND[row], targets_N[row]
            max_n = torch.full_like(logp_N[row], -torch.inf)
            sum_n = torch.zeros_like(max_n)
            dot_n = torch.zeros_like(max_n)
            chosen_n = torch.full_like(max_n, torch.nan)  # a target outside the vocabulary shows
            others_nD = h_nD.new_zeros(h_nD.shape, dtype=torch.float32) if directed else None
            for start in range(0, weight_VD.shape[0], tile_v):
                w_vD = weight_VD[start : start + tile_v]
                if kernels is not None:
                    z_nv = _product(ctx.tiles, h_nD, w_vD, bias_V, banned_N, row, start)
                    running = max_n, sum_n, dot_n, chosen_n  # which are written to
                    shrink_n = kernels.merge(z_nv, y_n, running, start, scale)
                    if directed:
                        others_nD.mul_(shrink_n[:, None])
                        others_nD += kernels.probabilities_(z_nv, y_n, max_n, start, scale) @ w_vD
                    del z_nv, w_vD
                    continue
                z_nv = _tile(ctx.tiles, h_nD, w_vD, bias_V, banned_N, row, start)
                inside_n, local_n = _locate(y_n, start, z_nv.shape[1])
                picked_n = z_nv.gather(1, local_n[:, None])[:, 0]
                chosen_n = torch.where(inside_n, picked_n, chosen_n)
                new_max_n = torch.maximum(max_n, z_nv.amax(1))
                # A whole tile may be forbidden; -inf minus -inf would be NaN.
                safe_max_n = new_max_n.clamp_min(torch.finfo(torch.float32).min)
                shrink_n = torch.exp(max_n - safe_max_n)
                # sum p (z - max) rather than sum p z: no cancellation, and 0 x -inf never arises.
                z_nv.sub_(safe_max_n[:, None]).clamp_min_(-1e4)
                p_nv = z_nv.exp()
                moved_n = torch.where(sum_n > 0, (max_n - safe_max_n) * sum_n, sum_n)
                dot_n = (dot_n + moved_n) * shrink_n + z_nv.mul_(p_nv).sum(1)
                sum_n = sum_n * shrink_n + p_nv.sum(1)
                max_n = new_max_n
                del z_nv  # before another of its size is made
                if directed:
                    other_n = torch.where(inside_n, 0.0, p_nv.gather(1, local_n[:, None])[:, 0])
                    p_nv.scatter_(1, local_n[:, None], other_n[:, None])
                    q_nv = p_nv.to(weight_VD.dtype)
                    others_nD.mul_(shrink_n[:, None])
                    others_nD += q_nv @ w_vD
                    del q_nv
                del p_nv, w_vD
            lse_N[row] = max_n + sum_n.log()
            logp_N[row] = chosen_n - lse_N[row]
            entropy_N[row] = sum_n.log() - dot_n / sum_n
            if directed:
                own_nD = weight_VD[y_n.clamp(0, weight_VD.shape[0] - 1)]
                others_nD.div_(-sum_n[:, None])
                others_nD.addcmul_(own_nD, -logp_N[row, None].expm1())
                direction_ND[row] = others_nD.mul_(scale)
                del own_nD, others_nD
        if directed:
            ctx.mark_non_differentiable(entropy_N)
            ctx.save_for_backward(direction_ND)
        else:
            ctx.head = weight_VD, bias_V  # frozen, so not to be watched, and perhaps no tensor
            ctx.save_for_backward(hidden_ND, targets_N, banned_N, lse_N, entropy_N)
        return logp_N, entropy_N

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_logp_N, grad_entropy_N):
        if ctx.directed:
            return along(*ctx.saved_tensors, grad_logp_N, ctx.tiles[2]), *(None,) * 10
        hidden_ND, targets_N, banned_N, lse_N, entropy_N = ctx.saved_tensors
        weight_VD, bias_V = ctx.head
        scale, _, tile_n, tile_v = ctx.tiles
        if grad_logp_N is None:
            grad_logp_N = torch.zeros_like(lse_N)
        grad_ND = torch.empty_like(hidden_ND)
        for low in range(0, hidden_ND.shape[0], tile_n):
            row = slice(low, min(low + tile_n, hidden_ND.shape[0]))
            h_nD, y_n = hidden_ND[row], targets_N[row]
            g_n = grad_logp_N[row, None]
            grad_nD = torch.zeros(h_nD.shape, dtype=torch.float32, device=h_nD.device)
            for start in range(0, weight_VD.shape[0], tile_v):
                w_vD = weight_VD[start : start + tile_v]
                z_nv = _tile(ctx.tiles, h_nD, w_vD, bias_V, banned_N, row, start)
                inside_n, local_n = _locate(y_n, start, z_nv.shape[1])
                z_nv.sub_(lse_N[row, None])  # now log p
                if grad_entropy_N is None:
                    z_nv.exp_().mul_(-g_n)
                else:
                    p_nv = z_nv.exp()
                    # -p (g_logp + g_H (log p + H)); forbidden tokens have p = 0 and log p = -inf.
                    z_nv.clamp_min_(-1e4).add_(entropy_N[row, None]).mul_(grad_entropy_N[row, None])
                    z_nv.add_(g_n).mul_(p_nv).neg_()
                    del p_nv
                z_nv.scatter_add_(1, local_n[:, None], torch.where(inside_n[:, None], g_n, 0.0))
                d_nv = z_nv.to(weight_VD.dtype)
                del z_nv
                grad_nD += d_nv @ w_vD
                del d_nv, w_vD
            grad_ND[row] = grad_nD.mul_(scale)
        return grad_ND, *(None,) * 10


def along(direction_ND: torch.Tensor, grad_N: torch.Tensor, tile_n: int) -> torch.Tensor:
    """The gradient of hidden states, [N, D]: each row's direction as long as `grad_N` asks for."""
    grad_ND = torch.empty_like(direction_ND)
    for low in range(0, len(grad_N), tile_n):
        row = slice(low, low + tile_n)
        grad_ND[row] = direction_ND[row] * grad_N[row, None]  # in float32
    return grad_ND


def _tile(tiles, h_nD, w_vD, bias_V, banned_N, row, start):
    """Scaled logits in float32, -inf where a token is forbidden."""
    bias_v = None if bias_V is None else bias_V[start : start + w_vD.shape[0]]
    return forbid(logits_tile(h_nD, w_vD, bias_v, tiles[0]), tiles[1], banned_N, row, start)


def _product(tiles, h_nD, w_vD, bias_V, banned_N, row, start):
    """The same, not scaled, in the dtype of the product."""
    bias_v = None if bias_V is None else bias_V[start : start + w_vD.shape[0]]
    z_nv = torch.nn.functional.linear(h_nD, w_vD, bias_v)
    return forbid(z_nv, tiles[1], banned_N, row, start)


def forbid(z_nv, banned, banned_N, row: slice, start: int, value: float = -torch.inf):
    """`value` in place for the tokens `banned` of a tile whose first column is the token `start`,
    in those of its rows (`row` of all) where `banned_N` (bool [N], or None) is true.
    """
    if banned_N is not None:
        for token in banned:
            if start <= token < start + z_nv.shape[1]:
                z_nv[:, token - start].masked_fill_(banned_N[row], value)
    return z_nv


def _locate(targets_n, start, width):
    """Which targets lie in this vocabulary tile, and a column that is valid for all of them."""
    inside_n = (targets_n >= start) & (targets_n < start + width)
    return inside_n, torch.where(inside_n, targets_n - start, 0)
