"""What a CUDA card allocates that the dispatcher does not show: one table of named rules.

Three kinds. *Scratch* is what an operation allocates inside its kernel and frees before it returns.
A *workspace* is made at a library's first use on a thread and kept. A *replacement* is an operation
that CUDA runs where the CPU runs something else. They apply when a card is predicted, on fake
tensors; a real run on the CPU is traced without them, a real run on CUDA allocates by itself.

`RULES` says of each rule where it comes from, and how it is known: "source" (read in the library's
source) or "snapshot" (seen in a recorded run as well). Left out, for being small or unknown: the
buffers of reductions over several blocks, of `topk` and of `_foreach_norm`; cub's counters and
histograms; cuDNN's attention, which torch prefers on Hopper and B200 in 16 bits; split keys of
flash attention (queries of a token or two); cuBLASLt's own workspace, where it was told not to
share cuBLAS's.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch.overrides import TorchFunctionMode

from lowmem_grpo.memory.gemm_4bit import is_fused

__all__ = ["RULES", "Card", "CudaRules", "Rule", "Scratch", "StandInAdam8bit"]

FLOAT32 = 4
MATRIX_PRODUCTS = frozenset(
    f"aten::{name}" for name in ("mm", "addmm", "addmm_", "bmm", "baddbmm", "baddbmm_", "addmv")
)
BLOCK_8BIT = 256
LEAST_8BIT = 4096  # parameters with fewer elements keep float32 moments


class Card(Protocol):
    """What the rules ask of a card."""

    compute_capability: tuple[int, int]
    multiprocessors: int | None
    """None where it is not known: products of few rows then count as dequantised."""


class Scratch(NamedTuple):
    """Bytes that an operation takes and gives back.

    `held` is taken before its results are allocated. Then come `steps`: a positive number is taken,
    a negative one frees the oldest of that many bytes. What is left is freed when it returns.
    """

    rule: str
    held: tuple[int, ...] = ()
    steps: tuple[int, ...] = ()


class Rule(NamedTuple):
    """One line of the table. `scratch`: (card, arguments by name) -> (held, steps)."""

    name: str
    operations: tuple[str, ...]
    known: str
    source: str
    scratch: Callable | None = None


def _gemm_is_fused(card, args):
    x = args["A"]
    dtype, rows = str(x.dtype).removeprefix("torch."), x.numel() // x.shape[-1]
    how = card.compute_capability, card.multiprocessors, dtype, rows
    return is_fused(*how, tuple(args["shapeB"]), args["blocksize"])


def _gemm_4bit(card, args):
    x = args["A"]
    if _gemm_is_fused(card, args):
        return (0 if x.is_contiguous() else x.numel() * x.element_size(),), ()
    absmax_8bit = args.get("absmax_8bit")
    nested = () if absmax_8bit is None else (FLOAT32 * absmax_8bit.numel(),) * 2
    return (*nested, math.prod(args["shapeB"]) * x.element_size()), ()


def _flash_backward(card, args):
    query, key = args["query"], args["key"]
    if query.ndim == 3:  # ragged: [tokens, heads, size]; rows are spaced so that blocks may overrun
        tokens, heads, size = query.shape
        padded = tokens + 128 * (args["cu_seq_q"].numel() - 1)
        key_heads, key_tokens = key.shape[1], key.shape[0]
    else:  # [batch, heads, tokens, size]
        batch, heads, tokens, size = query.shape
        padded = batch * _up(tokens, 128)
        key_heads, key_tokens = key.shape[1], batch * key.shape[2]
    row_statistic = FLOAT32 * heads * padded
    accumulator = FLOAT32 * padded * heads * _up(size, 32 if size <= 128 else 64)
    expanded = key_tokens * heads * size * key.element_size() if key_heads != heads else 0
    return (), (row_statistic, accumulator, expanded, expanded)


def _efficient_backward(card, args):
    query, key = args["query"], args["key"]
    batch, heads, tokens, size = query.shape
    wide = FLOAT32 * query.numel()
    copies = () if query.dtype == torch.float32 else (wide, wide)
    rows = FLOAT32 * batch * heads * tokens
    # A lock and a counter stand before the float32 accumulator of each 64 queries.
    accumulator = batch * heads * (_up(tokens, 64) // 64) * (16 + 64 * FLOAT32 * _up(size, 64))
    if query.dtype == torch.float32 and key.shape[2] <= 64:
        accumulator = 0  # the keys are not split
    delta = (*copies, wide, rows, rows, -rows, -wide, *(-copy for copy in copies))
    return (), (*delta, accumulator)


def _sort(card, args):
    x = args["self"]
    along = x.shape[args.get("dim", -1)] if x.ndim else 1
    if along <= 4096:
        return (), ()
    segments, n, width = x.numel() // along, x.numel(), x.element_size()
    if segments == 1 or along >= 1_000_000:
        return (), (8 * along, along * (width + 8))
    buffers = n * (width + 8)
    if segments < 128:  # sorted as one, by value and then by segment
        return (), (8 * n, 8 * n, n * width, buffers, -buffers, -n * width, 8 * n)
    return (), (8 * n, buffers)


def _cumulative(card, args):
    x = args["self"]
    one_row = x.numel() == x.shape[args.get("dim", -1)]
    return (), (max(x.numel() // 512, 1),) if one_row else ()


def _embedding_backward(card, args):
    n = args["indices"].numel()
    return (), (8 * n,) * 3 if n > 3072 else ()


_SDPA = "aten::_scaled_dot_product"
_TORCH = "torch 2.13, aten/src/ATen/native"
RULES = (
    Rule(
        "gemm_4bit",
        ("bitsandbytes::gemm_4bit",),
        "source",
        "bitsandbytes 0.50, backends/cuda/ops.py: the weight dequantised in the dtype of x, and "
        "the absmax of a double-quantised one twice in float32, unless the kernel is fused",
        _gemm_4bit,
    ),
    Rule(
        "flash_backward",
        ("torch_attn::_varlen_attn_backward", f"{_SDPA}_flash_attention_backward"),
        "source",
        f"{_TORCH}/transformers/cuda/flash_attn/flash_api.cpp, mha_bwd and mha_varlen_bwd: float32 "
        "accumulator of dq, row statistic, and dk, dv of every query head where heads share keys",
        _flash_backward,
    ),
    Rule(
        "efficient_backward",
        (f"{_SDPA}_efficient_attention_backward",),
        "snapshot",
        f"{_TORCH}/transformers/cuda/attention_backward.cu; to the byte in the float32 run that "
        "tools/validate_memory.py reproduces, 16 bits from the source alone",
        _efficient_backward,
    ),
    Rule(
        "sort",
        ("aten::sort",),
        "source",
        f"{_TORCH}/cuda/SortStable.cu and cub's radix sort: pairs of index and segment, keys, "
        "alternate buffers",
        _sort,
    ),
    Rule(
        "cumulative",
        ("aten::cumsum", "aten::cumsum_", "aten::cumprod"),
        "source",
        f"{_TORCH}/cuda/ScanUtils.cuh: nothing for rows, cub's tile states for a single one",
        _cumulative,
    ),
    Rule(
        "embedding_backward",
        ("aten::embedding_dense_backward",),
        "source",
        f"{_TORCH}/cuda/Embedding.cu: above 3072 indices they are sorted with their origins",
        _embedding_backward,
    ),
    Rule(
        "cublas_workspace",
        tuple(sorted(MATRIX_PRODUCTS)),
        "snapshot",
        "torch 2.13, aten/src/ATen/cuda/CublasHandlePool.cpp: one for each thread and stream, "
        "backward having a thread of its own. 8,519,680 bytes (seen), 33,554,432 on Hopper (seen) "
        "and Blackwell (source)",
    ),
    Rule(
        "native_dropout",
        ("torch.dropout",),
        "snapshot",
        f"{_TORCH}/Dropout.cpp: CUDA keeps a mask of one byte an element, the CPU a scaled one",
    ),
    Rule(
        "sdpa",
        ("torch.scaled_dot_product_attention",),
        "snapshot",
        f"{_TORCH}/transformers/cuda/sdp_utils.cpp: flash attention in 16 bits without a mask from "
        "compute capability 8.0 (source), else the memory-efficient kernel (seen)",
    ),
    Rule(
        "adam_8bit",
        ("bitsandbytes.optim.AdamW8bit",),
        "source",
        "bitsandbytes 0.50, optim/optimizer.py: two uint8 moments with float32 absmax by 256, "
        "float32 moments below 4096 elements; paged ones of 1e5 elements are not in the allocator",
    ),
)


class CudaRules:
    """The rules for one card, as `memory.trace.Recorder` asks for them."""

    def __init__(self, card: Card):
        self.card = card
        self._scratch = {
            operation: rule
            for rule in RULES
            if rule.scratch is not None
            for operation in rule.operations
        }

    def scratch(self, operation, args: tuple, kwargs: dict) -> Scratch | None:
        """What an operation (an `OpOverload`) allocates out of sight; None for most."""
        rule = self._scratch.get(operation._schema.name)
        if rule is None:
            return None
        held, steps = rule.scratch(self.card, _named(operation, args, kwargs))
        return Scratch(rule.name, tuple(filter(None, held)), tuple(filter(None, steps)))

    def workspace(self, operation, args: tuple, kwargs: dict) -> tuple[str, int]:
        """Name and bytes of the workspace that an operation needs once on each thread; 0: none."""
        needed = operation._schema.name in MATRIX_PRODUCTS
        if operation._schema.name == "bitsandbytes::gemm_4bit":
            # The fused kernel brings its own product; with a dequantised weight it is cuBLAS's.
            needed = not _gemm_is_fused(self.card, _named(operation, args, kwargs))
        large = self.card.compute_capability[0] in (9, 10, 12)
        size = 8 * 4096 * 1024 if large else 2 * 4096 * 1024 + 8 * 16 * 1024
        return "cublas_workspace", size if needed else 0

    def replacements(self) -> TorchFunctionMode:
        """A mode under which functions call what CUDA would.

        It is off within `Tensor.backward`, as every such mode is while it is asked: whoever
        recomputes layers there has to enter it again.
        """
        return _Replacements(self.card)


class _Replacements(TorchFunctionMode):
    """Calls CUDA's operation where the CPU's function would be decomposed otherwise."""

    def __init__(self, card: Card):
        super().__init__()
        self.card = card

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function in (torch.dropout, torch.nn.functional.dropout):
            return self._dropout(*args, **kwargs)
        if function is torch.nn.functional.scaled_dot_product_attention:
            return self._attention(*args, **kwargs)
        made = function(*args, **kwargs)
        if function is torch.tensor and made.is_meta:
            # No operation makes a meta tensor of given values: whoever watches would miss it.
            return torch.empty_like(made, requires_grad=made.requires_grad)
        return made

    def _dropout(self, input, p=0.5, training=True, train=None, inplace=False):
        if not (training if train is None else train) or p == 0.0:
            return input
        found = torch.native_dropout(input, p, True)[0]
        return input.copy_(found) if inplace else found

    def _attention(
        self, query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None,
        enable_gqa=False,
    ):  # fmt: skip
        half = query.dtype != torch.float32
        flash = half and attn_mask is None and self.card.compute_capability >= (8, 0)
        if flash and query.shape[-1] % 8 == 0 and query.shape[-1] <= 256:
            call = torch.ops.aten._scaled_dot_product_flash_attention
            return call(query, key, value, dropout_p, is_causal, scale=scale)[0]
        if enable_gqa:
            repeats = query.shape[1] // key.shape[1]
            key, value = (x.repeat_interleave(repeats, 1) for x in (key, value))
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            zero = torch.zeros((), dtype=query.dtype, device=query.device)
            attn_mask = torch.where(attn_mask, zero, torch.full_like(zero, -torch.inf))
        if attn_mask is not None:
            columns = attn_mask.shape[-1]
            if columns % 8:
                attn_mask = torch.nn.functional.pad(attn_mask, (0, 8 - columns % 8))
                attn_mask = attn_mask[..., :columns]
            rows = query.shape[-2]
            attn_mask = attn_mask.expand(query.shape[0], query.shape[1], rows, columns)
        needs = any(x.requires_grad for x in (query, key, value)) and torch.is_grad_enabled()
        call = torch.ops.aten._scaled_dot_product_efficient_attention
        return call(query, key, value, attn_mask, needs, dropout_p, is_causal, scale=scale)[0]


class StandInAdam8bit(torch.optim.Optimizer):
    """bitsandbytes' 8-bit AdamW for a trace: its state, made in its order, and no arithmetic.

    The real one refuses fake tensors. `paged`: moments of 1e5 elements and more lie in managed
    memory, outside the allocator.
    """

    def __init__(self, parameters, *, paged: bool = False, lr: float = 0.0):
        super().__init__(parameters, {"lr": lr})
        self.paged = paged
        self._maps: dict[torch.device, tuple[torch.Tensor, torch.Tensor]] = {}

    @torch.no_grad()
    def step(self, closure=None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None and not self.state[parameter]:
                    self._make(parameter, self.state[parameter])

    def _make(self, parameter: torch.Tensor, state: dict) -> None:
        device, n = parameter.device, parameter.numel()
        outside = self.paged and n >= 1e5
        if n < LEAST_8BIT:
            state["state1"], state["state2"] = (torch.zeros_like(parameter) for _ in range(2))
            return
        if device not in self._maps:
            self._maps[device] = tuple(torch.empty(256, device=device) for _ in range(2))
        for name in ("state1", "state2"):
            if not outside:
                state[name] = torch.zeros_like(parameter, dtype=torch.uint8)
        blocks = -(-n // BLOCK_8BIT)
        for name in ("absmax1", "absmax2"):
            state[name] = torch.zeros(blocks, device=device)


def _named(operation, args: tuple, kwargs: dict) -> dict:
    names = (argument.name for argument in operation._schema.arguments)
    return dict(zip(names, args, strict=False)) | kwargs


def _up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
