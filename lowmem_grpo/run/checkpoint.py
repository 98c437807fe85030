"""Checkpoints: everything a run is after a step, in safetensors and JSON.

A checkpoint is written into a hidden directory and renamed when it is complete. It holds the
adapters, the optimizer's moments, the reference if it is one that moves, and a state: the step, the
gradient scaler, and the groups in hand (those that were sampled but not yet fully trained on), so
that a run stopped anywhere goes on with the very same tokens. Random numbers need no saving: they
are functions of (seed, step, problem, rollout).
"""

import json
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from lowmem_grpo.curriculum import Rates
from lowmem_grpo.errors import ConfigError, ModelError
from lowmem_grpo.grpo.optimizer import load_optimizer_state, optimizer_state
from lowmem_grpo.rollout.types import Group, Rollout
from lowmem_grpo.run.directory import (
    RunDirectory,
    read_document,
    replace_directory,
    sync_directory,
    write_atomic,
)
from lowmem_grpo.tasks.base import Problem

__all__ = [
    "State",
    "check_same_mathematics",
    "latest",
    "load_checkpoint",
    "read_adapter",
    "read_group",
    "save_adapter",
    "save_checkpoint",
]

FORMAT = 1
# What may differ on resume: where files go, how memory is used, how long, and what is looked at.
_FREE_SECTIONS = ("memory", "eval")
_FREE_KEYS = {
    "run": ("output", "steps", "save_every", "keep_last", "log_rollouts", "tensorboard"),
    "model": ("device", "attention"),
}


@dataclass
class State:
    """`step`: optimizer steps done. `batch`: batches begun. `problems`: problems drawn. `groups`:
    the batch in hand, or None.

    Of the batch in hand: `iteration`, optimizer steps already taken on it; `rounds` of sampling;
    `groups_away` and their `tokens_away`, groups that made way for others. `rates`: see
    curriculum.py. `pool`: groups of the pool that is trained on, if one is.
    """

    step: int = 0
    batch: int = 0
    problems: int = 0
    iteration: int = 0
    rounds: int = 0
    groups_away: int = 0
    tokens_away: int = 0
    groups: list[Group] | None = None
    scaler: dict[str, Any] = field(default_factory=dict)
    rates: Rates = field(default_factory=Rates)
    pool: int | None = None


def save_checkpoint(
    run: RunDirectory, state: State, policy, optimizer, config, base_name: str
) -> Path:
    """Write `checkpoints/step-NNNNNN`, replacing one of that step, and drop the oldest beyond
    `run.keep_last`.
    """
    folder = run / "checkpoints"
    folder.mkdir(exist_ok=True)
    target = folder / f"step-{state.step:06d}"
    partial = folder / f".{target.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    save_adapter(partial, policy, base_name)
    names = list(policy.adapter_parameters())
    save_file(
        optimizer_state(optimizer, names), partial / "optimizer.safetensors", {"format": "pt"}
    )
    if reference := policy.reference_state():
        save_file(reference, partial / "reference.safetensors", {"format": "pt"})
    document = {
        "format": FORMAT,
        **{k: v for k, v in vars(state).items() if k not in ("groups", "rates")},
        "rates": asdict(state.rates),
        "groups": None if state.groups is None else [asdict(group) for group in state.groups],
        "compute_dtype": str(policy.dtype).removeprefix("torch."),
        "config": config.model_dump(mode="json"),
    }
    write_atomic(partial / "state.json", json.dumps(document, allow_nan=False))
    replace_directory(partial, target)
    for old in _complete(folder)[: -config.run.keep_last]:
        shutil.rmtree(old)
    return target


def save_adapter(directory: Path, policy, base_name: str) -> None:
    """Write the adapters in PEFT's format, over `base_name`, into `directory`."""
    directory.mkdir(exist_ok=True)
    policy.save_adapter_config(directory, base_name)
    partial = directory / ".adapter_model.partial"
    save_file(policy.adapter_state(), partial, {"format": "pt"})
    partial.replace(directory / "adapter_model.safetensors")
    sync_directory(directory)


def latest(run_path: Path) -> Path | None:
    """The newest complete checkpoint of a run directory."""
    found = _complete(run_path / "checkpoints")
    return found[-1] if found else None


def load_checkpoint(path: Path, policy, optimizer) -> State:
    """Put adapters and moments in place and return the state. Raises ModelError for a file that
    does not fit.
    """
    document = read_state(path)
    dtype = str(policy.dtype).removeprefix("torch.")
    if document["compute_dtype"] != dtype:
        raise ConfigError(
            f"{path} was trained in {document['compute_dtype']}, and this is {dtype}: "
            f"use --set model.compute_dtype={document['compute_dtype']}"
        )
    policy.load_adapter_state(read_adapter(path))
    if policy.reference_state():
        policy.load_reference_state(_read_tensors(path / "reference.safetensors"))
    moments = _read_tensors(path / "optimizer.safetensors")
    load_optimizer_state(optimizer, list(policy.adapter_parameters()), moments)
    groups = document["groups"]
    # Of a checkpoint from before there was dynamic sampling: as many as the batches had.
    each = document["config"]["rollout"]["problems_per_step"]
    older = {"problems": document["batch"] * each, "rounds": 1, "groups_away": 0, "tokens_away": 0}
    older["pool"] = None
    numbers = {name: document[name] for name in ("step", "batch", "iteration", "scaler")}
    numbers |= {name: document.get(name, value) for name, value in older.items()}
    rates = Rates(**document.get("rates", {}))
    return State(
        **numbers, rates=rates, groups=None if groups is None else [read_group(g) for g in groups]
    )


def read_adapter(directory: Path) -> dict[str, torch.Tensor]:
    """The tensors of an adapter in PEFT's format. Raises ModelError."""
    return _read_tensors(directory / "adapter_model.safetensors")


def _read_tensors(path: Path) -> dict[str, torch.Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise ModelError(f"cannot read {path}: {error}") from error


def read_state(path: Path) -> dict[str, Any]:
    """`state.json` of a checkpoint. Raises ModelError for one that cannot be read."""
    return read_document(path / "state.json", FORMAT, ModelError)


def check_same_mathematics(path: Path, config) -> None:
    """Raises ConfigError naming the first setting whose change would make the resumed run another
    run.
    """
    saved, current = read_state(path)["config"], config.model_dump(mode="json")
    for section, entries in current.items():
        if section in _FREE_SECTIONS:
            continue
        for key, value in entries.items():
            # A setting that there was not yet, when the run was started, was as it is by default.
            default = type(getattr(config, section)).model_fields[key].default
            was = saved.get(section, {}).get(key, default)
            if key not in _FREE_KEYS.get(section, ()) and was != value:
                raise ConfigError(
                    f"--resume: {section}.{key} is {value!r}, and the run was started with "
                    f"{was!r}: go back to that, or start another run with another --output"
                )
    schedule = current["optimizer"]["lr_scheduler_type"]
    if schedule != "constant" and saved["run"]["steps"] != current["run"]["steps"]:
        raise ConfigError(
            f"--resume: the {schedule} schedule depends on run.steps, which was "
            f"{saved['run']['steps']}: use --steps {saved['run']['steps']}"
        )


def _complete(folder: Path) -> list[Path]:
    return sorted(p for p in folder.glob("step-*") if (p / "state.json").is_file())


def read_group(data: dict[str, Any]) -> Group:
    """A group as `asdict` and JSON have it."""
    problem = data["problem"]
    data["problem"] = Problem(**{**problem, "messages": tuple(problem["messages"])})
    data["rollouts"] = [Rollout(**rollout) for rollout in data["rollouts"]]
    return Group(**data)
