"""What a tracer has to know of autograd: which node runs, and what it does only when watched.

Autograd adds gradients in place where it alone holds them, and keeps a parameter's first gradient
as it is. It does neither for tensor subclasses nor while a dispatch mode is active, which is to say
in every trace: there it makes a new tensor, and the old one ends at once. `is_accumulation` names
these operations, so that a trace can let the new tensor take the place of the old one. Of the
TinyLlama run of tools/validate_memory.py, this is what makes the counts of all sizes the card's.

Source: torch 2.13, torch/csrc/autograd/input_buffer.cpp and functions/accumulate_grad.h.
"""

from __future__ import annotations

import sys

import torch
import torch._dynamo.eval_frame

__all__ = ["ACCUMULATING", "OF_NO_ORDER", "is_accumulation", "running_node"]

OF_NO_ORDER = 2**64 - 1
"""The sequence number of the nodes that add up a parameter's gradient."""
ADD = torch.ops.aten.add.Tensor
ACCUMULATING = (ADD, torch.ops.aten.new_empty_strided.default)
# Python frames between an operation that the engine runs and the engine.
_BETWEEN = ("memory/trace.py", "torch/_compile.py", "torch/_dynamo/eval_frame.py")


def running_node():
    """The autograd node that is running, None outside backward."""
    return torch._C._current_autograd_node()


def is_accumulation(operation) -> bool:
    """Whether the engine itself runs this one of `ACCUMULATING`, to add up gradients or keep one.

    To be asked from within a dispatch mode.
    """
    node = running_node()
    if node is None:
        return False
    if node._sequence_nr() == OF_NO_ORDER:
        return True
    frame = sys._getframe(1)
    while frame is not None and frame.f_code.co_filename.replace("\\", "/").endswith(_BETWEEN):
        frame = frame.f_back
    # On CUDA the engine has a thread of its own, without Python frames above.
    return operation is ADD and (frame is None or frame.f_code.co_name == "_engine_run_backward")
