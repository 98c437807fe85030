"""The policy's tensors as those of the plain model that others load: W = base + (alpha / r) B A.

Whatever PEFT wraps is merged: layers in 4 bits, layers that were left in 16, GPT-2's `Conv1D`,
embeddings, and parameters of three dimensions, which hold the experts of a layer. A weight that two
modules share, one of which has an adapter, is two weights from there on.

Names are those of the modules in memory, without PEFT's. A file may have older ones, of which
transformers makes these (run/merge.py).
"""

from collections.abc import Iterator

import bitsandbytes as bnb
import torch
from bitsandbytes.functional import dequantize_4bit
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from lowmem_grpo.errors import ExportError
from lowmem_grpo.policy.ends import tied
from lowmem_grpo.policy.lora import ADAPTER, LoraLinear4bit
from lowmem_grpo.quiet import quiet_libraries

__all__ = ["PlainTensors", "own_tensors"]


class PlainTensors:
    """Every tensor of the plain model, made when it is asked for. `config`: of the plain model,
    nothing of which is quantised; `model`: the plain model on the meta device.

    Raises ExportError where an adapter of the policy is in none of them, and where the policy and
    plain transformers do not have the same tensors.
    """

    def __init__(self, policy, dtype: torch.dtype, adapters: bool = True):
        """Weights come in `dtype`, with the policy's adapters merged unless `adapters` is false;
        buffers come as they are.
        """
        causal_lm = policy.causal_lm
        self._own, self.dtype = policy.dtype, dtype
        self._layers = _adapted(causal_lm) if adapters else {}
        self._sources = dict(_named(causal_lm))
        self.config = _plain_config(causal_lm, dtype, self._layers)
        with torch.device("meta"), quiet_libraries():
            self.model = AutoModelForCausalLM.from_config(self.config, dtype=dtype)
        self._expected = own_tensors(self.model)
        self._conv1d = {
            f"{path}.weight" for path, m in self.model.named_modules() if isinstance(m, Conv1D)
        }
        self._check_names()
        if adapters:
            self._check_adapters(policy)

    def __iter__(self) -> Iterator[str]:
        return iter(self._expected)

    def __getitem__(self, name: str) -> torch.Tensor:
        """A tensor by its name, contiguous, on the CPU."""
        source = self._sources[name]
        tensor = source.detach()
        if isinstance(source, bnb.nn.Params4bit):
            tensor = dequantize_4bit(source.data, source.quant_state)
        for layer in self._layers.get(name, ()):
            tensor = _merged(tensor, layer)
        if isinstance(source, bnb.nn.Params4bit) and name in self._conv1d:
            tensor = tensor.t()  # which has its weight the other way round
        if tensor.shape != self._expected[name].shape:
            raise ExportError(
                f"{name} is {tuple(tensor.shape)} in the policy and "
                f"{tuple(self._expected[name].shape)} in plain transformers"
            )
        # What is held in another precision than the rest is so for a reason, as transformers' own.
        rounded = isinstance(source, torch.nn.Parameter) and (
            isinstance(source, bnb.nn.Params4bit) or source.dtype == self._own
        )
        return tensor.to(self.dtype if rounded else source.dtype).cpu().contiguous()

    def _check_names(self) -> None:
        own, expected = set(self._sources), set(self._expected)
        written = {id(self._sources[name]) for name in own & expected if name not in self._layers}
        shared = {
            name
            for name in own - expected
            if id(self._sources[name]) in written and name not in self._layers
        }
        for what, names in (
            ("plain transformers has, and the policy has not", expected - own),
            ("the policy has, and plain transformers has not", own - expected - shared),
        ):
            if names:
                raise ExportError(
                    f"of the {len(expected)} tensors of a {self.config.model_type} model, "
                    f"{len(names)} are such as {what}, first {min(names)}"
                )

    def _check_adapters(self, policy) -> None:
        merged = {id(p) for each in self._layers.values() for x in each for p in x.parameters()}
        own = policy.adapter_parameters()
        left = [name for name, parameter in own.items() if id(parameter) not in merged]
        if left:
            raise ExportError(
                f"{len(left)} of the {len(own)} tensors of the adapters are on no tensor of the "
                f"plain model, first {left[0]}"
            )


def own_tensors(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Every tensor that a file of a model has: parameters, a shared one once, and the buffers that
    are saved.
    """
    once = {id(p): name for name, p in model.named_parameters()}
    found = {}
    for name, tensor in _named(model):
        if once.get(id(tensor), name) == name:
            found[name] = tensor
    return found


def _named(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters, a shared one under each of its names, and buffers that are saved, without those
    of adapters; by their names without PEFT's.
    """
    for path, module in model.named_modules():
        if "lora_" in path or isinstance(module, LoraLayer):
            continue
        buffers = module.named_buffers(recurse=False)
        saved = [(n, b) for n, b in buffers if n not in module._non_persistent_buffers_set]
        for leaf, tensor in [*module.named_parameters(recurse=False), *saved]:
            yield f"{_plain_path(path)}.{leaf}".removeprefix("."), tensor


def _adapted(model: torch.nn.Module) -> dict[str, list[LoraLayer]]:
    """The layers with an adapter, by the name of the tensor that it is on."""
    found: dict[str, list[LoraLayer]] = {}
    for path, module in model.named_modules():
        if isinstance(module, LoraLayer):
            leaf = module.parameter_name if isinstance(module, ParamWrapper) else "weight"
            found.setdefault(f"{_plain_path(path)}.{leaf}", []).append(module)
    return found


def _plain_path(path: str) -> str:
    """Without the names that PEFT puts between a layer and what it wraps."""
    return ".".join(part for part in path.split(".") if part != "base_layer")


def _plain_config(causal_lm, dtype: torch.dtype, layers: dict[str, list[LoraLayer]]):
    fields = causal_lm.config.to_dict()
    fields.pop("quantization_config", None)
    config = type(causal_lm.config).from_dict(fields)
    config.architectures, config.dtype = [type(causal_lm).__name__], dtype
    if tied(causal_lm):
        weight = causal_lm.get_output_embeddings().weight
        if any(layers.get(name) for name, tensor in _named(causal_lm) if tensor is weight):
            config.tie_word_embeddings = False
    return config


def _merged(weight: torch.Tensor, layer: LoraLayer) -> torch.Tensor:
    """A layer's weight with what its adapter adds. As the layer computes it where that is a sum of
    weights, else in float32.
    """
    with torch.no_grad():
        if isinstance(layer, ParamWrapper) and layer.num_experts > 1:
            lhs, rhs, scaling = layer.get_delta_factors(ADAPTER)
            return torch.baddbmm(weight, lhs, rhs, alpha=scaling)
        if isinstance(layer, LoraLinear4bit):
            a, b = layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight
            return weight.float().addmm_(b, a, alpha=layer.scaling[ADAPTER])
        return weight.float() + layer.get_delta_weight(ADAPTER).float()
