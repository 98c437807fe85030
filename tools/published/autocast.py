"""CUDA's autocast to bfloat16, on fake CPU tensors, as far as these models need it.

The CPU's own autocast has other lists. Under CUDA's, linear layers run in 16 bits, and powers and
roots in float32: a squared ReLU turns a layer's output, and with it every hidden state that
follows, into float32. Source: torch 2.13, aten/src/ATen/autocast_mode.h.

Left out: the cache of cast weights, which holds adapters in 16 bits until forward has ended, and
the operations that these models do not call.
"""

from __future__ import annotations

import torch
from torch.overrides import TorchFunctionMode

LOWER = {torch.nn.functional.linear}
FLOAT32 = {
    getattr(place, name) for place in (torch, torch.Tensor) for name in ("pow", "square", "rsqrt")
} | {torch.Tensor.__pow__}


class CudaAutocast(TorchFunctionMode):
    """It is off in backward, as all modes are: what is computed again there has to enter it."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function in LOWER:
            args = [_cast(x, torch.float32, torch.bfloat16) for x in args]
        elif function in FLOAT32:
            args = [_cast(x, torch.bfloat16, torch.float32) for x in args]
        return function(*args, **(kwargs or {}))


def _cast(x, source: torch.dtype, target: torch.dtype):
    return x.to(target) if isinstance(x, torch.Tensor) and x.dtype == source else x
