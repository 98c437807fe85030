"""Checkpoints: everything a run is between two phases, in safetensors and JSON.

    checkpoints/step-000047/   adapters, moments, the reference if it is one that moves; state.json

The tensors change with an optimizer step only. So a step's directory is written once, hidden, and
renamed when it is complete; after each phase `state.json` alone is replaced, with the groups in
hand (those that were sampled but not yet fully trained on). A run that was killed anywhere goes on
with the very same tokens, and repeats one phase at most. Random numbers need no saving: they are
functions of (seed, step, problem, rollout).

`state.json` has the sha256 of the files beside it, and its own: what is not what was written is not
resumed from.
"""

import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from lowmem_grpo.checksum import checksums, damage, sealed, unsealed
from lowmem_grpo.config import Config
from lowmem_grpo.curriculum import Rates
from lowmem_grpo.errors import ConfigError, DamageError, ModelError, PlanError
from lowmem_grpo.grpo.optimizer import load_optimizer_state, optimizer_state
from lowmem_grpo.policy.integrity import Base, IntegrityError
from lowmem_grpo.rollout.types import Group, Rollout
from lowmem_grpo.run.directory import (
    PARTIAL,
    RunDirectory,
    naming,
    replace_directory,
    sync_file,
    write_atomic,
)
from lowmem_grpo.tasks.base import Problem

__all__ = [
    "SEALS", "Checkpoints", "State", "group_document", "load_checkpoint", "newest_sound",
    "read_adapter", "read_group", "read_state", "save_adapter", "save_final",
]  # fmt: skip

FORMAT = 2
SEALS = "checksums.json"


@dataclass
class State:
    """`step`: optimizer steps done. `batch`: batches begun. `problems`: problems drawn. `groups`:
    the batch in hand, or None. `evaluated`: the step after which was evaluated last, -1 for none.

    Of the batch in hand: `iteration`, optimizer steps already taken on it; `rounds` of sampling;
    `groups_away` and their `tokens_away`, groups that made way for others. `rates`: see
    curriculum.py. `pool`: groups of the pool that is trained on, if one is. `discarded`: batches
    that came to nothing since the last step. `base`: the digest of the base's weights; `checked`:
    the step after which they were last found to be what was loaded. `inputs`: see run/inputs.py.
    """

    step: int = 0
    batch: int = 0
    problems: int = 0
    iteration: int = 0
    rounds: int = 0
    groups_away: int = 0
    tokens_away: int = 0
    evaluated: int = -1
    groups: list[Group] | None = None
    scaler: dict[str, Any] = field(default_factory=dict)
    rates: Rates = field(default_factory=Rates)
    pool: int | None = None
    discarded: int = 0
    base: str = ""
    checked: int = 0
    inputs: dict[str, dict[str, str]] = field(default_factory=dict)


class Checkpoints:
    """Those of one run, while it trains. `resumed`: the one that its state was loaded from. `warn`
    is told of those that are found to be damaged.
    """

    def __init__(
        self,
        run: RunDirectory,
        policy,
        optimizer,
        base_name: str,
        resumed: Path | None = None,
        warn: Callable[[str], None] = lambda text: None,
    ):
        self._run, self._folder, self._warn = run, run / "checkpoints", warn
        self._policy, self._optimizer, self._base_name = policy, optimizer, base_name
        for left in self._folder.glob(f".*{PARTIAL}"):  # of a process that was killed
            shutil.rmtree(left)
        # The step whose tensors are on the disk, and their checksums.
        self._step, self._files = -1, {}
        if resumed is not None:
            document = read_state(resumed)
            self._step, self._files = document["step"], document["files"]
            self._set_aside(self._step)  # they are damaged: `newest_sound` has looked at them
        self._seconds = 0.0

    def save(self, state: State, config: Config) -> Path:
        """Write the state, and the tensors where those of its step are not there yet; drop what
        `run.keep_last` does not keep. Raises OSError.
        """
        begun = time.perf_counter()
        self._run.check_is_there()
        target = self._folder / _name(state.step)
        if self._step == state.step:
            write_atomic(target / "state.json", self._document(state, config))
        else:
            self._folder.mkdir(exist_ok=True)
            partial = target.with_name(f".{target.name}{PARTIAL}")
            try:
                self._write(partial, state, config)
            except OSError:
                shutil.rmtree(partial, ignore_errors=True)  # the disk may be full
                raise
            replace_directory(partial, target)
            self._step = state.step
        # In any case: a process before this one may not have come to it.
        self._prune(config, state.checked)
        self._seconds += time.perf_counter() - begun
        return target

    def keep_up(self, state: State, config: Config) -> None:
        """A phase is over: write the state, where the tensors that it goes with are on the disk."""
        if self._step == state.step:
            self.save(state, config)

    def verify(self, base: Base, state: State) -> None:
        """Check the base. Raises IntegrityError, with the checkpoints set aside that may have been
        computed with another one.
        """
        try:
            base.check()
        except IntegrityError as error:
            self._set_aside(state.checked)
            raise IntegrityError(
                f"{error}; the checkpoints after step {state.checked} are set aside, --resume goes "
                "on from there"
            ) from error
        state.checked = state.step

    def restore(self, state: State) -> None:
        """Put the tensors of the state's step back as they are on the disk, and forget the
        log-probs that the update has found. Raises PlanError where they are not there, DamageError
        where they are not what was written.
        """
        if self._step != state.step:
            raise PlanError(
                "out of memory in the optimizer's step, with the adapters of the step before not "
                "on the disk to begin it again: use run.resume_every = 1"
            )
        path = self._folder / _name(state.step)
        if problem := damage(path, self._files):
            raise DamageError(f"{path}: {problem}")
        _load_tensors(path, self._policy, self._optimizer)
        if state.iteration == 0:
            for group in state.groups:
                for rollout in group.rollouts:
                    rollout.old_logprobs = None

    def _set_aside(self, step: int) -> None:
        """Those of later steps, under another name."""
        for path in _all(self._folder):
            if _step(path) > step:
                _rename_damaged(path)

    def take_seconds(self) -> float:
        """What saving took since this was last asked."""
        taken, self._seconds = self._seconds, 0.0
        return taken

    def _write(self, partial: Path, state: State, config: Config) -> None:
        shutil.rmtree(partial, ignore_errors=True)
        save_adapter(partial, self._policy, self._base_name)
        moments = optimizer_state(self._optimizer, list(self._policy.adapter_parameters()))
        _save_tensors(partial / "optimizer.safetensors", moments)
        if reference := self._policy.reference_state():
            _save_tensors(partial / "reference.safetensors", reference)
        self._files = checksums(partial)
        write_atomic(partial / "state.json", self._document(state, config))

    def _document(self, state: State, config: Config) -> str:
        plain = {k: v for k, v in vars(state).items() if k not in ("groups", "rates")}
        return sealed(
            {
                "format": FORMAT,
                **plain,
                "rates": asdict(state.rates),
                "groups": state.groups and [group_document(group) for group in state.groups],
                "compute_dtype": str(self._policy.dtype).removeprefix("torch."),
                "config": config.model_dump(mode="json"),
                "files": self._files,
            }
        )

    def _prune(self, config: Config, checked: int) -> None:
        found, every = _all(self._folder), config.run.save_every
        lasting = [path for path in found if every and _step(path) and _step(path) % every == 0]
        sure = [path for path in found if _step(path) <= checked]
        kept = {*found[-1:], *lasting[-config.run.keep_last :]}
        # One to go on from where the newest is damaged, one where the base has changed since.
        for older in (found[:-1], sure):
            kept |= self._fall_back(older, kept)
        for path in found:
            if path not in kept:
                gone = path.with_name(f".{path.name}.gone{PARTIAL}")
                path.rename(gone)  # so that a half of it is never seen
                shutil.rmtree(gone)

    def _fall_back(self, paths: list[Path], kept: set[Path]) -> set[Path]:
        """The newest of some checkpoints that is what was written, and those newer ones that are
        not, under another name now. Nothing is read where nothing would be dropped for it.
        """
        tried: set[Path] = set()
        for place in reversed(range(len(paths))):
            path = paths[place]
            if not path.exists():  # it was renamed
                continue
            tried.add(path)
            if kept.issuperset(paths[:place]):
                break
            try:
                read_state(path)
                break
            except DamageError as error:
                aside = _rename_damaged(path)
                self._warn(f"set aside as {aside.name}: {error}; an older one stays in its place")
        return tried


def _rename_damaged(path: Path) -> Path:
    """Set a checkpoint aside; returns where it is."""
    aside = path.with_name(f"damaged-{path.name}")
    shutil.rmtree(aside, ignore_errors=True)
    path.rename(aside)
    return aside


def _name(step: int) -> str:
    return f"step-{step:06d}"


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def _all(folder: Path) -> list[Path]:
    """The checkpoints in a folder, sound or not, the oldest first."""
    found = [path for path in folder.glob("step-*") if path.name.removeprefix("step-").isdecimal()]
    return sorted(found, key=_step)


def save_adapter(directory: Path, policy, base_name: str) -> None:
    """Write the adapters in PEFT's format, over `base_name`, into `directory`."""
    directory.mkdir(exist_ok=True)
    settings = directory / "adapter_config.json"
    with naming(settings):
        policy.save_adapter_config(directory, base_name)
    sync_file(settings)
    _save_tensors(directory / "adapter_model.safetensors", policy.adapter_state())


def save_final(directory: Path, policy, base_name: str, step: int) -> None:
    """The adapters as `save_adapter` writes them, with their step and checksums, in place of what
    is at `directory`.
    """
    partial = directory.with_name(f".{directory.name}{PARTIAL}")
    shutil.rmtree(partial, ignore_errors=True)
    save_adapter(partial, policy, base_name)
    write_atomic(partial / SEALS, sealed({"step": step, "files": checksums(partial)}))
    replace_directory(partial, directory)


def _save_tensors(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    try:
        save_file(tensors, path, {"format": "pt"})
    except SafetensorError as error:
        raise OSError(f"{path}: {error}") from error
    sync_file(path)


def newest_sound(run_path: Path, warn: Callable[[str], None] = lambda text: None) -> Path | None:
    """The newest checkpoint of a run directory that is what was written; None where there is none
    at all. `warn` is told of each newer one that is not, and why. Raises DamageError where none is
    sound.
    """
    found = _all(run_path / "checkpoints")
    for path in reversed(found):
        try:
            read_state(path)
            return path
        except DamageError as error:
            warn(f"not used: {error}")
    if found:
        raise DamageError(
            f"no checkpoint in {run_path} is sound (the newest: {found[-1].name}): "
            "bring one back, or begin again with --overwrite"
        )
    return None


def read_state(path: Path) -> dict[str, Any]:
    """`state.json` of a checkpoint. Raises DamageError where it, or a file beside it, is not what
    was written.
    """
    try:
        document = unsealed((path / "state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise DamageError(f"{path}: state.json: {reason}") from error
    if document.get("format") != FORMAT:
        raise DamageError(
            f"{path} has format {document.get('format')}, this version reads {FORMAT}"
        )
    if document["step"] != _step(path):
        raise DamageError(f"{path} is of step {document['step']}")
    if problem := damage(path, document["files"]):
        raise DamageError(f"{path}: {problem}")
    return document


def load_checkpoint(path: Path, policy, optimizer) -> State:
    """Put adapters and moments in place and return the state. Raises DamageError as `read_state`,
    ModelError and ConfigError for what does not fit.
    """
    document = read_state(path)
    dtype = str(policy.dtype).removeprefix("torch.")
    if document["compute_dtype"] != dtype:
        raise ConfigError(
            f"{path} was trained in {document['compute_dtype']}, and this is {dtype}: "
            f"use --set model.compute_dtype={document['compute_dtype']}"
        )
    _load_tensors(path, policy, optimizer)
    groups = document["groups"]
    whole = {"groups": groups and [read_group(g) for g in groups], "rates": document["rates"]}
    whole["rates"] = Rates(**whole["rates"])
    plain = {name: document[name] for name in vars(State()) if name not in (*whole, "inputs")}
    return State(**plain, **whole)


def _load_tensors(path: Path, policy, optimizer) -> None:
    """Put adapters, moments and a reference that moves in place. Raises ModelError."""
    policy.load_adapter_state(read_adapter(path))
    # Without the file the reference has only now begun to move: from the base, as at a start.
    if policy.reference_state() and (path / "reference.safetensors").is_file():
        policy.load_reference_state(_read_tensors(path / "reference.safetensors"))
    moments = _read_tensors(path / "optimizer.safetensors")
    load_optimizer_state(optimizer, list(policy.adapter_parameters()), moments)


def read_adapter(directory: Path) -> dict[str, torch.Tensor]:
    """The tensors of an adapter in PEFT's format. Raises ModelError."""
    return _read_tensors(directory / "adapter_model.safetensors")


def _read_tensors(path: Path) -> dict[str, torch.Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise ModelError(f"cannot read {path}: {error}") from error


def group_document(group: Group) -> dict[str, Any]:
    """A group for JSON. Its lists are the group's own: `asdict` would copy every number."""
    rollouts = [vars(rollout) for rollout in group.rollouts]
    return {**vars(group), "problem": asdict(group.problem), "rollouts": rollouts}


def read_group(data: dict[str, Any]) -> Group:
    """A group as `group_document` and JSON have it."""
    problem = data["problem"]
    data["problem"] = Problem(**{**problem, "messages": tuple(problem["messages"])})
    data["rollouts"] = [Rollout(**rollout) for rollout in data["rollouts"]]
    return Group(**data)
