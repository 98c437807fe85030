"""A LoRA layer over a 4-bit linear layer that keeps nothing twice.

    y = base(x) + (alpha / r) B (A x)                 (Hu et al., arXiv 2106.09685, eq. 3)

A and B are float32 masters with float32 gradients and moments; their two products run in the dtype
of x. PEFT's own 4-bit layer casts x to float32 instead: for the 14336-wide input of an 8B model's
down projection, at 32K tokens, that is 1.9 GB for one layer. Here autograd saves x once (for A's
gradient), A x (T x r), and no copy of the output: the adapter's product is added into the base's
result in place.

PEFT finds the layer through `LoraConfig._register_custom_module`, its documented way to bring one's
own. Saving and loading stay PEFT's: parameter names are those of its own layers. Left out: dropout
(two passes over the same tokens must agree), DoRA, merging into 4-bit weights, several adapters at
once.
"""

from collections.abc import Mapping
from typing import Any

import bitsandbytes as bnb
import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer

__all__ = ["ADAPTER", "LoraLinear4bit", "lora_config"]

ADAPTER = "default"


class LoraLinear4bit(torch.nn.Module, LoraLayer):
    """`base_layer`: a bitsandbytes `Linear4bit`. x of [..., in] in the compute dtype gives [...,
    out] in the same.
    """

    def __init__(
        self,
        base_layer,
        adapter_name: str,
        config: LoraConfig,
        r: int,
        lora_alpha: int,
        **kwargs: Any,
    ):
        super().__init__()
        LoraLayer.__init__(self, base_layer)
        self.fan_in_fan_out = False
        self._active_adapter = adapter_name
        self.sampling = None  # while sampling, what computes the layer with its neighbours
        self.referring = False  # whether the adapters are those of `keep_reference`
        self.update_layer(adapter_name, r, lora_alpha=lora_alpha, config=config)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.sampling is not None and self.sampling.takes(x):
            return self.sampling(self, x)
        # Two dimensions: of three, a base with a bias returns a view made inside its own autograd
        # function, and such a view may not be added into.
        rows = x.flatten(0, -2)
        result = self.base_layer(rows)
        if not self.disable_adapters:
            lora_a, lora_b = self._adapter()
            inner = torch.nn.functional.linear(rows, lora_a.to(x.dtype))
            result.addmm_(inner, lora_b.to(x.dtype).t(), alpha=self.scaling[ADAPTER])
        return result.unflatten(0, x.shape[:-1])

    def _adapter(self) -> tuple[torch.Tensor, torch.Tensor]:
        if self.referring:
            return self.lora_reference_A, self.lora_reference_B
        return self.lora_A[ADAPTER].weight, self.lora_B[ADAPTER].weight

    def keep_reference(self, dtype: torch.dtype) -> None:
        """Keep a copy of the adapter, in the dtype that it is multiplied in. No state_dict has it:
        it is no part of the adapter's file.
        """
        a, b = self._adapter()
        self.register_buffer("lora_reference_A", a.detach().to(dtype, copy=True), persistent=False)
        self.register_buffer("lora_reference_B", b.detach().to(dtype, copy=True), persistent=False)

    def sync_reference(self) -> None:
        """Make the copy what the adapter is now."""
        a, b = self._adapter()
        self.lora_reference_A.copy_(a.detach())
        self.lora_reference_B.copy_(b.detach())


def lora_config(*, target_modules, target_parameters=(), **settings: Any) -> LoraConfig:
    """PEFT's configuration with our layer registered for 4-bit linear layers. `settings`: others of
    `LoraConfig`.
    """
    names = target_modules if isinstance(target_modules, str) else list(target_modules)
    plain = {k: dict(v) if isinstance(v, Mapping) else v for k, v in settings.items()}
    config = LoraConfig(
        target_modules=names,
        target_parameters=list(target_parameters) or None,
        lora_dropout=0.0,
        bias="none",
        task_type="CAUSAL_LM",
        **plain,
    )
    config._register_custom_module({bnb.nn.Linear4bit: LoraLinear4bit})
    return config
