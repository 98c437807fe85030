"""What of the forward pass is kept for the backward pass, where, and what is computed again.

Checkpointing keeps the input of each transformer layer (tokens x D in the compute dtype) and
computes the layer again in backward (Chen et al., arXiv 1604.06174). It is transformers' own, in
torch's non-reentrant form, which passes keyword arguments such as the attention layout through.

Offloading keeps those inputs in pinned host memory instead: layers x tokens x D x 2 bytes of it,
which on the card is what grows fastest with the length. Both copies run on the compute stream, in
order with the kernels that make and use the tensors, so nothing has to be waited for.
"""

import contextlib

import torch

__all__ = ["HostBuffers", "kept_on_host", "set_checkpointing"]

LEAST_BYTES = 1 << 20
"""Smaller tensors stay: a copy costs some microseconds, whatever its length."""


class HostBuffers:
    """Takes tensors of the device to the host and back."""

    def put(self, x: torch.Tensor):
        """A copy of x on the host; what `take` needs to bring it back."""
        host = torch.empty_like(x, device="cpu", pin_memory=x.device.type == "cuda")
        return host.copy_(x, non_blocking=True), x.device

    def take(self, kept) -> torch.Tensor:
        """The tensor of which `put` made `kept`, on its device."""
        host, device = kept
        return host.to(device, non_blocking=True)


@contextlib.contextmanager
def kept_on_host(buffers: HostBuffers):
    """What autograd saves within lies on the host until backward asks for it; parameters and small
    tensors stay.
    """

    def pack(x: torch.Tensor):
        if isinstance(x, torch.nn.Parameter) or x.numel() * x.element_size() < LEAST_BYTES:
            return x
        return (buffers.put(x),)

    def unpack(kept):
        return buffers.take(*kept) if isinstance(kept, tuple) else kept

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield


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
    else:
        getattr(model, f"{kind}_checkpointing_disable")()
