"""What a model's files hold in bitsandbytes' 4 bits, told by their tensors.

A weight in 4 bits has `WEIGHT.absmax` and `WEIGHT.quant_state.bitsandbytes__nf4` beside it. The
`quantization_config` of `config.json` says the same in other words: a list of layers that were left
out, under the names that they had in the library that wrote it, and one way for all weights. Where
the two disagree the tensors are right, so the configuration is written anew from them.

Files of other kinds (8 bits, GPTQ, AWQ, FP8, MXFP4) are refused by name.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from bitsandbytes.functional import get_4bit_type
from bitsandbytes.utils import unpack_tensor_to_dict
from safetensors import SafetensorError, safe_open
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.base import get_keys_to_not_convert
from transformers.quantizers.quantizers_utils import should_convert_module

from lowmem_grpo.errors import ModelError
from lowmem_grpo.policy.files import weight_files

__all__ = [
    "Packed",
    "check_quantisation",
    "left_in_16_bits",
    "own_names",
    "packing",
    "quantisation",
]

ABSMAX = ".absmax"
_STATE = re.compile(r"(.*)\.quant_state\.bitsandbytes__(nf4|fp4)")
_STORAGE = {
    "U8": "uint8", "I8": "int8", "BF16": "bfloat16", "F16": "float16", "F32": "float32",
    "F64": "float64",
}  # fmt: skip
# What the tensors of other kinds of quantised files are called.
_OTHERS = {
    ".qweight": "GPTQ or AWQ", ".qzeros": "GPTQ or AWQ", ".SCB": "bitsandbytes' 8 bits",
    ".weight_scale_inv": "FP8", ".weight_scale": "FP8 or compressed-tensors",
    ".weight_packed": "compressed-tensors", "_proj_blocks": "MXFP4",
}  # fmt: skip


@dataclass(frozen=True)
class Packed:
    """How a weight of `shape` is stored in 4 bits: `kind` nf4 or fp4, numbers that share a scale,
    whether scales are in 8 bits, and the dtype that the bytes are written as.
    """

    kind: str
    blocksize: int
    nested: bool
    storage: str
    shape: tuple[int, ...]


def quantisation(name: str, source: str, kind, config) -> dict[str, Any] | None:
    """The `quantization_config` that the files of a model say, with `packed`: how each layer in 4
    bits is stored, by its name in the model. None where the weights are plain. Without files
    (`source`: a Hub id that is not in the cache) it is what `config` says.

    `kind`: transformers' Auto class of the model. Raises ModelError for files that are quantised in
    other ways, or in parts that nothing here computes with.
    """
    fields = getattr(config, "quantization_config", None)
    if fields is not None:
        fields = fields if isinstance(fields, dict) else fields.to_dict()
        check_quantisation(name, fields)
    files = weight_files(source)
    if not files or not all(file.is_file() for file in files):
        return fields
    packed = _packed_weights(files, name)
    if not packed:
        return None
    with torch.device("meta"):
        model = kind.from_config(config)
    return _as_stored(name, model, fields or {}, packed)


def _packed_weights(files: Iterable[Path], name: str) -> dict[str, Packed]:
    """Every weight in 4 bits, by its name in the files."""
    states: dict[str, tuple[str, dict[str, Any]]] = {}
    maps: dict[str, torch.Tensor] = {}
    scaled, nested, kinds = set(), set(), {}
    for path in files:
        try:
            with safe_open(path, framework="pt") as file:
                for key in file.keys():  # noqa: SIM118, which is no dict
                    _refuse_others(name, key)
                    if found := _STATE.fullmatch(key):
                        said = unpack_tensor_to_dict(file.get_tensor(key))
                        states[found[1]] = found[2], said
                    elif key.endswith(ABSMAX):
                        scaled.add(key.removesuffix(ABSMAX))
                    elif key.endswith(".nested_absmax"):
                        nested.add(key.removesuffix(".nested_absmax"))
                    elif key.endswith(".quant_map"):
                        maps[key.removesuffix(".quant_map")] = file.get_tensor(key)
                    else:
                        kinds[key] = file.get_slice(key).get_dtype()
        except (OSError, SafetensorError) as error:
            raise ModelError(f"cannot read {path}: {error}") from error
    for weight in sorted(scaled | states.keys()):
        if weight not in scaled or weight not in states or kinds.get(weight) not in _STORAGE:
            raise ModelError(
                f"{name}: {weight} is in 4 bits and lacks its scales or its state: fetch the files "
                "again"
            )
    return {
        weight: _packed(name, weight, states[weight], maps.get(weight), weight in nested, kind)
        for weight, kind in ((weight, kinds[weight]) for weight in sorted(scaled))
    }


def _packed(name, weight, state, quant_map, nested: bool, storage: str) -> Packed:
    kind, said = state
    # bitsandbytes multiplies by tables of its own, whatever table a file has.
    if quant_map is None or not torch.allclose(
        quant_map.float(), get_4bit_type(kind, device="cpu"), atol=1e-4
    ):
        raise ModelError(
            f"{name}: the 4 bits of {weight} stand for other numbers than {kind}'s: use its 16-bit "
            "weights"
        )
    return Packed(kind, said["blocksize"], nested, _STORAGE[storage], tuple(said["shape"]))


def _refuse_others(name: str, key: str) -> None:
    for end, kind in _OTHERS.items():
        if key.endswith(end):
            raise ModelError(
                f"{name}: its files are quantised as {kind} ({key}): use its 16-bit or "
                "bitsandbytes NF4 weights"
            )


def own_names(model, names: Iterable[str]) -> dict[str, str]:
    """The name in a transformers model (on any device) of each weight that its files call `names`:
    files may be older than the class.
    """
    conversions = get_model_conversion_mapping(model)
    renamings = [each for each in conversions if isinstance(each, WeightRenaming)]
    converters = [each for each in conversions if isinstance(each, WeightConverter)]
    state, prefix = model.state_dict(), model.base_model_prefix
    found = {}
    for name in names:
        own = rename_source_key(name, renamings, converters, prefix, state)[0]
        if own not in state and name in state:
            own = rename_source_key(name, [], [], prefix, state)[0]
        found[name] = own
    return found


def _as_stored(name: str, model, fields: dict[str, Any], packed: dict[str, Packed]):
    linear = {
        f"{path}.weight": path
        for path, module in model.named_modules()
        if type(module) in (torch.nn.Linear, Conv1D)
    }
    own = own_names(model, packed)
    if odd := sorted(weight for weight, mine in own.items() if mine not in linear):
        raise ModelError(
            f"{name}: {odd[0]} is in 4 bits, and no linear layer of transformers' "
            f"{type(model).__name__} has it ({len(odd)} such): use its 16-bit weights"
        )
    ways = {stored.storage for stored in packed.values()}
    if len(ways) > 1:
        raise ModelError(
            f"{name}: its 4-bit weights are stored as {' and '.join(sorted(ways))}: use its "
            "16-bit weights"
        )
    stored = set(own.values())
    head = model.get_output_embeddings()
    for weight, mine in own.items():
        if model.get_submodule(linear[mine]) is head:
            raise ModelError(f"{name}: its head {weight} is in 4 bits: use its 16-bit weights")
    first = next(iter(packed.values()))
    blocks = {linear[mine]: packed[weight] for weight, mine in own.items()}
    return {
        **fields,
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": first.kind,
        "bnb_4bit_use_double_quant": all(each.nested for each in packed.values()),
        "bnb_4bit_quant_storage": first.storage,
        # Patterns, of which transformers looks for a match at the start of a name.
        "llm_int8_skip_modules": [
            f"{re.escape(path)}$" for weight, path in linear.items() if weight not in stored
        ],
        "packed": blocks,
    }


def check_quantisation(name: str, fields: dict) -> None:
    """Raises ModelError unless a model's `quantization_config` is bitsandbytes' 4 bits."""
    method = fields.get("quant_method")
    if method == "bitsandbytes" and fields.get("load_in_8bit"):
        method = "bitsandbytes' 8 bits (load_in_8bit)"
    elif method == "bitsandbytes" and fields.get("load_in_4bit"):
        return
    raise ModelError(
        f"{name} is quantised by {method}, not in bitsandbytes' 4 bits: "
        "use its 16-bit or bitsandbytes NF4 weights"
    )


def left_in_16_bits(model, config) -> list[torch.nn.Module]:
    """The linear layers of a model that stay in 16 bits: the head, and whatever a
    `quantization_config` leaves out, as its files have it or by its own list.
    """
    fields = getattr(config, "quantization_config", None)
    named, left = list(model.named_modules()), [model.get_output_embeddings()]
    if not isinstance(fields, dict):
        return left
    if "packed" in fields:
        return [module for path, module in named if path not in fields["packed"]]
    skip = fields.get("llm_int8_skip_modules")
    skip = get_keys_to_not_convert(model) if skip is None else skip
    return left + [module for path, module in named if not should_convert_module(path, skip)]


def packing(path: str, config) -> Packed:
    """How the layer at `path` is stored in 4 bits, by a configuration; as we quantise where it says
    nothing.
    """
    fields = getattr(config, "quantization_config", None)
    if not isinstance(fields, dict):
        return Packed("nf4", 64, True, "uint8", ())
    if stored := fields.get("packed", {}).get(path):
        return stored
    kind, nested = fields.get("bnb_4bit_quant_type", "fp4"), fields.get("bnb_4bit_use_double_quant")
    return Packed(kind, 64, bool(nested), "uint8", ())
