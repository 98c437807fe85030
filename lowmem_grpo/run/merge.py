"""A trained policy as one plain 16-bit model: W = dequantised base + (alpha / r) B A.

Weights are made and written layer by layer, in files of at most `SHARD_BYTES`; the model is never
in memory twice. In the files they have the names that the model's own files have (an expert each,
where transformers holds the experts of a layer together), so that others read them as well.
"""

import copy
import json
import re
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers.core_model_loading import revert_weight_conversion

from lowmem_grpo.policy.plain import PlainTensors
from lowmem_grpo.quiet import quiet_libraries

__all__ = ["merge"]

SHARD_BYTES = 2 * 2**30
INDEX = "model.safetensors.index.json"
_LAYER = re.compile(r".*?\.\d+\.")


def merge(
    policy, output: Path, dtype: torch.dtype | None = None, adapters: bool = True
) -> torch.dtype:
    """Write the policy as a directory that plain transformers loads, with its adapters or as the
    base alone. Returns the dtype: unless given the policy's, or bfloat16 for a float32 one.

    Raises ExportError, before anything is written, where the policy's tensors are not those of the
    plain model.
    """
    if dtype is None:
        dtype = torch.bfloat16 if policy.dtype == torch.float32 else policy.dtype
    plain = PlainTensors(policy, dtype, adapters)
    output.mkdir(parents=True, exist_ok=True)
    model = policy.causal_lm
    with quiet_libraries():
        plain.config.save_pretrained(output)
        policy.tokenizer.save_pretrained(output)
        if model.generation_config is not None:
            copy.deepcopy(model.generation_config).save_pretrained(output)
    _write(_of_files(plain), output)
    return dtype


def _of_files(plain: PlainTensors) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors under the names that files have. Those of a layer are converted together: several
    in memory may be one there.
    """
    layers: dict[str, list[str]] = {}
    for name in plain:
        found = _LAYER.match(name)
        layers.setdefault(found[0] if found else name, []).append(name)
    for names in layers.values():
        converted = revert_weight_conversion(plain.model, {name: plain[name] for name in names})
        for name, tensor in converted.items():
            yield name, tensor.contiguous()


def _write(weights: Iterator[tuple[str, torch.Tensor]], output: Path) -> None:
    """In files of `SHARD_BYTES` at most, with the index that transformers reads."""
    shards: list[list[str]] = []
    held: dict[str, torch.Tensor] = {}
    total = 0

    def put() -> None:
        shards.append(list(held))
        save_file(held, output / f"model-{len(shards):05d}.safetensors", {"format": "pt"})
        held.clear()

    for name, weight in weights:
        size = weight.numel() * weight.element_size()
        if held and sum(w.numel() * w.element_size() for w in held.values()) + size > SHARD_BYTES:
            put()
        # A part of what several names share would be written whole with each.
        whole = weight.untyped_storage().nbytes() == size
        held[name], total = weight if whole else weight.clone(), total + size
    put()
    if len(shards) == 1:
        (output / "model-00001.safetensors").rename(output / "model.safetensors")
        return
    files = {
        name: f"model-{number:05d}.safetensors"
        for number, names in enumerate(shards, 1)
        for name in names
    }
    index = {"metadata": {"total_size": total}, "weight_map": files}
    (output / INDEX).write_text(json.dumps(index, indent=2))
