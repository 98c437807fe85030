"""What the two flash-attention calls compute, by their documentation, in plain torch.

flash-attn (docstring of `flash_attn_varlen_func`): sequence s has the queries cu_seqlens_q[s] :
cu_seqlens_q[s + 1] and the keys cu_seqlens_k[s] : cu_seqlens_k[s + 1]; "the causal mask is aligned
to the bottom right corner of the attention matrix"; with a window "query at position i will only
attend to keys between [i + seqlen_k - seqlen_q - window_size[0], i + seqlen_k - seqlen_q +
window_size[1]] inclusive", where -1 is no limit; query heads are grouped over fewer key heads.

torch's `varlen_attn` hands its arguments to the same kernel: a window of (-1, 0) is causal, (W, 0)
is causal with W tokens to the left; fewer key heads need `enable_gqa`.

Both raise here for what the kernels would read as garbage: cumulative lengths of another type, or
that do not end with the tensors, and longest lengths that are too short.
"""

import torch

__all__ = ["flash_attn_varlen_func", "mask", "varlen_attn"]


def flash_attn_varlen_func(
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
):
    assert dropout_p == 0.0
    left, right = window_size
    if causal:
        right = 0
    lengths = cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k
    return _ragged(q, k, v, lengths, softmax_scale, left, right)


def varlen_attn(
    query,
    key,
    value,
    cu_seq_q,
    cu_seq_k,
    max_q,
    max_k,
    *,
    return_aux=None,
    scale=None,
    window_size=(-1, -1),
    enable_gqa=False,
    seqused_k=None,
    block_table=None,
    num_splits=None,
):
    assert return_aux is seqused_k is block_table is num_splits is None
    if query.size(1) != key.size(1) and not enable_gqa:
        raise ValueError("fewer key heads need enable_gqa")
    lengths = cu_seq_q, cu_seq_k, max_q, max_k
    return _ragged(query, key, value, lengths, scale, *window_size)


def mask(queries: int, keys: int, left: int, right: int) -> torch.Tensor:
    """bool [queries, keys]: what a query may see, aligned to the lower right corner."""
    middle = torch.arange(queries)[:, None] + keys - queries
    key = torch.arange(keys)[None]
    seen = torch.ones(queries, keys, dtype=torch.bool)
    if left >= 0:
        seen &= key >= middle - left
    if right >= 0:
        seen &= key <= middle + right
    return seen


def _ragged(query, key, value, lengths, scale, left, right):
    cu_q, cu_k, longest_q, longest_k = lengths
    for cumulative, tensor, longest in ((cu_q, query, longest_q), (cu_k, key, longest_k)):
        assert cumulative.dtype == torch.int32
        assert cumulative[0] == 0
        assert cumulative[-1] == tensor.shape[0]
        assert cumulative.diff().max() <= longest
        assert isinstance(longest, int)
    assert len(cu_q) == len(cu_k)
    assert key.shape == value.shape
    assert query.stride(-1) == key.stride(-1) == value.stride(-1) == 1
    repeats = query.shape[1] // key.shape[1]
    scale = query.shape[2] ** -0.5 if scale is None else scale
    out = []
    for s in range(len(cu_q) - 1):
        q = query[cu_q[s] : cu_q[s + 1]]
        k, v = (x[cu_k[s] : cu_k[s + 1]].repeat_interleave(repeats, 1) for x in (key, value))
        scores = torch.einsum("qhe,khe->hqk", q, k) * scale
        seen = mask(len(q), len(k), left, right)
        weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
        weights = weights.masked_fill(~seen.any(1)[:, None], 0.0)  # a query that sees nothing
        out.append(torch.einsum("hqk,khe->qhe", weights, v))
    return torch.cat(out)
