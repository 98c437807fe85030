"""A reference that is not the base alone: the base with a copy of the adapters.

It is as they were when a run began that starts from an adapter, or when the reference was last
moved to the policy. Our own layers multiply by the copy, which is held in the dtype of their
products (lora.py). In those of PEFT, which compute in other ways, the copy takes the place of the
adapter for as long as the reference is asked, so it is held as the adapter is.
"""

from collections.abc import Iterator

import torch
from peft.tuners.lora import LoraLayer

from lowmem_grpo.errors import ModelError
from lowmem_grpo.policy.lora import ADAPTER, LoraLinear4bit

__all__ = ["KEPT", "KeptReference"]

KEPT = "lora_reference_"  # how the copies' names begin, which no file of the adapter has


class KeptReference:
    """A copy of a PeftModel's adapters, made now, as buffers of their layers."""

    def __init__(self, model, dtype: torch.dtype):
        self._layers, self._others = [], []
        for layer in [m for m in model.modules() if isinstance(m, LoraLayer)]:
            if isinstance(layer, LoraLinear4bit):
                layer.keep_reference(dtype)
                self._layers.append(layer)
                continue
            for name, holder, key in _held(layer):
                copied = holder._parameters[key].detach().clone()
                layer.register_buffer(KEPT + name, copied, persistent=False)
                self._others.append((holder, key, torch.nn.Parameter(copied, False)))
        self._model, self._on = model, False

    def refer(self, on: bool) -> None:
        """Let the layers compute with the copy, or with the adapters again."""
        for layer in self._layers:
            layer.referring = on
        if on is self._on:
            return
        self._on = on
        # An adapter and its copy change places.
        for i, (holder, key, other) in enumerate(self._others):
            self._others[i] = holder, key, holder._parameters[key]
            holder._parameters[key] = other

    def sync(self) -> None:
        """Make the copy what the adapters are now."""
        for layer in self._layers:
            layer.sync_reference()
        for holder, key, kept in self._others:
            kept.data.copy_(holder._parameters[key].detach())

    def tensors(self) -> dict[str, torch.Tensor]:
        """The copies by name."""
        return {name: b for name, b in self._model.named_buffers() if f".{KEPT}" in name}

    def load(self, state: dict[str, torch.Tensor]) -> None:
        """Put a saved copy in its place. Raises ModelError where it does not fit."""
        own = self.tensors()
        if own.keys() != state.keys() or any(own[n].shape != t.shape for n, t in state.items()):
            raise ModelError("the saved reference does not fit this model's adapters")
        for name, tensor in state.items():
            own[name].copy_(tensor)


def _held(layer: LoraLayer) -> Iterator[tuple[str, torch.nn.Module, str]]:
    """The parts of an adapter: of each a name, the module that has it, and its name there."""
    for kind in layer.adapter_layer_names:
        container = getattr(layer, kind)
        if ADAPTER in container:
            name = kind.removeprefix("lora_")
            part = container[ADAPTER]
            if isinstance(part, torch.nn.Module):
                yield name, part, "weight"
            else:
                yield name, container, ADAPTER
