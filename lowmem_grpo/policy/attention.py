"""Shared-prefix attention: a group's prompt is laid once, and every completion attends to [prompt;
itself].

The tokens of several groups lie end to end, [prompt, c1, c2, ..., prompt, c1, ...]. A token of a
prompt sees the prompt up to itself; a token of a completion sees the whole prompt and its own
completion up to itself, never another completion. Positions continue from the prompt in every
completion, so with P prompt tokens the queries of a completion of C tokens are the last C of P + C
keys: causal with the diagonal in the lower right corner.

Four backends compute this and one naive twin defines it:

- `flash_attn`:   flash-attn's `flash_attn_varlen_func` (Dao, arXiv 2307.08691), where installed
- `torch_varlen`: `torch.nn.attention.varlen.varlen_attn`, the flash attention that torch carries
- `sdpa`:         `scaled_dot_product_attention`, the completions of a group padded to their longest
- `tiled`:        plain matrix products, for CPUs: see tiled_attention.py

The flash backends see one ragged batch: prompts, and completions whose keys are gathered behind
their prompt's. The gathered copy costs sum(P + C) rows of keys and values for one layer at a time.
Its backward pass adds the G + 1 gradients of a prompt's token in float32, in the order of the
sequences, and rounds once: in 16 bits, in the order in which atomics come, the sum would be off by
half a percent and another one each time.

A model reaches this through transformers' `AttentionInterface`, under the name `ATTENTION`, with
`model(..., layout=...)`; no mask function is registered for that name, so transformers builds no
mask at all. Any object with an `attend` method is a layout (the sampler's cache is another). Left
out, and refused: attention sinks, logit soft-capping, attention dropout.

Shapes: T packed tokens, H query heads, K key-value heads, E head size, S sequences of a ragged
batch.
"""

from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import torch
from torch.autograd.function import once_differentiable
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from lowmem_grpo.policy.supported import UnsupportedError
from lowmem_grpo.policy.tiled_attention import tiled_attention

__all__ = ["ATTENTION", "BACKENDS", "PackedLayout", "naive_attention"]

ATTENTION = "lowmem_grpo"
BACKENDS = ("flash_attn", "torch_varlen", "sdpa", "tiled")
_ASKED = {"softcap": "a soft cap of its scores", "s_aux": "attention sinks"}


def _attention(module, query, key, value, attention_mask, *, scaling, layout=None, **rest):
    """The function that transformers calls: query [1, H, T, E], key and value [1, K, T, E] -> [1,
    T, H, E].
    """
    kind = type(module).__name__
    if layout is None:
        raise UnsupportedError(
            f"its layers do not hand on to {kind} which tokens belong together, which keeps "
            "completions apart"
        )
    for name, what in _ASKED.items():
        if rest.get(name) is not None:
            raise UnsupportedError(
                f"{kind} asks for {what} (`{name}`), which shared-prefix attention does not compute"
            )
    if not getattr(module, "is_causal", True):
        raise UnsupportedError(f"{kind} looks ahead, and only causal attention can be sampled from")
    if attention_mask is not None:
        raise UnsupportedError(
            f"{kind} brings a mask or a bias of its own, which shared-prefix attention does not "
            "compute"
        )
    window = rest.get("sliding_window")
    return layout.attend(module.layer_idx, query, key, value, scaling, window), None


AttentionInterface.register(ATTENTION, _attention)


@dataclass(frozen=True)
class PackedLayout:
    """Where the prompts and completions of a packed batch lie.

    `groups`: for each group its number of prompt tokens and the numbers of trunk tokens of its
    completions (which may be 0). `backend`: one of `BACKENDS`. Index tensors are made once, on
    `device`, and shared by all layers.
    """

    groups: tuple[tuple[int, tuple[int, ...]], ...]
    backend: str
    device: torch.device

    @property
    def tokens(self) -> int:
        return sum(prompt + sum(completions) for prompt, completions in self.groups)

    def attend(self, layer, query, key, value, scaling, window=None) -> torch.Tensor:
        """[1, H, T, E], [1, K, T, E] twice -> [1, T, H, E]. `window`: a token sees that many,
        itself included.
        """
        if self.backend == "sdpa":
            return _sdpa(self, query, key, value, scaling, window)
        if self.backend == "tiled":
            return tiled_attention(self.groups, query, key, value, scaling, window)
        keys = _Gather.apply(key[0].transpose(0, 1), self)
        values = _Gather.apply(value[0].transpose(0, 1), self)
        call = _flash_attn if self.backend == "flash_attn" else _torch_varlen
        return call(self, query[0].transpose(0, 1), keys, values, scaling, window)[None]

    @cached_property
    def sequences(self) -> list[tuple[int, int, int, int]]:
        """(prompt start, prompt length before own tokens, own start, own length) of each non-empty
        sequence.
        """
        found, start = [], 0
        for prompt, completions in self.groups:
            found.append((start, 0, start, prompt))
            own = start + prompt
            for length in completions:
                if length:
                    found.append((start, prompt, own, length))
                own += length
            start = own
        return found

    @cached_property
    def key_index(self) -> torch.Tensor:
        """int64 [sum of key lengths]: for every key of the ragged batch, its packed token."""
        parts = []
        for start, prompt, own, length in self.sequences:
            parts += [torch.arange(start, start + prompt), torch.arange(own, own + length)]
        return torch.cat(parts).to(self.device)

    @cached_property
    def places(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Where each packed token lies among the keys of the ragged batch: the places (int64 [sum
        of key lengths]), token by token, and the first of each token (int64 [T]).
        """
        places, firsts, row, done = [], [], 0, 0
        for prompt, completions in self.groups:
            lengths = [c for c in completions if c]
            starts = list(accumulate([prompt, *(prompt + c for c in lengths)], initial=row))
            row = starts.pop()
            places.append((torch.arange(prompt)[:, None] + torch.tensor(starts)).flatten())
            firsts.append(torch.arange(prompt) * len(starts) + done)
            done += prompt * len(starts)
            for start, length in zip(starts[1:], lengths, strict=True):
                places.append(torch.arange(length) + start + prompt)
                firsts.append(torch.arange(length) + done)
                done += length
        return torch.cat(places).to(self.device), torch.cat(firsts).to(self.device)

    @cached_property
    def ragged(self) -> tuple[torch.Tensor, torch.Tensor, int, int]:
        """Cumulative query and key lengths (int32 [S + 1]) and the longest of each."""
        query_lengths = [length for _, _, _, length in self.sequences]
        key_lengths = [prompt + length for _, prompt, _, length in self.sequences]
        cumulative = [
            torch.tensor([0, *lengths]).cumsum(0).to(torch.int32).to(self.device)
            for lengths in (query_lengths, key_lengths)
        ]
        return *cumulative, max(query_lengths), max(key_lengths)

    @cached_property
    def padded(self) -> list[tuple[int, int, int, int, torch.Tensor | None, torch.Tensor | None]]:
        """For each group with completions (start, P, completions, longest, pad index, unpad index).

        The indices are None where all completions are equally long: a reshape does then.
        """
        found, start = [], 0
        for prompt, completions in self.groups:
            lengths = [c for c in completions if c]
            if lengths:
                longest = max(lengths)
                pad = unpad = None
                if min(lengths) < longest:
                    offsets = torch.tensor([0, *lengths]).cumsum(0)[:-1, None]
                    within = torch.arange(longest)[None]
                    real = within < torch.tensor(lengths)[:, None]
                    # A padded place repeats the completion's first token: no real query ever looks
                    # so far right.
                    pad = (start + prompt + offsets + torch.where(real, within, 0)).flatten()
                    kept = [torch.arange(length) + i * longest for i, length in enumerate(lengths)]
                    pad, unpad = pad.to(self.device), torch.cat(kept).to(self.device)
                found.append((start, prompt, len(lengths), longest, pad, unpad))
            else:
                found.append((start, prompt, 0, 0, None, None))
            start += prompt + sum(completions)
        return found


class _Gather(torch.autograd.Function):
    """Rows [T, K, E] at the `key_index` of a layout."""

    @staticmethod
    def forward(ctx, x_TKE, layout):
        if ctx.needs_input_grad[0]:
            # Not saved as tensors: they are the layout's, and stay where they are.
            ctx.places = layout.places
        return x_TKE.index_select(0, layout.key_index)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        places, firsts = ctx.places
        # It sums rows in the order of `places`, in float32 (float64) and without atomics, on CPUs
        # and cards: ATen/native/EmbeddingBag.cpp, cuda/EmbeddingBag.cu.
        summed = torch.nn.functional.embedding_bag(places, grad.flatten(1), firsts, mode="sum")
        return summed.unflatten(1, grad.shape[1:]), None


def _flash_attn(layout, query_THE, keys, values, scaling, window):
    from flash_attn import flash_attn_varlen_func

    return flash_attn_varlen_func(
        query_THE,
        keys,
        values,
        *layout.ragged,
        softmax_scale=scaling,
        causal=True,
        window_size=(-1, -1) if window is None else (window - 1, 0),
    )


def _torch_varlen(layout, query_THE, keys, values, scaling, window):
    from torch.nn.attention.varlen import varlen_attn

    return varlen_attn(
        query_THE,
        keys,
        values,
        *layout.ragged,
        scale=scaling,
        window_size=(-1 if window is None else window - 1, 0),
        enable_gqa=query_THE.shape[1] != keys.shape[1],
    )


def _sdpa(layout, query, key, value, scaling, window):
    heads, head_size = query.shape[1], query.shape[3]
    out = []
    for start, prompt, count, longest, pad, unpad in layout.padded:
        if prompt:
            prefix = slice(start, start + prompt)
            q, k, v = query[:, :, prefix], key[:, :, prefix], value[:, :, prefix]
            out.append(_causal_sdpa(q, k, v, scaling, window)[0].transpose(0, 1))
        if count:
            own = slice(start + prompt, start + prompt + count * longest)

            def rows(x, own=own, pad=pad, count=count, longest=longest):
                picked = x[0, :, own] if pad is None else x[0].index_select(1, pad)
                return picked.view(x.shape[1], count, longest, head_size).transpose(0, 1)

            def after_prompt(x, rows=rows, start=start, prompt=prompt, count=count):
                prefix = x[:, :, start : start + prompt].expand(count, -1, -1, -1)
                return torch.cat([prefix, rows(x)], dim=2)

            o = _causal_sdpa(rows(query), after_prompt(key), after_prompt(value), scaling, window)
            o = o.transpose(1, 2).reshape(count * longest, heads, head_size)
            out.append(o if unpad is None else o.index_select(0, unpad))
    return torch.cat(out)[None]


def _causal_sdpa(query, key, value, scaling, window):
    """Lower-right causal attention of [n, H, C, E] over [n, K, P + C, E]."""
    queries, keys = query.shape[2], key.shape[2]
    # Heads are repeated by hand: the memory-efficient kernel (all that cards before Ampere have)
    # refuses grouped heads, and SDPA would fall back to the one that holds all scores.
    repeats = query.shape[1] // key.shape[1]
    if repeats > 1:
        key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    if queries == keys and (window is None or window >= keys):
        return scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling)
    mask = _lower_right(queries, keys, window, query.device)
    return scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling)


def _lower_right(queries, keys, window, device):
    """bool [C, P + C]: query i is key P + i; it sees keys up to itself, `window` at most."""
    own = torch.arange(keys - queries, keys, device=device)[:, None]
    seen = torch.arange(keys, device=device)[None]
    mask = seen <= own
    return mask if window is None else mask & (seen > own - window)


def naive_attention(groups, query, key, value, scaling, window=None):
    """The definition: every completion as its own row behind a copy of its prompt, in float32."""
    repeats = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    out, start = [], 0

    def row(where, kept):
        q, k, v = (x[0][:, where].float() for x in (query, key, value))
        scores = q @ k.transpose(1, 2) * scaling
        mask = _lower_right(len(where), len(where), window, query.device)
        scores = scores.masked_fill(~mask, -torch.inf)
        return (scores.softmax(-1) @ v)[:, kept:].transpose(0, 1)

    for prompt, completions in groups:
        prefix = torch.arange(start, start + prompt)
        out.append(row(prefix, 0))
        own = start + prompt
        for length in completions:
            where = torch.cat([prefix, torch.arange(own, own + length)])
            out.append(row(where, prompt))
            own += length
        start = own
    return torch.cat(out)[None].to(query.dtype)
