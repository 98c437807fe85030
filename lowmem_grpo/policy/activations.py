"""What of the forward pass is kept for the backward pass, where, and what is computed again.

Checkpointing keeps the input of each transformer layer (tokens x D in the compute dtype) and
computes the layer again in backward (Chen et al., arXiv 1604.06174). It is transformers' own, in
torch's non-reentrant form, which passes keyword arguments such as the attention layout through.

Offloading keeps those inputs in pinned host memory instead: layers x tokens x D x 2 bytes of it,
which on the card is what grows fastest with the length. They lie end to end in pages of one size,
so what is pinned is what they take, rounded up to a page, and a page serves any shape: pages are
pinned once and used by every micro-batch.

With `overlap`, the copies run on a stream of their own beside the layers' kernels: a tensor that is
leaving stays on the card until its layer has been computed, and in backward the next one arrives
while a layer is. That is one layer's input more on the card, in exchange for the time of the
copies. Without it copies run in order with the kernels, and nothing has to be waited for.
"""

import contextlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from transformers.modeling_layers import GradientCheckpointingLayer

__all__ = [
    "PAGE_BYTES", "HostBuffers", "SideStream", "checkpointed_layers", "held_by_autograd",
    "kept_on_host", "set_checkpointing",
]  # fmt: skip

LEAST_BYTES = 1 << 20
"""Smaller tensors stay: a copy costs some microseconds, whatever its length."""
PAGE_BYTES = 64 << 20
"""A power of two: torch's pinned allocator rounds up to one (ATen/core/CachingHostAllocator.h)."""


class SideStream:
    """A CUDA stream of a device for copies."""

    def __init__(self, device: torch.device):
        self._device = device
        self._stream = torch.cuda.Stream(device)

    def run(self, copy: Callable[[], None]):
        """Start copying when all that was asked for so far is done; returns what `wait` takes."""
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            copy()
        return self._stream.record_event()

    def wait(self, done) -> None:
        """What is asked for from here on begins after that copy."""
        torch.cuda.current_stream(self._device).wait_event(done)


class Kept(NamedTuple):
    """A tensor on the host: its number in the order in which they were put there, and its first
    byte.
    """

    number: int
    at: int
    shape: torch.Size
    dtype: torch.dtype
    device: torch.device

    @property
    def size(self) -> int:
        return self.shape.numel() * self.dtype.itemsize


class HostBuffers:
    """Takes tensors of the device to the host and back, those of one forward pass at a time."""

    def __init__(self, side: Any = None):
        """`side`: a `SideStream`; left out, one is made for the first tensor of a card."""
        self.pages: list[torch.Tensor] = []
        self._side = side
        self._overlap = False
        self._kept: list[Kept] = []
        self._leaving: tuple | None = None  # (tensor, when it has left)
        self._arriving: dict[int, tuple] = {}  # number: (tensor, when it has arrived)

    def begin(self, overlap: bool) -> None:
        """A forward pass begins; what the one before it kept may be overwritten."""
        self.forget()
        self._overlap = overlap

    def forget(self) -> None:
        """Let go of what is on the device: a pass that did not get to its end fetched it."""
        self.let_go()
        for _, done in self._arriving.values():
            self._wait(done)
        self._arriving.clear()
        self._kept.clear()

    def let_go(self) -> None:
        """What is leaving has left, for whatever is asked for from here on."""
        if self._leaving is not None:
            self._wait(self._leaving[1])
            self._leaving = None

    def put(self, x: torch.Tensor) -> Kept:
        """Copy x to the host; returns what `take` needs to bring it back."""
        x = x.contiguous()
        last = self._kept[-1] if self._kept else None
        at = last.at + last.size if last else 0
        kept = Kept(len(self._kept), at, x.shape, x.dtype, x.device)
        self._kept.append(kept)
        while len(self.pages) * PAGE_BYTES < kept.at + kept.size:
            self.pages.append(self.new_page(x.device))
        self.let_go()
        # By the tensor: a plan's are on meta, and a CPU's need no stream where there is a card too.
        if self._overlap and self._side is None and _on_a_card(x):
            self._side = SideStream(x.device)
        done = self._run(lambda: self.copy(x, kept.at, to_host=True))
        if self._overlap:
            self._leaving = x, done
        return kept

    def take(self, kept: Kept) -> torch.Tensor:
        """The tensor of which `put` made `kept`, on its device."""
        x, done = self._arriving.pop(kept.number, None) or self._bring(kept)
        self._wait(done)
        before = kept.number - 1  # backward asks for them in the reverse order
        if self._overlap and before >= 0 and before not in self._arriving:
            self._arriving[before] = self._bring(self._kept[before])
        return x

    def new_page(self, device: torch.device) -> torch.Tensor:
        """uint8 [PAGE_BYTES] on the host, for tensors of that device."""
        pinned = device.type == "cuda"
        there = pinned and torch.cuda.is_available()  # as in `_on_a_card`
        # For that card: or the current one, another, would get a context.
        with torch.cuda.device(device) if there else contextlib.nullcontext():
            return torch.empty(PAGE_BYTES, dtype=torch.uint8, pin_memory=pinned)

    def copy(self, x: torch.Tensor, at: int, *, to_host: bool) -> None:
        """Copy a contiguous tensor to the pages from byte `at` on, or from there."""
        x_bytes, done = x.view(-1).view(torch.uint8), 0
        while done < x_bytes.numel():
            page, start = divmod(at + done, PAGE_BYTES)
            count = min(PAGE_BYTES - start, x_bytes.numel() - done)
            here, there = x_bytes[done : done + count], self.pages[page][start : start + count]
            (there if to_host else here).copy_(here if to_host else there, non_blocking=True)
            done += count

    def _bring(self, kept: Kept) -> tuple:
        x = torch.empty(kept.shape, dtype=kept.dtype, device=kept.device)
        return x, self._run(lambda: self.copy(x, kept.at, to_host=False))

    def _run(self, copy: Callable[[], None]):
        if self._overlap and self._side is not None:
            return self._side.run(copy)
        return copy()

    def _wait(self, done) -> None:
        if done is not None:
            self._side.wait(done)


def _on_a_card(x: torch.Tensor) -> bool:
    return x.device.type == "cuda" and torch.cuda.is_available()  # a fake tensor's may not be


@contextlib.contextmanager
def kept_on_host(
    buffers: HostBuffers, overlap: bool = False, layers: Sequence[torch.nn.Module] = ()
):
    """What autograd saves within, a forward pass, lies on the host until backward asks for it;
    parameters and small tensors stay. Its backward has to be over before the next begins.
    `layers`: what is leaving when one of them begins has left when it ends.
    """

    def pack(x: torch.Tensor):
        if isinstance(x, torch.nn.Parameter) or x.numel() * x.element_size() < LEAST_BYTES:
            return x
        return buffers.put(x)

    def unpack(kept):
        return buffers.take(kept) if isinstance(kept, Kept) else kept

    buffers.begin(overlap)
    hooks = [layer.register_forward_hook(lambda *_: buffers.let_go()) for layer in layers]
    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            yield
    finally:
        for hook in hooks:
            hook.remove()
        buffers.let_go()


def held_by_autograd(x: torch.Tensor) -> torch.Tensor:
    """x, which asks for no gradient, as something that does (and gets none). A checkpointed layer
    holds inputs that ask for none by itself, out of reach of `kept_on_host`.
    """
    return _Held.apply(x, x.new_empty(0).requires_grad_())


class _Held(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, anchor):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return None, None


def checkpointed_layers(model: torch.nn.Module) -> list[torch.nn.Module]:
    """The layers of a transformers model that checkpointing computes again."""
    return [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]


def set_checkpointing(model, enabled: bool) -> None:
    """Switch layer checkpointing of a transformers model on or off. Takes effect in train mode
    only.
    """
    # transformers 5.23 renamed the pair and warns about the old names, which are all that 5.0 has.
    kind = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
    if enabled:
        # No random numbers are drawn in the forward pass (dropout is off), so their state need not
        # be kept.
        switch = getattr(model, f"{kind}_checkpointing_enable")
        switch({"use_reentrant": False, "preserve_rng_state": False})
        # The switch makes the embedding's output ask for a gradient, by one more hook each time:
        # a leaf, which autograd holds on the device, and whose gradient nobody wants. (transformers
        # 5.0 does so for some models only, and has nothing to take back for others.)
        with contextlib.suppress(AttributeError):
            model.disable_input_require_grads()
    else:
        getattr(model, f"{kind}_checkpointing_disable")()
