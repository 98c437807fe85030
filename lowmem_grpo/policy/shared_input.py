"""Adapted layers that are given the same tensor: their products in one go, while sampling.

A decoding step multiplies a few rows by every weight, and then a call costs as much as its
arithmetic. Queries, keys and values of a layer are three products of one input, gate and up two:

    inner = x [A_1; A_2; ...]^T        one product for all adapters
    y_i   = base_i(x) + (alpha / r) inner_i B_i^T

Which layers are given the same tensor is not a matter of their names: it is seen in a forward pass
(`find`). The adapters are cast and put side by side once a rollout.

On a CPU with AVX512-BF16 the bases are one product as well, by bitsandbytes' inference kernel,
which multiplies by 4-bit weights without unpacking them. It wants them in an order of its own, in
which they have no backward pass: a second copy of the 4 bits (never of the 16), made once. It
rounds the scales of blocks to bfloat16, which moves log-probs by less than bfloat16 itself does.

Shapes: M rows, K input features, N output features of all layers together, r ranks together.
"""

import copy
import weakref

import torch
from bitsandbytes import matmul_4bit
from bitsandbytes.functional import QuantState, dequantize_blockwise

from lowmem_grpo.policy.lora import ADAPTER, LoraLinear4bit

__all__ = ["SharedInput", "few", "find"]

MOST_ROWS = 512
"""With more, arithmetic is all that counts, and the trainer's way is as fast (docs/performance.md).
"""
BLOCK = 64  # weights that share a scale
KERNEL_ROWS = 32  # output features that the inference kernel takes at once


class SharedInput:
    """Layers in the order in which they are called, each once, with one tensor."""

    def __init__(self, layers: list[LoraLinear4bit]):
        self.layers = layers
        self._ready = _Ready(self)
        layers[0].add_module("together", self._ready)
        self.sizes = [layer.base_layer.out_features for layer in layers]
        self.scaling = [layer.scaling[ADAPTER] for layer in layers]
        self.inference = None  # of all bases together, where there is a kernel for it
        self._asked = False
        self._x = None
        self._results: dict[LoraLinear4bit, torch.Tensor] = {}
        self._a_rK, self._b = None, []

    def __call__(self, layer: LoraLinear4bit, x: torch.Tensor) -> torch.Tensor:
        """The layer's output for x of [..., K]; the others' are kept until they ask for it."""
        if x is not self._x or layer not in self._results:
            found = self.products(x.flatten(0, -2))
            shaped = [y.unflatten(0, x.shape[:-1]) for y in found]
            self._x, self._results = x, dict(zip(self.layers, shaped, strict=True))
        result = self._results.pop(layer)
        if not self._results:
            self._x = None
        return result

    def takes(self, x: torch.Tensor) -> bool:
        """Whether it is worth it for so many rows. Is made ready for fewer rows in any case."""
        if self._a_rK is None:
            self._ready(x.flatten(0, -2))
        return few(x)

    def products(self, x_MK: torch.Tensor) -> list[torch.Tensor]:
        """[M, out] of each layer."""
        if self._a_rK is None:
            self._ready(x_MK)
        if self.inference is not None:
            return list(self.joined(x_MK).split(self.sizes, 1))
        inner_Mr = torch.mm(x_MK, self._a_rK.t())
        found = []
        inners = inner_Mr.split([b.shape[0] for b in self._b], 1)
        for layer, b, inner, scaling in zip(
            self.layers, self._b, inners, self.scaling, strict=True
        ):
            y = _base_product(layer.base_layer, x_MK)
            found.append(y.addmm_(inner, b, alpha=scaling))
        return found

    def joined(self, x_MK: torch.Tensor) -> torch.Tensor:
        """[M, N], the layers' outputs side by side."""
        if self._a_rK is None:
            self._ready(x_MK)
        if self.inference is None:
            found = self.products(x_MK)
            return found[0] if len(found) == 1 else torch.cat(found, 1)
        inner_Mr = torch.mm(x_MK, self._a_rK.t())
        y_MN = _base_product(self.inference, x_MK)
        return y_MN.addmm_(inner_Mr, self._b[0], alpha=self.scaling[0])

    def forget(self) -> None:
        """The adapters may change from here on."""
        self._x, self._results, self._a_rK, self._b = None, {}, None, []

    def tensors(self) -> list[tuple[str, torch.Tensor]]:
        """What lives on when sampling is over, by name."""
        if self.inference is None:
            return []
        weight = self.inference.weight
        named = {"weight": weight, "bias": self.inference.bias, **vars(weight.quant_state)}
        return [(f"inference.{n}", x) for n, x in named.items() if isinstance(x, torch.Tensor)]

    def prepare(self, x_MK: torch.Tensor) -> None:
        """Cast the adapters, for x like this."""
        dtype = x_MK.dtype
        if not self._asked:
            self._asked, self.inference = True, _inference_layer(self.layers, dtype)
            if self.inference is not None:
                self.inference(x_MK[:1])  # puts the weight into the kernel's order
        self._a_rK = torch.cat([layer.lora_A[ADAPTER].weight.to(dtype) for layer in self.layers])
        outer = [layer.lora_B[ADAPTER].weight.to(dtype).t() for layer in self.layers]
        if self.inference is not None:  # one product has one factor
            outer = [
                b if scaling == self.scaling[0] else b * (scaling / self.scaling[0])
                for b, scaling in zip(outer, self.scaling, strict=True)
            ]
        self._b = [_diagonal(outer)] if self.inference is not None else outer


class _Ready(torch.nn.Module):
    """Prepares. A module of its own, a child of an adapted layer, so that what is allocated here
    can be told from the rest of sampling.
    """

    def __init__(self, shared: SharedInput):
        super().__init__()
        self._shared = shared

    def forward(self, x_MK: torch.Tensor) -> None:
        self._shared.prepare(x_MK)


def few(x: torch.Tensor) -> bool:
    """Whether x of [..., K] has so few rows that sampling goes a way of its own."""
    return x.numel() <= MOST_ROWS * x.shape[-1]


def find(layers: list[LoraLinear4bit], forward) -> list[SharedInput]:
    """Groups of all `layers`, as `forward()`, which runs each of them once, calls them."""
    groups: list[list[LoraLinear4bit]] = []
    last = lambda: None  # noqa: E731  a dead weak reference

    def called(layer, arguments):
        nonlocal last
        x = arguments[0]
        if last() is x:
            groups[-1].append(layer)
        else:
            groups.append([layer])
        last = weakref.ref(x)

    hooks = [layer.register_forward_pre_hook(called) for layer in layers]
    try:
        forward()
    finally:
        for hook in hooks:
            hook.remove()
    return [SharedInput(group) for group in groups]


def _base_product(base, x_MK: torch.Tensor) -> torch.Tensor:
    """x W^T of a `Linear4bit` whose dtype is that of x: what its forward comes down to."""
    weight = base.weight
    return matmul_4bit(x_MK, weight, quant_state=weight.quant_state, bias=base.bias)


def _diagonal(blocks: list[torch.Tensor]) -> torch.Tensor:
    """[r, N]: the blocks along a diagonal, zeros elsewhere."""
    if len(blocks) == 1:
        return blocks[0]
    whole = blocks[0].new_zeros(sum(b.shape[0] for b in blocks), sum(b.shape[1] for b in blocks))
    row = column = 0
    for block in blocks:
        whole[row : row + block.shape[0], column : column + block.shape[1]] = block
        row, column = row + block.shape[0], column + block.shape[1]
    return whole


def _inference_layer(layers: list[LoraLinear4bit], dtype: torch.dtype):
    """One `Linear4bit` for all bases, in eval mode, or None where it would not be faster.

    In eval mode bitsandbytes puts the weight into its kernel's order at the module's first call.
    """
    bases = [layer.base_layer for layer in layers]
    weights = [base.weight for base in bases]
    states = [weight.quant_state for weight in weights]
    inside, outside = bases[0].in_features, sum(base.out_features for base in bases)
    biases = [base.bias for base in bases if base.bias is not None]
    if not (
        weights[0].device.type == "cpu"
        and dtype == torch.bfloat16
        and bases[0].support_avx512bf16_for_cpu
        and all(state.blocksize == BLOCK for state in states)
        and len({state.quant_type for state in states}) == 1
        and inside % BLOCK == 0  # no block of one row's weights reaches into the next row
        and outside % KERNEL_ROWS == 0
        and len(biases) in (0, len(bases))
    ):
        return None
    state = QuantState(
        torch.cat([_scales(state) for state in states]),
        shape=torch.Size((outside, inside)),
        code=states[0].code,
        blocksize=BLOCK,
        quant_type=states[0].quant_type,
        dtype=dtype,
    )
    # A copy, since a new one would make a whole weight first, and cannot do so on fake tensors.
    layer = copy.copy(bases[0])
    layer.out_features = outside
    layer._parameters = dict.fromkeys(("weight", "bias"))
    layer.weight = torch.nn.Parameter(torch.cat([w.data.view(-1, 1) for w in weights]), False)
    layer.weight.quant_state = state
    if biases:
        layer.bias = torch.nn.Parameter(torch.cat([bias.data for bias in biases]), False)
    return layer.eval()


def _scales(state: QuantState) -> torch.Tensor:
    """float32 [blocks]."""
    if not state.nested:
        return state.absmax.float()
    return dequantize_blockwise(state.absmax, state.state2) + state.offset
