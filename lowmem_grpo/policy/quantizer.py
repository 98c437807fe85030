"""bitsandbytes' quantizer of transformers, without a block of the model's size taken beforehand.

`from_pretrained` allocates as many bytes as the model will have on the card and frees them again
before it loads, so that weights come from one segment. Weights that leave the card afterwards (a
head that is rounded to 8 bits, an embedding that moves to the host, a reward model) then leave
holes in a segment that can never be given back: up to a fifth of what the run reserves. The number
of bytes is asked of the quantizer, so this one, registered with transformers, says none.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer
from transformers.utils.quantization_config import QuantizationMethod

__all__ = ["FourBits", "four_bits"]

METHOD = "lowmem_grpo_4bit"


@register_quantization_config(METHOD)
class FourBits(BitsAndBytesConfig):
    """bitsandbytes' 4 bits, loaded by `Quantizer`; afterwards the name of the method is theirs."""

    def __init__(self, load_in_4bit: bool = True, **fields: Any):
        super().__init__(load_in_4bit=load_in_4bit, **fields)
        self.quant_method = METHOD


@register_quantizer(METHOD)
class Quantizer(Bnb4BitHfQuantizer):
    """As transformers' own but for the bytes that are taken before loading."""

    def __init__(self, quantization_config: FourBits, **options: Any):
        super().__init__(quantization_config, **options)
        quantization_config.quant_method = QuantizationMethod.BITS_AND_BYTES

    def param_element_size(
        self, model: PreTrainedModel, param_name: str, param: torch.Tensor
    ) -> float:
        """Bytes of an element, by which `from_pretrained` reckons what to take beforehand: 0."""
        return 0


def four_bits(fields: dict[str, Any]) -> dict[str, Any]:
    """The `quantization_config` of files in bitsandbytes' 4 bits, to be loaded by `Quantizer`."""
    chosen = {name: value for name, value in fields.items() if "load_in_4bit" not in name}
    return {**chosen, "quant_method": METHOD}
