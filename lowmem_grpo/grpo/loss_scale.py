"""The scale of the loss in float16, whose smallest normal number is above most gradients.

Where scaled gradients overflow, no step is taken, the scale is halved (torch's `GradScaler`), and
the same batch has its gradients computed again: a step is one of AdamW's on every batch, as in
another dtype.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch

from lowmem_grpo.errors import NonFiniteError

__all__ = ["LossScale"]


class LossScale:
    """Scales the loss of a policy that computes in float16; in another dtype there is no `scaler`,
    and nothing is scaled.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype):
        self._device = device.type
        self.scaler = torch.amp.GradScaler(self._device) if dtype == torch.float16 else None

    @property
    def scale(self) -> Callable[[torch.Tensor], torch.Tensor] | None:
        """What the loss goes through before its backward pass; None for nothing."""
        return None if self.scaler is None else self.scaler.scale

    def state(self) -> dict[str, Any]:
        """The scale, and since when it is that, as plain values; nothing where none is used."""
        return {} if self.scaler is None else self.scaler.state_dict()

    def load(self, state: dict[str, Any]) -> None:
        """Go on from a `state`, wherever an update was given up; an empty one is a beginning."""
        if self.scaler is None:
            return
        self.scaler = torch.amp.GradScaler(self._device)
        if state:
            self.scaler.load_state_dict(state)

    def attempts(self, warn: Callable[[str], None]) -> Iterator[None]:
        """Attempts at an update, until a step was taken; `warn` is told of each that is repeated.

        Raises NonFiniteError where gradients are not finite at a scale of 1 either: it is not the
        scale then.
        """
        while True:
            scale = 0.0 if self.scaler is None else self.scaler.get_scale()
            yield
            if self.scaler is None or self.scaler.get_scale() >= scale:
                return
            if scale <= 1.0:
                raise NonFiniteError("the gradients are not finite, with a loss scale of 1 either")
            warn(
                f"the gradients overflowed in float16 with a loss scale of {scale:g}: the update "
                f"is repeated on the same rollouts with {self.scaler.get_scale():g}"
            )
