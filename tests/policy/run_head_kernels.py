"""The head's Triton kernels in Triton's interpreter; a program of its own.

    TRITON_INTERPRET=1 python run_head_kernels.py

Triton asks for its interpreter when kernels are defined, hence the program. Every case prints one
JSON line: the largest error of log-probs, entropies and gradients against float64, of the kernels
and of torch's passes over the same tiles.
"""

import itertools
import json

import torch

from lowmem_grpo.policy import head_kernels
from lowmem_grpo.policy.logprobs import token_logprobs

SHAPES = (
    # rows, hidden size, vocabulary, tile of rows, tile of the vocabulary, columns of a block
    (1, 8, 5, 4, 5, 16),
    (7, 16, 97, 3, 40, 16),
    (5, 24, 130, 5, 130, 32),
    (6, 8, 33, 2, 1, 16),
)
DTYPES = ("float32", "bfloat16", "float16")


def error(found: torch.Tensor, right: torch.Tensor) -> float:
    """Largest difference, over the largest number there is."""
    return ((found.double() - right).abs().max() / right.abs().max().clamp_min(1e-9)).item()


def run(function, hidden_ND, weight_VD, pull_N, how: dict) -> tuple[torch.Tensor, ...]:
    """Log-probs, entropies, and the gradient of a sum of log-probs."""
    hidden_ND = hidden_ND.detach().requires_grad_()
    logp_N, entropy_N = function(hidden_ND, weight_VD, **how)
    (grad_ND,) = torch.autograd.grad((logp_N * pull_N).sum(), hidden_ND)
    return logp_N.detach(), entropy_N.detach(), grad_ND


def main() -> None:
    for number, (shape, name) in enumerate(itertools.product(SHAPES, DTYPES)):
        rows, size, vocab, tile_n, tile_v, head_kernels.BLOCK = shape
        dtype = getattr(torch, name)
        generator = torch.Generator().manual_seed(number)
        hidden_ND = (3 * torch.randn(rows, size, generator=generator)).to(dtype)
        weight_VD = torch.randn(vocab, size, generator=generator).to(dtype)
        targets_N = torch.randint(0, vocab, (rows,), generator=generator)
        banned_N = torch.arange(rows) % 2 == 1
        targets_N[banned_N] = targets_N[banned_N].clamp_min(1)  # the target itself is allowed
        pull_N = torch.linspace(-1, 2, rows)
        how = {"targets_N": targets_N, "temperature": 0.7, "forbidden_ids": (0,)}
        how["forbidden_N"] = banned_N
        given = hidden_ND, weight_VD
        right = run(naive_token_logprobs_64, *given, pull_N.double(), how)
        how |= {"tile_tokens": tile_n, "tile_vocab": tile_v}
        torchs = run(token_logprobs, *given, pull_N, how)
        ours = run(token_logprobs, *given, pull_N, {**how, "kernels": head_kernels})
        errors = {
            "kernels": [error(a, b) for a, b in zip(ours, right, strict=True)],
            "torch": [error(a, b) for a, b in zip(torchs, right, strict=True)],
        }
        print(json.dumps({"case": f"{shape} {name}", **errors}), flush=True)


def naive_token_logprobs_64(hidden_ND, weight_VD, targets_N, **how):
    """In float64 throughout; its own `float()` would round."""
    logits_NV = hidden_ND.double() @ weight_VD.double().t() / how["temperature"]
    hidden = torch.zeros_like(logits_NV, dtype=torch.bool)
    hidden[:, list(how["forbidden_ids"])] = how["forbidden_N"][:, None]
    logp_NV = logits_NV.masked_fill(hidden, -torch.inf).log_softmax(-1)
    entropy_N = -(logp_NV.exp() * logp_NV.clamp_min(-1e4)).sum(-1)
    return logp_NV.gather(1, targets_N[:, None])[:, 0], entropy_N


if __name__ == "__main__":
    main()
