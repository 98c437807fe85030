"""A policy from a model's configuration alone: every tensor has its shape, and none has values.

What is built is what loading builds: NF4 linear layers with double quantisation, embedding, norms
and head in the compute dtype, our LoRA layers, and a `Policy` around them. On the
meta device, or under a `FakeTensorMode`, it costs no memory, and the phases of a step run on it as
on a loaded model. Of a model's files only `config.json` is read.

Left out: the tokenizer (None), and the comparison of packed and plain logits that loading makes,
which needs values.
"""

import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import bitsandbytes as bnb
import torch
from bitsandbytes.functional import QuantState
from huggingface_hub.errors import StrictDataclassError
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
)
from transformers.pytorch_utils import Conv1D

from lowmem_grpo.errors import ModelError
from lowmem_grpo.plain_json import parse_json
from lowmem_grpo.policy.attention import ATTENTION
from lowmem_grpo.policy.base import AdapterSettings, Policy, attach_adapters
from lowmem_grpo.policy.files import own_code
from lowmem_grpo.policy.quantised import left_in_16_bits, packing, quantisation
from lowmem_grpo.policy.source import DEMO, resolve
from lowmem_grpo.policy.supported import OWN_ATTENTION, check_composite, without_noise
from lowmem_grpo.quiet import quiet_libraries

__all__ = ["fill", "make_4_bit", "read_model_config", "skeleton_policy", "without_weights"]

NESTED_BLOCK = 256
NEEDED = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")


def read_model_config(name: str):
    """The transformers configuration of a model: a directory, a JSON file, the demo model, or a
    Hub id. The network is asked only for a Hub id that is not in the cache.

    Raises ModelError for what is missing or not known.
    """
    path = _config_file(name)
    try:
        fields = parse_json(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ModelError(f"cannot read {path}: {_first_line(error)}") from error
    if not isinstance(fields, dict) or not isinstance(fields.get("model_type"), str):
        raise ModelError(f"{path} has no model_type: not the config.json of a model")
    kind = fields["model_type"]
    known = (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(kind),
        MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES.get(kind),
    )
    if code := own_code(fields, known):
        raise ModelError(
            f"{path} asks for code of its own ({code}), which is never run (trust_remote_code is "
            "off): use a model whose architecture transformers has"
        )
    if kind not in CONFIG_MAPPING:
        raise ModelError(f"{path}: transformers does not know the architecture {kind}")
    check_composite(path, fields)
    _check_fields(path, fields, CONFIG_MAPPING[kind])
    try:
        with quiet_libraries():
            config = AutoConfig.for_model(**_with_infinities(fields))
            without_noise(config)
    except (ValueError, KeyError, TypeError, StrictDataclassError) as error:
        raise ModelError(f"cannot read {path}: {_last_line(error)}") from error
    stored = quantisation(name, str(path.parent), _class_of(config), config)
    if stored is not None:
        config.quantization_config = stored
    elif hasattr(config, "quantization_config"):
        del config.quantization_config  # of files whose weights are plain all the same
    return config


def _class_of(config):
    kinds = config.architectures or ()
    classifies = any(str(kind).endswith("ForSequenceClassification") for kind in kinds)
    return AutoModelForSequenceClassification if classifies else AutoModelForCausalLM


def skeleton_policy(
    model, *, device: str, dtype: torch.dtype, attention: str, tile_tokens: int, tile_vocab: int
) -> Policy:
    """A policy around what `without_weights` made. Each tensor is made on `device` in the order of
    loading: whoever watches sees what a load allocates.
    """
    fill(model, device, dtype)
    return Policy(model, None, attention=attention, tile_tokens=tile_tokens, tile_vocab=tile_vocab)


def _config_file(name: str) -> Path:
    path = Path(name).expanduser()
    if path.is_dir() or path.suffix == ".json":
        file = path / "config.json" if path.is_dir() else path
        if not file.is_file():
            raise ModelError(f"no such file: {file}")
        return file
    source = resolve(name)
    if name == DEMO or Path(source).is_dir():
        return Path(source) / "config.json"
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(source, "config.json"))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        raise ModelError(
            f"{name} is no directory here, not in the local cache, and the Hub cannot be asked: "
            "give a local directory with config.json, or a run's that exists"
        ) from error


def _check_fields(path: Path, fields: dict, config: type) -> None:
    # A field that is left out would silently take the default of some 7B model.
    needed = [*NEEDED, "intermediate_size"] if hasattr(config, "intermediate_size") else NEEDED
    names = getattr(config, "attribute_map", {})
    for name in needed:
        own = names.get(name, name)
        value = fields.get(name, fields.get(own))
        if value is None:
            raise ModelError(f"{path} has no {own}: not the whole config.json of a language model")
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ModelError(f"{path}: {own} = {value!r} must be a whole number above zero")


def _with_infinities(value):
    """transformers writes an infinite number as {"__float__": "Infinity"}."""
    if isinstance(value, dict):
        if value.keys() == {"__float__"} and isinstance(value["__float__"], str):
            return float(value["__float__"])
        return {name: _with_infinities(item) for name, item in value.items()}
    return [_with_infinities(item) for item in value] if isinstance(value, list) else value


def without_weights(config, dtype: torch.dtype, adapters: AdapterSettings):
    """The PeftModel with NF4 layers, on the meta device, with modules as loading arranges them.

    Raises ModelError for an architecture or adapters that do not work.
    """
    try:
        with torch.device("meta"), quiet_libraries():
            model = AutoModelForCausalLM.from_config(
                config, dtype=dtype, attn_implementation=ATTENTION
            ).requires_grad_(False)
            make_4_bit(model, dtype, left_in_16_bits(model, config))
            peft_model = attach_adapters(model, adapters, seed=0).train()
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        if error.args == (ATTENTION,):  # looked up in the model's own table of attentions
            reason = f"a {config.model_type} model is not supported: {OWN_ATTENTION}"
            raise ModelError(reason) from error
        # What a configuration must hold beyond the usual is its architecture's own affair.
        raise ModelError(
            f"cannot build a {config.model_type} model: {_first_line(error)}"
        ) from error
    for module in peft_model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return peft_model


def make_4_bit(model, dtype: torch.dtype, left: Sequence[torch.nn.Module]) -> None:
    """Put a 4-bit layer in the place of each linear one but those that are `left`, stored as the
    model's configuration says.
    """
    for name, linear in list(model.named_modules()):
        if linear in left or type(linear) not in (torch.nn.Linear, Conv1D):
            continue
        out, inside = linear.weight.shape
        if isinstance(linear, Conv1D):  # which has its weight the other way round
            out, inside = inside, out
        stored = packing(name, model.config)
        layer = bnb.nn.Linear4bit(
            inside, out, linear.bias is not None, dtype, stored.nested, stored.kind
        )
        layer.weight.blocksize = stored.blocksize
        if linear.bias is not None:
            layer.bias = linear.bias
        model.set_submodule(name, layer)


def fill(model, device: str, dtype: torch.dtype) -> None:
    """Put a tensor on `device` in the place of each meta tensor: the base first, then adapters.

    Tied weights stay tied. A weight's 16-bit form is on the device while its 4-bit one is made, as
    when files are loaded.
    """
    made: dict[int, torch.Tensor] = {}
    named = [(name, m) for name, m in model.named_modules() if m._parameters or m._buffers]
    base = [m for name, m in named if "lora_" not in name]
    for module in base + [m for name, m in named if "lora_" in name]:
        for name, tensor in module._parameters.items():
            if tensor is None:
                continue
            if id(tensor) not in made:
                quantised = isinstance(tensor, bnb.nn.Params4bit)
                twin = _quantised(module, device, dtype) if quantised else _like(tensor, device)
                made[id(tensor)] = twin
            module._parameters[name] = made[id(tensor)]
        for name, tensor in module._buffers.items():
            if tensor is not None:
                module._buffers[name] = _empty(tensor, device)


def _like(parameter, device: str) -> torch.nn.Parameter:
    return torch.nn.Parameter(_empty(parameter, device), parameter.requires_grad)


def _empty(tensor: torch.Tensor, device: str) -> torch.Tensor:
    # Not `empty_like`: a FakeTensorMode takes no real tensors, which these on meta are.
    return torch.empty(tensor.shape, dtype=tensor.dtype, device=device)


def _quantised(layer, device: str, dtype: torch.dtype) -> torch.nn.Parameter:
    """The packed weight of a `Linear4bit`, with its quantisation state as bitsandbytes makes it."""
    empty = partial(torch.empty, device=device)
    shape = torch.Size((layer.out_features, layer.in_features))
    whole = empty(shape, dtype=dtype)
    weight = torch.nn.Parameter(empty((shape.numel() + 1) // 2, 1, dtype=torch.uint8), False)
    stored = layer.weight
    blocks = math.ceil(shape.numel() / stored.blocksize)
    second = None
    if stored.compress_statistics:
        second = QuantState(
            empty(math.ceil(blocks / NESTED_BLOCK)),
            code=empty(256),
            blocksize=NESTED_BLOCK,
            dtype=torch.float32,
        )
    weight.quant_state = QuantState(
        empty(blocks, dtype=torch.uint8 if second else torch.float32),
        shape=shape,
        code=empty(16),
        blocksize=stored.blocksize,
        quant_type=stored.quant_type,
        dtype=dtype,
        offset=empty(()) if second else None,
        state2=second,
    )
    del whole
    return weight


def _last_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[-1].strip()


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
