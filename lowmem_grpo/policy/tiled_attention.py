"""Shared-prefix attention in tiles of plain matrix products, for CPUs.

What it computes is in attention.py. A tile is a block of queries of a prompt, or of one or more
neighbouring completions, with all keys that they see. For queries Q, keys and values K_p, V_p of
the prompt (used in place by all completions) and K_o, V_o of the completion itself:

    S  = scaling [Q K_p^T | Q K_o^T]     P  = softmax(S)                   O  = P_p V_p + P_o V_o
    dP = [dO V_p^T | dO V_o^T]           dS = scaling P (dP - rowsum(P dP))
    dQ = dS_p K_p + dS_o K_o             dK = dS^T Q                       dV = P^T dO

As flash attention does (Dao et al., arXiv 2205.14135), the backward pass computes S and P again,
tile by tile. A tile has all keys of its queries, so that this takes nothing but the inputs: no
log-sum-exp, no output for rowsum(P dP) = rowsum(dO O). (On a CPU the one kernel of softmax is also
faster than exp(S - lse).) The query heads of one key-value head lie side by side as rows of one
product: keys and values are never repeated.

Neighbours of one length are a batch of products. Of different lengths, each has its own, except
that short ones are joined as if they were one completion in which more is hidden: a few more scores
cost less than a dozen more operations on small tensors.

Products are in the inputs' dtype; the softmax, and sums over tiles, in float32 (or float64).

Shapes: T packed tokens, H query heads, K key-value heads, r = H / K, E head size. In a tile: n
sequences, L queries of each, R = n L r rows; P keys of the prompt, S own keys. Joined: q = T r, k =
P + S, s = K n.
"""

from collections.abc import Iterator
from itertools import groupby
from math import isqrt
from typing import NamedTuple

import torch
from torch.autograd.function import once_differentiable

__all__ = ["Limits", "tiled_attention"]


class Limits(NamedTuple):
    """Of a tile: the fastest found on two cores of an AMD EPYC with 1 MiB of L2 cache each."""

    scores: int = 1 << 20
    """Elements of S, except where one query has more. At most three such tensors in float32 are
    alive at once.
    """
    queries: int = 128
    """Queries of one sequence. No product is computed with the keys after the last of them."""
    joined: int = 1 << 17
    """Elements of Q K_o^T of completions that are joined."""


class Tile(NamedTuple):
    """Queries of `count` whole sequences of one length, or of a part of one, and their keys."""

    rows: slice
    """Of [K, T r, E]."""
    prompt: slice
    """Of [K, T, E]."""
    own: slice
    """Of [K, T, E]. Each sequence sees its share of these."""
    count: int
    queries: int
    """Of one sequence."""
    cut: bool
    """The window hides some of the keys from some of the queries."""
    breaks: tuple[int, ...]
    """Where in the sequence another one of joined completions begins."""

    @property
    def shared(self) -> int:
        """P: keys of the prompt."""
        return self.prompt.stop - self.prompt.start


class Span(NamedTuple):
    """`count` sequences of `length` tokens, end to end; `breaks` as in a tile."""

    start: int
    count: int
    length: int
    breaks: tuple[int, ...] = ()


def tiled_attention(groups, query, key, value, scaling, window=None, limits=None) -> torch.Tensor:
    """[1, H, T, E], [1, K, T, E] twice -> [1, T, H, E]. `groups`, `window`: see `PackedLayout`.

    Query, key and value are all that is saved for the backward pass.
    """
    tiles = list(_tiles(groups, query.shape[1], key.shape[1], window, limits or Limits()))
    return _TiledAttention.apply(query, key, value, tiles, scaling, window)


def _tiles(groups, heads, kv_heads, window, limits) -> Iterator[Tile]:
    repeats, start = heads // kv_heads, 0
    for prompt, completions in groups:
        cuts = window is not None and window < prompt + max(completions, default=0)
        most = limits.scores // (heads * (prompt + limits.queries))
        joinable = 0 if cuts else min(most, limits.queries, isqrt(limits.joined // heads))
        spans = [(0, Span(start, 1, prompt))]
        spans += [(prompt, span) for span in _spans(start + prompt, completions, joinable)]
        for shared, span in spans:
            for sequence, count, first, last in _blocks(shared, span, heads, limits):
                # Keys before this one are hidden from all queries of the tile.
                seen = max(0, shared + first + 1 - window) if cuts else 0
                stop = sequence + (count - 1) * span.length + last
                yield Tile(
                    slice((sequence + first) * repeats, stop * repeats),
                    slice(start + min(seen, shared), start + shared),
                    slice(sequence + max(0, seen - shared), stop),
                    count,
                    last - first,
                    cuts and shared + last - window > seen,
                    span.breaks,
                )
        start += prompt + sum(completions)


def _spans(start, completions, joinable) -> list[Span]:
    """Completions as spans: neighbours of one length together, others joined up to `joinable`
    tokens.
    """
    spans = []
    for length, equal in groupby(filter(None, completions)):
        count, last = len(list(equal)), spans[-1] if spans else Span(start, 0, 0)
        if last.count == count == 1 and last.length + length <= joinable:
            breaks = *last.breaks, last.length
            spans[-1] = Span(last.start, 1, last.length + length, breaks)
        else:
            spans.append(Span(start, count, length))
        start += count * length
    return spans


def _blocks(shared, span, heads, limits) -> Iterator[tuple[int, int, int, int]]:
    """The queries of each tile: from `first` to `last` of `count` sequences, of which the first one
    begins at token `sequence`.
    """
    start, count, length, _ = span
    most = limits.scores // (heads * (shared + length))  # queries
    if length <= min(most, limits.queries):
        together = most // length
        for done in range(0, count, together):
            yield start + done * length, min(together, count - done), 0, length
        return
    blocks = -(-length // max(1, min(most, limits.queries)))
    size = -(-length // blocks)
    for sequence in range(start, start + count * length, length):
        for first in range(0, length, size):
            yield sequence, 1, first, min(first + size, length)


class _TiledAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value, tiles, scaling, window):
        ctx.save_for_backward(query, key, value)
        ctx.rest = tiles, scaling, window
        kv_heads, dtype = key.shape[1], query.dtype
        query_KqE = _rows(query[0], kv_heads).div_(16)
        key_KTE, value_KTE = key[0], value[0]
        out_KqE = torch.empty_like(query_KqE)
        causal = _causal(tiles, query)
        for tile in tiles:
            weights = _softmax(tile, query_KqE[:, tile.rows], key_KTE, scaling, window, causal)
            parts = _parts(tile, weights, dtype)
            out_KqE[:, tile.rows] = _gather(tile, parts, value_KTE)
            del weights, parts  # before those of the next tile are made
        return _heads(out_KqE, query).transpose(1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        query, key, value = ctx.saved_tensors
        tiles, scaling, window = ctx.rest
        kv_heads, dtype = key.shape[1], query.dtype
        query_KqE = _rows(query[0], kv_heads).div_(16)
        key_KTE, value_KTE = key[0], value[0]
        grad_KqE = _rows(grad[0].transpose(0, 1), kv_heads)
        for_query, for_key, for_value = ctx.needs_input_grad[:3]
        dquery = torch.empty_like(query_KqE) if for_query else None
        dkey = _zeros(key) if for_key else None
        dvalue = _zeros(value) if for_value else None
        causal = _causal(tiles, query)
        for tile in tiles:
            rows, grad_rows = query_KqE[:, tile.rows], grad_KqE[:, tile.rows]
            weights = _softmax(tile, rows, key_KTE, scaling, window, causal)
            if for_value:
                _add(tile, dvalue, _parts(tile, weights, dtype), grad_rows)
            if not (for_query or for_key):
                continue
            dscores = _products(tile, grad_rows, value_KTE)
            dscores = torch._softmax_backward_data(dscores, weights, -1, weights.dtype)
            parts = _parts(tile, dscores.mul_(scaling), dtype)
            if for_query:
                dquery[:, tile.rows] = _gather(tile, parts, key_KTE)
            if for_key:
                _add(tile, dkey, parts, rows, times=16)
            del weights, dscores, parts
        gradients = (
            _heads(dquery, query) if for_query else None,
            dkey.to(dtype)[None] if for_key else None,
            dvalue.to(dtype)[None] if for_value else None,
        )
        return *gradients, None, None, None


def _softmax(tile, rows_KRE, key_KTE, scaling, window, causal):
    """P of a tile [K, R, P + S], for rows of Q / 16.

    The exact sixteenth and its place are those of decoding (`WaveCache.attend`): sampler and
    trainer round alike.
    """
    scores = _products(tile, rows_KRE, key_KTE).mul_(16 * scaling)
    kv_heads, _, keys = scores.shape
    scores_sLrk = scores.view(kv_heads * tile.count, tile.queries, -1, keys)
    if tile.cut:
        before = keys - tile.queries  # keys before the first query itself
        hidden = scores.new_full((tile.queries, keys), -torch.inf)
        hidden = hidden.triu(before + 1).add_(hidden.tril(before - window))
        scores_sLrk.add_(hidden[:, None])
    else:
        scores_sLrk[..., -tile.queries :].add_(causal[: tile.queries, :, : tile.queries])
    for place in tile.breaks:
        scores_sLrk[:, place:, :, tile.shared : tile.shared + place] = -torch.inf
    return torch.softmax(scores, -1, out=scores)


def _causal(tiles, query):
    """[L, 1, L] for the largest L: -inf at the keys after a query."""
    most = max(tile.queries for tile in tiles)
    return query.new_full((most, most), -torch.inf, dtype=_sums(query)).triu_(1)[:, None]


# Products of a tile -------------------------------------------------------------------------------


def _products(tile, rows_KRE, x_KTE):
    """Rows times the keys (or values) that they see, transposed: [K, R, P + S] in float32."""
    kv_heads, rows, size = rows_KRE.shape
    own_x = x_KTE[:, tile.own].reshape(kv_heads * tile.count, -1, size)
    own = torch.bmm(rows_KRE.reshape(own_x.shape[0], -1, size), own_x.mT)
    found = rows_KRE.new_empty(kv_heads, rows, tile.shared + own.shape[2], dtype=_sums(rows_KRE))
    found[..., tile.shared :] = own.view(kv_heads, rows, -1)
    if tile.shared:
        found[..., : tile.shared] = torch.bmm(rows_KRE, x_KTE[:, tile.prompt].mT)
    return found


def _parts(tile, x_KRk, dtype):
    """The columns of the prompt [K, R, P] and the own columns [K n, L r, S]."""
    own = x_KRk[..., tile.shared :]
    own = own.view(own.shape[0] * tile.count, -1, own.shape[2])
    return x_KRk[..., : tile.shared].to(dtype), own.to(dtype)


def _gather(tile, parts, x_KTE):
    """Weights times the keys (or values) that their rows see: [K, R, E]."""
    prompt, own = parts
    kv_heads, _, size = x_KTE.shape
    found = torch.bmm(own, x_KTE[:, tile.own].reshape(own.shape[0], -1, size))
    found = found.view(kv_heads, -1, size)
    return found.add_(torch.bmm(prompt, x_KTE[:, tile.prompt])) if tile.shared else found


def _add(tile, total_KTE, parts, rows_KRE, times=1):
    """Add the weights, transposed, times the rows to the keys (or values) that the rows see."""
    prompt, own = parts
    kv_heads, _, size = rows_KRE.shape
    found = torch.bmm(own.mT, rows_KRE.reshape(own.shape[0], -1, size))
    total_KTE[:, tile.own].add_(found.view(kv_heads, -1, size), alpha=times)
    if tile.shared:
        total_KTE[:, tile.prompt].add_(torch.bmm(prompt.mT, rows_KRE), alpha=times)


# Layouts ------------------------------------------------------------------------------------------


def _sums(x):
    return torch.promote_types(x.dtype, torch.float32)


def _rows(x_HTE, kv_heads):
    """[H, T, E] -> [K, T r, E], a copy."""
    x_KTrE = x_HTE.unflatten(0, (kv_heads, -1)).transpose(1, 2)
    return x_KTrE.clone(memory_format=torch.contiguous_format).flatten(1, 2)


def _heads(x_KqE, query):
    """[K, T r, E] -> [1, H, T, E], of which the heads of a token lie together."""
    x_KTrE = x_KqE.unflatten(1, (query.shape[2], -1))
    return x_KTrE.transpose(0, 1).flatten(1, 2).transpose(0, 1)[None]


def _zeros(x):
    """Zeros [K, T, E] for sums of the shape of x [1, K, T, E], laid out as in `_heads`."""
    return x.new_zeros(*x[0].transpose(0, 1).shape, dtype=_sums(x)).transpose(0, 1)
