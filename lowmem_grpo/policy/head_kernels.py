"""Triton kernels for the passes over a tile of logits between its two products.

What `policy/logprobs.py` does with ten passes in float32, 64 bytes of memory traffic an element,
takes two kernels here and 10 bytes: one reads the tile and merges its maximum, sums and chosen
logits into those of the tiles before it (the online softmax of Milakov and Gimelshein, arXiv
1805.02867), the other turns the tile into probabilities in place, in its own dtype. Arithmetic is
float32 in registers. docs/kernels.md has what that is worth, and what the compiler makes of it.

Never run on a card: tested in Triton's interpreter and compiled ahead of time. Needs triton, which
torch's CUDA builds bring.

Shapes: n rows and v columns of a tile.
"""

import torch
import triton
import triton.language as tl

__all__ = ["BLOCK", "WARPS", "merge", "merge_kernel", "probabilities_", "probabilities_kernel"]

BLOCK, WARPS = 2048, 8
LOWEST = tl.constexpr(-3.4028234663852886e38)  # of float32
FLOOR = tl.constexpr(-1e4)


@triton.jit
def merge_kernel(
    z_ptr, stride, targets_ptr, max_ptr, sum_ptr, dot_ptr, chosen_ptr, shrink_ptr,
    start, width, scale, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program a row."""
    row = tl.program_id(0)
    z_row = z_ptr + row.to(tl.int64) * stride
    before = tl.load(max_ptr + row)
    high, total, dot = before, tl.load(sum_ptr + row), tl.load(dot_ptr + row)
    for first in range(0, width, BLOCK):
        columns = first + tl.arange(0, BLOCK)
        z = tl.load(z_row + columns, mask=columns < width, other=float("-inf"))
        z = z.to(tl.float32) * scale
        new_high = tl.maximum(high, tl.max(z, 0))
        # All of a block may be forbidden; -inf minus -inf would be NaN.
        safe = tl.maximum(new_high, LOWEST)
        shrink = tl.exp(high - safe)
        p = tl.exp(z - safe)
        # sum p (z - max) rather than sum p z: no cancellation, and 0 x -inf never arises.
        moved = tl.where(total > 0, (high - safe) * total, 0.0)
        dot = (dot + moved) * shrink + tl.sum(p * tl.maximum(z - safe, FLOOR), 0)
        total = total * shrink + tl.sum(p, 0)
        high = new_high
    tl.store(max_ptr + row, high)
    tl.store(sum_ptr + row, total)
    tl.store(dot_ptr + row, dot)
    tl.store(shrink_ptr + row, tl.exp(before - tl.maximum(high, LOWEST)))
    place = tl.load(targets_ptr + row) - start
    inside = (place >= 0) & (place < width)
    chosen = tl.load(z_row + place, mask=inside, other=0.0).to(tl.float32) * scale
    tl.store(chosen_ptr + row, chosen, mask=inside)


@triton.jit
def probabilities_kernel(
    z_ptr, stride, targets_ptr, max_ptr, start, width, scale, BLOCK: tl.constexpr
):
    """One program a row and block of columns."""
    row = tl.program_id(0)
    z_row = z_ptr + row.to(tl.int64) * stride
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    within = columns < width
    z = tl.load(z_row + columns, mask=within, other=float("-inf")).to(tl.float32)
    p = tl.exp(z * scale - tl.maximum(tl.load(max_ptr + row), LOWEST))
    p = tl.where(columns == tl.load(targets_ptr + row) - start, 0.0, p)
    tl.store(z_row + columns, p.to(z_ptr.dtype.element_ty), mask=within)


def merge(
    z_nv: torch.Tensor, targets_n: torch.Tensor, running: tuple, start: int, scale: float
) -> torch.Tensor:
    """Merge a tile of logits (rows contiguous), whose first column is the token `start`, into
    `running`: maximum, sum exp(z - max), sum exp(z - max) (z - max) and chosen logits, float32 [n].

    `targets_n`: int64 tokens. Returns what the sums so far have been multiplied by, float32 [n].
    """
    shrink_n = torch.empty_like(running[0])
    rows, width = z_nv.shape
    with torch.cuda.device_of(z_nv):  # Triton launches on the current card
        merge_kernel[(rows,)](
            z_nv, z_nv.stride(0), targets_n, *running, shrink_n, start, width, scale,
            BLOCK=BLOCK, num_warps=WARPS,
        )  # fmt: skip
    return shrink_n


def probabilities_(
    z_nv: torch.Tensor, targets_n: torch.Tensor, max_n: torch.Tensor, start: int, scale: float
) -> torch.Tensor:
    """Turn a tile of logits into exp(z - max), in place; 0 in the column of the target."""
    rows, width = z_nv.shape
    grid = rows, triton.cdiv(width, BLOCK)
    with torch.cuda.device_of(z_nv):
        probabilities_kernel[grid](
            z_nv, z_nv.stride(0), targets_n, max_n, start, width, scale,
            BLOCK=BLOCK, num_warps=WARPS,
        )  # fmt: skip
    return z_nv
