"""The losses of the published runs: hidden states [1, T, D] and the head to a number."""

from __future__ import annotations

import torch
from torch.nn.functional import cross_entropy

CHUNKS = 8


def full_logits(head, hidden_1TD, labels_1T):
    """transformers until 4.44: float32 logits of all tokens, shifted into a contiguous copy. The
    logits are the model's output, which lives until the trainer has taken the loss from it.
    """
    logits = head(hidden_1TD).float()
    shifted = logits[..., :-1, :].contiguous().view(-1, logits.shape[-1])
    return cross_entropy(shifted, labels_1T[..., 1:].contiguous().view(-1))


def chunked(head, hidden_1TD, labels_1T):
    """torchtune's chunked cross entropy: logits in 16 bits, in eight parts that all live until
    backward, each part's loss in one compiled kernel.
    """
    parts = [head(part) for part in hidden_1TD.chunk(CHUNKS, dim=1)]
    return sum(_Compiled.apply(part) for part in parts) / hidden_1TD.shape[1]


def cut(head, hidden_1TD, labels_1T):
    """Cut cross entropy (Apple): no logits, and no gradient of a frozen head."""
    hidden = hidden_1TD.to(head.weight.dtype).flatten(0, 1)
    return _Cut.apply(hidden).mean()


class _Compiled(torch.autograd.Function):
    """A cross entropy fused into one kernel: it keeps the logits and a number a token."""

    @staticmethod
    def forward(ctx, logits):
        ctx.save_for_backward(logits, logits.new_empty(logits.shape[:-1], dtype=torch.float32))
        return logits.new_empty((), dtype=torch.float32)

    @staticmethod
    def backward(ctx, grad):
        return torch.empty_like(ctx.saved_tensors[0])


class _Cut(torch.autograd.Function):
    """Keeps the hidden states and a number a token; sorting of the vocabulary left out."""

    @staticmethod
    def forward(ctx, hidden_TD):
        tokens = hidden_TD.shape[0]
        ctx.save_for_backward(hidden_TD, hidden_TD.new_empty(tokens, dtype=torch.float32))
        return hidden_TD.new_empty(tokens, dtype=torch.float32)

    @staticmethod
    def backward(ctx, grad):
        return torch.zeros_like(ctx.saved_tensors[0])
