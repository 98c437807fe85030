"""A trained policy as one plain 16-bit model: W = dequantised base + (alpha / r) B A.

Merging rounds: a 16-bit weight keeps 8 to 11 bits, and what an adapter adds to a weight may be less
than its last one. So the merged model is loaded again, by plain transformers, and compared with
the policy on real prompts.

Weights are made and written one after another, in files of at most `SHARD_BYTES`; the model is
never in memory twice.
"""

import copy
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import bitsandbytes as bnb
import torch
from bitsandbytes.functional import dequantize_4bit
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from lowmem_grpo.policy.lora import ADAPTER, LoraLinear4bit
from lowmem_grpo.quiet import quiet_libraries

__all__ = ["Difference", "compare", "merge"]

SHARD_BYTES = 2 * 2**30
ROWS = 64  # whose float64 log-probs are held at once
INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class Difference:
    """Of a merged model from its policy over `tokens` positions: the mean KL(policy || merged) in
    nat, and the share of positions at which both find the same token the likeliest.
    """

    tokens: int
    kl: float
    agreement: float

    def line(self) -> str:
        return (
            f"over {self.tokens} tokens of held-out prompts its mean KL from the trained policy is "
            f"{self.kl:.2g} nat, and the likeliest token is the same in {self.agreement:.1%}"
        )


def merge(policy, output: Path, dtype: torch.dtype | None = None) -> torch.dtype:
    """Write the policy with its adapters as a directory that plain transformers loads. Returns the
    dtype: unless given the policy's, or bfloat16 for a float32 one.
    """
    if dtype is None:
        dtype = torch.bfloat16 if policy.dtype == torch.float32 else policy.dtype
    output.mkdir(parents=True, exist_ok=True)
    model, fields = policy.causal_lm, policy.causal_lm.config.to_dict()
    fields.pop("quantization_config", None)
    config = type(model.config).from_dict(fields)
    config.architectures, config.dtype = [type(model).__name__], dtype
    with quiet_libraries():
        config.save_pretrained(output)
        policy.tokenizer.save_pretrained(output)
        if model.generation_config is not None:
            copy.deepcopy(model.generation_config).save_pretrained(output)
    _write(merged_weights(policy, dtype), output)
    return dtype


def merged_weights(policy, dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor]]:
    """Every weight of the plain model by its name there, on the CPU; a tied one once."""
    modules = dict(policy.causal_lm.named_modules())
    for name, parameter in policy.causal_lm.named_parameters():
        if "lora_" in name:
            continue
        weight = parameter.detach()
        if isinstance(parameter, bnb.nn.Params4bit):
            weight = dequantize_4bit(parameter.data, parameter.quant_state)
            layer = modules[name.removesuffix(".weight").removesuffix(".base_layer")]
            if isinstance(layer, LoraLinear4bit):
                a, b = layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight
                weight = weight.float().addmm_(b.detach(), a.detach(), alpha=layer.scaling[ADAPTER])
        plain = name.replace(".base_layer.", ".")
        yield plain, weight.to(dtype).cpu().contiguous()


def compare(policy, directory: Path, dtype: torch.dtype, prompts: list[list[int]]) -> Difference:
    """The merged model in `directory`, on the CPU, beside the policy, prompt by prompt."""
    with quiet_libraries():
        merged = AutoModelForCausalLM.from_pretrained(
            directory, dtype=dtype, trust_remote_code=False, use_safetensors=True
        ).eval()
    tokens, kl, same = 0, 0.0, 0
    with policy.as_sampler():
        for ids in prompts:
            ids_T = torch.tensor(ids, device=policy.device)
            positions_T = torch.arange(len(ids), device=policy.device)
            hidden_TD = policy.hidden(ids_T, positions_T, policy.layout([(len(ids), ())]))
            theirs_TV = merged(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
            for hidden_nD, theirs_nV in zip(
                hidden_TD.split(ROWS), theirs_TV.split(ROWS), strict=True
            ):
                ours_nV = policy.logits(hidden_nD).cpu().double().log_softmax(-1)
                theirs_nV = theirs_nV.double().log_softmax(-1)
                kl += (ours_nV.exp() * (ours_nV - theirs_nV)).sum().item()
                same += int((ours_nV.argmax(-1) == theirs_nV.argmax(-1)).sum())
            tokens += len(ids)
    return Difference(tokens=tokens, kl=kl / tokens, agreement=same / tokens)


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
        held[name], total = weight, total + size
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
