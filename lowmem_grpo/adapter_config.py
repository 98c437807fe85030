"""The configuration of what an adapter is on: its base as the model, and its ranks and layers as
the section [lora].
"""

from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache

from lowmem_grpo.config import Config
from lowmem_grpo.errors import ConfigError, ModelError
from lowmem_grpo.policy.adapter_files import DEMO_HOME, AdapterFile, read_adapter_file
from lowmem_grpo.policy.source import DEMO, cache_directory, resolve

__all__ = ["started", "with_adapter"]

_UNSET = ("default", "profile ")  # how the origin of a value begins that nobody gave


def started(config: Config) -> Config:
    """A run that starts from `model.adapter`, with that adapter's settings; any other as it is.
    Raises ModelError for the adapter, ConfigError for settings that were given and are not its own.
    """
    if config.model.adapter is None:
        return config
    return with_adapter(config, read_adapter_file(Path(config.model.adapter).expanduser()))


def with_adapter(config: Config, adapter: AdapterFile) -> Config:
    """A configuration with an adapter's settings, the chat template beside it, and its base where
    no model was given. Raises ConfigError for settings that were given and are not the adapter's,
    or where it names no base, ModelError for a base that is not here.
    """
    origin, values = f"adapter {adapter.path}", {}
    for key, value in _settings(adapter).items():
        own = getattr(config.lora, key)
        if _given(config, f"lora.{key}") and _in_order(own) != _in_order(value):
            raise ConfigError(
                f"lora.{key} = {own!r} (from {config.sources[f'lora.{key}']}), and the adapter in "
                f"{adapter.path} has {value!r}: leave it out"
            )
        values[f"lora.{key}"] = value
    if not _given(config, "model.name"):
        if adapter.base is None:
            raise ConfigError(f"{adapter.path} names no base: give it as model.name")
        try:
            resolve(adapter.base)
        except ModelError as error:
            raise ModelError(
                f"{adapter.path} names its base as {adapter.base}: {error}; give the base with "
                "--set model.name=NAME"
            ) from error
        values["model.name"] = _here(adapter.base)
    template = adapter.chat_template
    if template is not None and not _given(config, "model.chat_template"):
        values["model.chat_template"] = str(template)
    return config.settled(values, origin)


def _here(base: str) -> str:
    """The name of a base on this machine: the demo model's, where its home on the Hub is not in the
    cache.
    """
    cached = isinstance(try_to_load_from_cache(DEMO_HOME, "config.json"), str)
    demo = cache_directory() / "models" / DEMO
    return DEMO if base == DEMO_HOME and not cached and demo.is_dir() else base


def _settings(adapter: AdapterFile) -> dict[str, Any]:
    found = adapter.settings
    targets = found.target_modules
    return {
        "r": found.r,
        "lora_alpha": found.lora_alpha,
        "use_rslora": found.use_rslora,
        "target_modules": targets if isinstance(targets, str) else list(targets),
        "target_parameters": list(found.target_parameters),
        "rank_pattern": dict(found.rank_pattern),
        "alpha_pattern": dict(found.alpha_pattern),
    }


def _given(config: Config, key: str) -> bool:
    return not config.sources.get(key, "default").startswith(_UNSET)


def _in_order(value: Any) -> Any:
    return sorted(value) if isinstance(value, list) else value
