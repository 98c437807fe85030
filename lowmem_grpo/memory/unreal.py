"""Running real code on tensors without values: what it reads of them is made up.

Numbers that are read from the device (norms, losses, token ids) are ones. The rows of a wave are
equally many for each problem, which is what a sampler's index arithmetic is told.
"""

from __future__ import annotations

import contextlib

import torch
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
)
from torch.overrides import TorchFunctionMode

from lowmem_grpo.grpo.update import Scored, Scoring
from lowmem_grpo.policy.activations import PAGE_BYTES, HostBuffers
from lowmem_grpo.policy.ends import HostTable

__all__ = ["HOST", "CountedBuffers", "FewTiles", "NoKernels", "Values", "counted_table"]

HOST = "host"
"""The component of what lies on the host."""


class Values(TorchFunctionMode):
    """Answers for values that fake and meta tensors do not have.

    `rules`: what CUDA replaces (see `memory/rules.py`), None on a CPU. `rows_per_problem`,
    `number`, which is what a single value is, and `truth`, what a condition is, may be set at any
    time.
    """

    def __init__(self, rules=None):
        super().__init__()
        self.rules, self.rows_per_problem, self.number, self.truth = rules, 0, 1.0, True

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is torch.Tensor.backward:
            return self._backward(function, args, kwargs)
        if function is torch.Tensor.item:
            return self.number
        if function is torch.Tensor.tolist:
            return [1.0] * args[0].numel()  # of vectors only
        if function is torch.Tensor.cpu:
            return torch.zeros(args[0].shape, dtype=args[0].dtype)
        if function is torch.bincount:  # of problems: its length would depend on values
            return torch.empty(kwargs["minlength"], dtype=torch.int64, device=args[0].device)
        if function is torch.Tensor.repeat_interleave and isinstance(args[1], torch.Tensor):
            return args[0].new_empty(args[0].numel() * self.rows_per_problem)
        if function is torch.Tensor.__bool__:  # whether the plain forward has one sequence a row
            return self.truth
        if function is torch.Tensor.__contains__:  # whether rows have padding, for a warning
            return False
        if function is torch.Tensor.__int__:
            return self.rows_per_problem
        return function(*args, **kwargs)

    def _backward(self, function, args, kwargs):
        """Modes are off while they are asked, and so for all of backward, which under checkpointing
        computes the layers again: the outermost module puts them on, as they were in forward.
        """
        running: list[contextlib.ExitStack] = []

        def before(module, args) -> None:
            running.append(contextlib.ExitStack())
            if len(running) == 1:
                running[0].enter_context(self)
                if self.rules is not None:
                    running[0].enter_context(self.rules.replacements())

        def after(module, args, output) -> None:
            running.pop().close()

        with contextlib.ExitStack() as hooks:
            hooks.callback(register_module_forward_pre_hook(before).remove)
            hooks.callback(register_module_forward_hook(after, always_call=True).remove)
            return function(*args, **kwargs)


class FewTiles(Scoring):
    """Scores the rows of two tiles of the head and of its last one; the others would take the same
    memory once more, after those have given it back.
    """

    def __call__(self, policy, batch, reference_ND=None):
        hidden_ND = self.hidden(policy, batch)
        rows, tile = hidden_ND.shape[0], policy.tiles["tile_tokens"]
        kept = slice(0, min(rows, 2 * tile + rows % tile))
        cut = hidden_ND[kept], batch.targets_N[kept], batch.no_end_N[kept]
        reference_nD = None if reference_ND is None else reference_ND[kept]
        logprobs, entropies, divergences = self.score(policy, *cut, reference_nD)
        rest = 0, rows - logprobs.shape[0]
        if logprobs.requires_grad and not self.entropy_gradient:  # of each row a direction is kept
            logprobs = _Beside.apply(logprobs, torch.empty_like(hidden_ND[: rest[1]]))
        if divergences is not None:  # and another
            divergences = _Beside.apply(divergences, torch.empty_like(hidden_ND[: rest[1]]))
            divergences = torch.nn.functional.pad(divergences, rest)
        padded = (torch.nn.functional.pad(x, rest) for x in (logprobs, entropies))
        return Scored(*padded, divergences)


class _Beside(torch.autograd.Function):
    """Hands on its first argument, and keeps the second for the backward pass."""

    @staticmethod
    def forward(ctx, x, kept):
        ctx.save_for_backward(kept)
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return grad, None


class CountedBuffers(HostBuffers):
    """Tells a recorder how many bytes are on the host, and copies nothing."""

    def __init__(self, recorder):
        super().__init__()
        self.recorder = recorder

    def new_page(self, device: torch.device) -> torch.Tensor:
        self.recorder.add(PAGE_BYTES, component=HOST)
        return torch.empty(0)

    def copy(self, x: torch.Tensor, at: int, *, to_host: bool) -> None:
        pass


class NoKernels:
    """Stands for policy/head_kernels.py, whose kernels work in place and allocate one vector."""

    @staticmethod
    def merge(z_nv, targets_n, running, start, scale):
        return torch.empty_like(running[0])

    @staticmethod
    def probabilities_(z_nv, targets_n, max_n, start, scale):
        return z_nv


def counted_table(recorder) -> type:
    """A `HostTable` that tells a recorder how many bytes are on the host, and holds none."""

    class Counted(HostTable):
        def __init__(self, weight: torch.Tensor):
            self.width, self.dtype = weight.shape[1], weight.dtype
            recorder.add(weight.numel() * weight.element_size(), component=HOST)

        def rows(self, ids: torch.Tensor) -> torch.Tensor:
            return torch.empty((*ids.shape, self.width), dtype=self.dtype, device=ids.device)

    return Counted
