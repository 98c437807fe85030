"""A LoRA adapter in PEFT's format, made here or elsewhere: what its files say.

What an adapter needs to be computed is used: ranks, scales, and the layers it is on. What is there
beside that and would change the model is refused by its name, and so is a field that this program
does not know. What only training needs (dropout, how A began) is left.
"""

import re
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from peft import LoraConfig
from safetensors import SafetensorError, safe_open

from lowmem_grpo.errors import ModelError
from lowmem_grpo.policy.adapters import AdapterSettings
from lowmem_grpo.policy.source import read_object

__all__ = ["CONFIG", "DEMO_HOME", "WEIGHTS", "AdapterFile", "is_adapter", "read_adapter_file"]

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
DEMO_HOME = "HuggingFaceTB/SmolLM2-135M-Instruct"
"""Whose weights the demo model's file holds in Q4_1."""
PREFIX = "base_model.model."  # of each tensor's name
_USED = {"r", "lora_alpha", "target_modules", "target_parameters", "rank_pattern", "alpha_pattern"}
_USED |= {"use_rslora"}
# By these PEFT leaves layers out, which are then not in the file either.
_NARROWING = {"exclude_modules", "layers_to_transform", "layers_pattern"}
# What says nothing of the model: about training, about the base, or for one kind of layer alone.
_LEFT = {
    *("peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path"),
    *("revision", "inference_mode", "lora_dropout", "init_lora_weights", "fan_in_fan_out"),
    *("megatron_core", "runtime_config", "qalora_group_size", "loftq_config", "eva_config"),
    *("corda_config", "lora_ga_config", "ensure_weight_tying"),
}
# Ways to begin that change the base: the adapter is one of another base than is named.
_CHANGES_BASE = ("pissa", "olora", "loftq", "corda", "lora_ga")
_LAYER = re.compile(r"\.lora_(embedding_)?[AB](\.weight)?$")


@dataclass(frozen=True)
class AdapterFile:
    """`base`: the model that it names as its own, or None; `settings`: those of its layers;
    `chat_template`: the file beside it with the template that it was trained with, or None.
    """

    path: Path
    base: str | None
    settings: AdapterSettings
    chat_template: Path | None = None


def is_adapter(path: Path) -> bool:
    """Whether a directory holds an adapter, and not a model."""
    return (path / CONFIG).is_file() and not (path / "config.json").is_file()


def read_adapter_file(path: Path) -> AdapterFile:
    """The settings of the adapter in a directory. Raises ModelError for one that cannot be had, and
    for one that is more than this program computes.
    """
    if not path.is_dir():
        raise ModelError(f"no such adapter directory: {path}")
    if not (path / CONFIG).is_file():
        raise ModelError(f"{path} has no {CONFIG}: not an adapter in PEFT's format")
    if not (path / WEIGHTS).is_file():
        other = path / "adapter_model.bin"
        kind = f" (it has {other.name}, which is a pickle)" if other.is_file() else ""
        raise ModelError(f"{path} has no {WEIGHTS}{kind}: save it with safetensors")
    found = read_object(path / CONFIG)
    if str(found.get("peft_type")).upper() != "LORA":
        raise ModelError(f"{path} is an adapter of type {found.get('peft_type')}, not LORA")
    _check_fields(path, found)
    base = found.get("base_model_name_or_path")
    base = base if isinstance(base, str) and base else None
    return AdapterFile(path, base, _settings(path, found), _template(path))


def _template(path: Path) -> Path | None:
    if (path / "chat_template.jinja").is_file():
        return path / "chat_template.jinja"
    older = path / "tokenizer_config.json"
    if older.is_file() and isinstance(read_object(older).get("chat_template"), str):
        return older
    return None


def _check_fields(path: Path, found: dict[str, Any]) -> None:
    neutral = {field.name: getattr(LoraConfig(), field.name) for field in fields(LoraConfig)}
    for name, value in found.items():
        if name in _USED | _NARROWING | _LEFT or not value or value == neutral.get(name):
            continue
        known = "is not computed here" if name in neutral else "is not known here"
        raise ModelError(
            f"{path}: {name} = {value!r:.100} {known}: merge the adapter into its base "
            "(merge_and_unload), and train on that"
        )
    init = str(found.get("init_lora_weights")).lower()
    if init.startswith(_CHANGES_BASE):
        raise ModelError(
            f"{path}: init_lora_weights = {init} has changed the base that it was trained on: save "
            "it with PEFT's path_initial_model_for_weight_conversion"
        )


def _settings(path: Path, found: dict[str, Any]) -> AdapterSettings:
    targets, parameters = found.get("target_modules"), tuple(found.get("target_parameters") or ())
    if any(found.get(name) for name in _NARROWING):
        if parameters:
            named = ", ".join(sorted(name for name in _NARROWING if found.get(name)))
            raise ModelError(f"{path}: {named} with target_parameters is not supported")
        targets = _layers(path)
    for key, pattern, kinds in (
        ("r", "rank_pattern", (int,)),
        ("lora_alpha", "alpha_pattern", (int, float)),
    ):
        for name, value in {key: found.get(key), **(found.get(pattern) or {})}.items():
            if type(value) not in kinds or not value > 0:
                where = key if name == key else f"{pattern}, {name}"
                raise ModelError(f"{path}: {where} = {value!r:.100} must be a number above zero")
    return AdapterSettings(
        r=found["r"],
        lora_alpha=found["lora_alpha"],
        target_modules=targets if isinstance(targets, str) else tuple(sorted(targets or ())),
        target_parameters=tuple(sorted(parameters)),
        rank_pattern=found.get("rank_pattern") or {},
        alpha_pattern=found.get("alpha_pattern") or {},
        use_rslora=bool(found.get("use_rslora")),
    )


def _layers(path: Path) -> list[str]:
    """The names of the layers that the file has tensors for."""
    try:
        with safe_open(path / WEIGHTS, framework="pt") as file:
            names = list(file.keys())
    except (OSError, SafetensorError) as error:
        raise ModelError(f"cannot read {path / WEIGHTS}: {error}") from error
    layers = {_LAYER.sub("", name).removeprefix(PREFIX) for name in names if _LAYER.search(name)}
    return sorted(layers)
