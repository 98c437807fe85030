"""A trained adapter as a file that llama.cpp loads beside a GGUF of the base (`--lora`).

    general.type = adapter, adapter.type = lora, adapter.lora.alpha
    blk.N.attn_q.weight.lora_a [r, in], blk.N.attn_q.weight.lora_b [out, r], ...

Names, metadata and shapes are those of llama.cpp's convert_lora_to_gguf.py, also that queries and
keys of Llama's relatives have their halves interleaved. llama.cpp multiplies each layer's product
by alpha over its rank: another factor is multiplied into B. Numbers stay float32.

Left out: architectures whose tensors llama.cpp arranges in other ways, experts, and merged models
in GGUF, for which llama.cpp has its own program (convert_hf_to_gguf.py, on `--format merged`).
"""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import gguf
import numpy as np
import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import Embedding, Linear, ParamWrapper

from lowmem_grpo.errors import ConfigError, ExportError
from lowmem_grpo.policy.lora import ADAPTER, LoraLinear4bit

__all__ = ["check_architecture", "check_gguf_adapter", "write_gguf_adapter"]

# By model_type; whether llama.cpp interleaves the halves of queries and keys.
_KNOWN = {
    "llama": (gguf.MODEL_ARCH.LLAMA, True),
    "mistral": (gguf.MODEL_ARCH.LLAMA, True),
    "arcee": (gguf.MODEL_ARCH.ARCEE, True),
    "smollm3": (gguf.MODEL_ARCH.SMOLLM3, True),
    "qwen2": (gguf.MODEL_ARCH.QWEN2, False),
    "qwen3": (gguf.MODEL_ARCH.QWEN3, False),
    "gemma3_text": (gguf.MODEL_ARCH.GEMMA3, False),
    "phi3": (gguf.MODEL_ARCH.PHI3, False),
    "starcoder2": (gguf.MODEL_ARCH.STARCODER2, False),
    "apertus": (gguf.MODEL_ARCH.APERTUS, False),
}
_CLOSE = 1e-5  # of a product of A and B, relative: a factor in B rounds once


class _Layer(NamedTuple):
    """An adapted layer: its name in the file, A [r, in], B [out, r], the factor of their product,
    and how many heads B's rows are interleaved in, or None.
    """

    name: str
    a: torch.Tensor
    b: torch.Tensor
    scaling: float
    heads: int | None


def check_architecture(model_type: str) -> None:
    """Raises ConfigError for a kind of model that no GGUF adapter is written for."""
    if model_type not in _KNOWN:
        raise ConfigError(
            f"--format gguf writes adapters of {', '.join(_KNOWN)} models, not of {model_type}: "
            "use --format adapter, and llama.cpp's convert_lora_to_gguf.py on it"
        )


def write_gguf_adapter(policy, path: Path, name: str) -> None:
    """Write the policy's adapters. `name`: what the file calls itself. Raises ConfigError for
    layers that llama.cpp takes no adapter on.
    """
    layers, alpha = list(_layers(policy)), _alpha(policy)
    arch, _ = _KNOWN[policy.causal_lm.config.model_type]
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[arch])
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
    writer.add_name(name)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    for layer in layers:
        a, factor = layer.a, layer.scaling / (alpha / layer.a.shape[0])
        b = layer.b if abs(factor - 1) < 1e-9 else layer.b * factor
        b = b if layer.heads is None else _interleaved(b, layer.heads)
        a = a.t() if layer.name == "token_embd" else a  # which is looked up, and not multiplied
        for kind, tensor in (("lora_a", a), ("lora_b", b)):
            writer.add_tensor(f"{layer.name}.weight.{kind}", tensor.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def check_gguf_adapter(policy, path: Path) -> int:
    """Read the file again and compare it with the policy: each layer's product, as llama.cpp makes
    it. Returns the number of layers. Raises ExportError where it is another adapter.
    """
    reader = gguf.GGUFReader(path)
    fields = {
        key: None if (field := reader.get_field(key)) is None else field.contents()
        for key in (gguf.Keys.General.TYPE, gguf.Keys.Adapter.TYPE, gguf.Keys.Adapter.LORA_ALPHA)
    }
    if list(fields.values())[:2] != [gguf.GGUFType.ADAPTER, "lora"]:
        raise ExportError(f"the file says of itself {fields}")
    alpha = fields[gguf.Keys.Adapter.LORA_ALPHA]
    tensors = {tensor.name: torch.from_numpy(np.array(tensor.data)) for tensor in reader.tensors}
    layers = list(_layers(policy))
    for layer in layers:
        a, b = (tensors.pop(f"{layer.name}.weight.{kind}", None) for kind in ("lora_a", "lora_b"))
        if a is None or b is None:
            raise ExportError(f"{layer.name} is not in the file")
        a = a.t() if layer.name == "token_embd" else a
        if layer.heads is not None:
            rows = _interleaved(torch.arange(len(b))[:, None], layer.heads)[:, 0]
            plain = torch.empty_like(b)
            plain[rows] = b
            b = plain
        theirs, ours = (b @ a) * (alpha / len(a)), (layer.b @ layer.a) * layer.scaling
        apart = ((theirs - ours).norm() / ours.norm().clamp_min(1e-30)).item()
        if not apart < _CLOSE:
            raise ExportError(f"{layer.name} differs from the policy's by {apart:.2g}, relative")
    own = sum(isinstance(m, LoraLayer) for m in policy.model.modules())
    if tensors or own != len(layers):
        raise ExportError(f"{len(tensors)} tensors of the file are none of the policy's")
    return len(layers)


def _alpha(policy) -> float:
    return float(policy.model.peft_config[ADAPTER].lora_alpha)


def _layers(policy) -> Iterator[_Layer]:
    model = policy.causal_lm
    config = model.config
    arch, interleaves = _KNOWN[config.model_type]
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    of_heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for path, layer in model.named_modules():
        if not isinstance(layer, LoraLayer):
            continue
        name = names.get_name(path)
        known = isinstance(layer, (LoraLinear4bit, Linear, Embedding))
        scaled = getattr(layer.get_base_layer(), "embed_scale", None) is not None
        if name is None or not known or scaled or isinstance(layer, ParamWrapper):
            raise ConfigError(
                f"--format gguf: llama.cpp takes no adapter on {path} of {config.model_type} "
                "models: leave it out of lora.target_modules"
            )
        if isinstance(layer, Embedding):
            a, b = layer.lora_embedding_A[ADAPTER], layer.lora_embedding_B[ADAPTER]
        else:
            a, b = layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight
        heads = of_heads.get(path.rpartition(".")[2]) if interleaves else None
        a, b = (x.detach().float().cpu() for x in (a, b))
        yield _Layer(name, a, b, layer.scaling[ADAPTER], heads)


def _interleaved(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows [heads * size, ...] with the two halves of each head in turns."""
    halves = rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:])
    return halves.swapaxes(1, 2).reshape(rows.shape)
