"""Which settings may differ between a run and its continuation."""

from collections.abc import Collection
from typing import Any

from lowmem_grpo.config import Config
from lowmem_grpo.errors import ConfigError, nearest

__all__ = ["changed_mathematics"]

# Where files go, how memory is used, how long, and what is looked at.
_FREE_SECTIONS = ("memory", "eval")
_FREE_KEYS = {
    "run": (
        *("output", "steps", "save_every", "resume_every", "keep_last", "log_rollouts"),
        *("tensorboard", "max_discarded", "check_every"),
    ),
    "model": ("device", "attention"),
    "rewards": ("network", "writable", "memory_gib", "timeout", "check_first_step"),
}
# What the saved tensors are, which no word of anybody changes.
_FIXED = (
    *("model.compute_dtype", "optimizer.optim", "lora.r", "lora.rank_pattern"),
    *("lora.target_modules", "lora.target_parameters"),
)


def changed_mathematics(
    saved: dict[str, Any], config: Config, allowed: Collection[str] = ()
) -> list[str]:
    """The settings ("section.key"), of those that are `allowed` to, whose values make the rest of
    the run another one than it was started as. `saved`: the configuration that it was started with.

    Raises ConfigError for a change that is not allowed, or is of what the saved tensors are.
    """
    current, found = config.model_dump(mode="json"), {}
    for section, entries in current.items():
        for key, value in entries.items():
            # A setting that there was not yet, when the run was started, was as it is by default.
            default = type(getattr(config, section)).model_fields[key].default
            was = saved.get(section, {}).get(key, default)
            if was != value and section not in _FREE_SECTIONS:
                found[f"{section}.{key}"] = was, value
    schedule = current["optimizer"]["lr_scheduler_type"]
    for key in list(found):
        section, name = key.split(".")
        scheduled = key == "run.steps" and schedule != "constant"
        if name in _FREE_KEYS.get(section, ()) and not scheduled:
            del found[key]
    known = [f"{section}.{key}" for section, entries in current.items() for key in entries]
    for key in allowed:
        if key not in known:
            raise ConfigError(f"--allow-changed {key}: no such setting{nearest(key, known)}")
        if key in _FIXED:
            raise ConfigError(
                f"--allow-changed {key}: the saved adapters and moments are of that: "
                "start another run with another --output"
            )
    for key, (was, value) in found.items():
        if key not in allowed:
            why = f", on which the {schedule} schedule depends" if key == "run.steps" else ""
            way_out = "" if key in _FIXED else f", or --allow-changed {key}"
            raise ConfigError(
                f"--resume: {key} is {value!r}{why}, and the run was started with {was!r}: go back "
                f"to that, or start another run with another --output{way_out}"
            )
    return list(found)
