"""A pool of groups that the base sampled: made once, trained on for many steps.

    POOL/pool.json       what the groups were sampled with, and the digest of the base
    POOL/groups.jsonl    one group a line, with the log-probs that the base gives its tokens
    POOL/pool.lock       held by the process that adds groups

Each line, and pool.json, carries its sha256: a number in them that has changed would be trained on.

The base is old policy and reference in one (`grpo.old_policy = base`), so nothing that a run
changes makes a pool out of date: steps that train on it neither sample nor ask the reference. What
limits them is how far the policy gets from the base, where ratios are clipped.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from lowmem_grpo.checksum import sealed, unsealed
from lowmem_grpo.config import Config
from lowmem_grpo.errors import ConfigError, DamageError, StorageError
from lowmem_grpo.grpo.packing import PackedBatch, pack
from lowmem_grpo.grpo.update import Scoring, score_reference
from lowmem_grpo.policy.integrity import Base
from lowmem_grpo.retry import Fitting
from lowmem_grpo.rollout.groups import end_token_ids, sample_groups
from lowmem_grpo.rollout.types import Group
from lowmem_grpo.run.checkpoint import group_document, read_group
from lowmem_grpo.run.directory import naming, write_atomic
from lowmem_grpo.sections import TaskConfig
from lowmem_grpo.setup import sampling_of, texts_of
from lowmem_grpo.tasks import Task
from lowmem_grpo.tasks.base import permuted, stable_hash

__all__ = ["Pool", "check_base", "check_pool", "fill", "filling", "open_pool"]

FORMAT = 3
LOCK = "pool.lock"
_NOTHING = (LOCK, ".pool.json.partial")  # of a pool that ended before it began
# What makes the groups what they are; a run that trains on them has the same.
_MADE_WITH = {
    "model": ("name", "lm_head_bits", "chat_template", "chat_template_kwargs"),
    "task": tuple(TaskConfig.model_fields),  # what is held out, too
    "rollout": (
        *("num_generations", "min_completion_length", "max_completion_length"),
        *("temperature", "top_p", "top_k", "min_p", "skip_special_tokens", "include_prefill"),
    ),
}


class Pool:
    """The groups of a directory, in an order that belongs to (seed, epoch). `base`: the digest of
    the weights that they were sampled with.
    """

    def __init__(self, path: Path, seed: int, base: str):
        self.path, self.base = path, base
        self._groups = _read_lines(path / "groups.jsonl")
        self._seed = seed

    def __len__(self) -> int:
        return len(self._groups)

    def group(self, index: int) -> Group:
        """The group at `index`, 0 or more without end: every group comes once in an epoch."""
        epoch, position = divmod(index, len(self))
        place = permuted(position, len(self), stable_hash("pool", self._seed, epoch))
        return read_group(unsealed(self._groups[place]))


def open_pool(config: Config) -> Pool | None:
    """The pool of `rollout.pool`, if there is one. Raises ConfigError for a directory that is none,
    is not complete, or was made with other settings; DamageError for one that is not what was
    written.
    """
    if config.rollout.pool is None:
        return None
    path = Path(config.rollout.pool)
    document = _read(path)
    _check(path, document, config)
    pool = Pool(path, config.task.seed, document["base"])
    if len(pool) != document["groups"]:
        raise ConfigError(
            f"{path} has {len(pool)} of {document['groups']} groups: run the command rollouts again"
        )
    groups = [pool.group(index) for index in range(len(pool))]
    if config.grpo.masks_by_entropy and any(g.rollouts[0].entropies is None for g in groups):
        raise ConfigError(
            f"{path} lacks entropies, which grpo.top_entropy_quantile needs: make it with that set"
        )
    longest = max(len(group.prompt_ids) for group in groups)
    if longest > config.rollout.max_prompt_length:
        raise ConfigError(
            f"{path} has a prompt of {longest} tokens: use --max-prompt-length {longest}"
        )
    return pool


def check_base(path: Path, was: str, base: Base) -> None:
    """Raises ConfigError where the groups of the pool at `path` were sampled with other weights,
    whose digest `was` another on the same kind of device: the base is their old policy.
    """
    if base.is_other_than(was):
        raise ConfigError(
            f"{path} was sampled with other weights of the same name, or in another "
            "model.compute_dtype: use the same, or make another pool"
        )


def check_pool(now: int | None, was: int | None) -> None:
    """Raises ConfigError where a resumed run's pool has not as many groups as it `was` begun with:
    their order would be another one.
    """
    if now != was:
        raise ConfigError(
            f"--resume: the pool has {now} groups, and the run was started with {was}: "
            "start another run with another --output"
        )


@contextmanager
def filling(path: Path, config: Config) -> Iterator[None]:
    """Makes the directory of a pool, and locks it for this process. Raises ConfigError where
    another process has it, and for a directory that is no pool, or one made with other settings;
    StorageError where it cannot be written.
    """
    _check_begun(path, config)  # nothing is put into a directory that is something else
    lock = FileLock(path / LOCK)
    with _storing(path):
        path.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise ConfigError(f"another process makes the pool in {path}: wait for it") from None
    try:
        yield
    finally:
        lock.release()  # the file stays, as that of a run does


def fill(
    policy,
    task: Task,
    fitting: Fitting,
    path: Path,
    groups: int,
    advance: Callable[[int], None] = lambda groups: None,
) -> int:
    """Make a pool of that many groups at `path`, or go on with one that was begun; returns how many
    it had. To be called within `filling`. `fitting`: of the configuration. `advance` is told of
    groups that are done. Raises ConfigError for a pool that was made with other settings or
    weights, or is larger; StorageError where it cannot be written.
    """
    config, file = fitting.config, path / "groups.jsonl"
    base = Base(policy)
    digest = base.digest
    if begun := _check_begun(path, config):
        digest = begun["base"]
        check_base(path, digest, base)
    each = config.rollout.problems_per_step
    there = _read_lines(file) if file.is_symlink() or file.exists() else []
    if len(there) > groups:
        raise ConfigError(f"{path} has {len(there)} groups already: ask for that many or more")
    had = len(there) if len(there) == groups else len(there) // each * each
    with _storing(file):
        write_atomic(path / "pool.json", sealed(_document(config, groups, digest)))
        # Without a batch that was cut off.
        write_atomic(file, "".join(f"{line}\n" for line in there[:had]))
    scoring = Scoring(config.rollout.temperature, end_token_ids(policy))
    for start in range(had, groups, each):
        problems = [task.train_problem(i) for i in range(start, min(start + each, groups))]
        count = len(problems) * config.rollout.num_generations
        for attempt in fitting.attempts("rollout", count):
            with attempt as fits:
                made = sample_groups(
                    policy,
                    problems,
                    num_generations=config.rollout.num_generations,
                    sampling=sampling_of(config, "rollout"),
                    seed=config.run.seed,
                    step=start // each,
                    max_prompt_length=config.rollout.max_prompt_length,
                    chat_template_kwargs=config.model.chat_template_kwargs,
                    batch_size=fits.memory.rollout_batch_size,
                    adapters=False,
                    texts=texts_of(config, policy.tokenizer),
                )
        policy.release()
        for group in made:
            group.advantages = [0.0] * len(group.rollouts)
        most = sum(batch.tokens for batch in _batches(made, fitting.config))
        for attempt in fitting.attempts("reference", most):
            with attempt as fits:
                score_reference(policy, _batches(made, fits), scoring)
        policy.release()
        for group in made:
            group.advantages = []
        _append(file, made)
        advance(len(made))
    return had


def _append(file: Path, groups: list[Group]) -> None:
    """Add groups to those of the file, which is there, durably. Raises StorageError."""
    flags = os.O_WRONLY | os.O_APPEND | os.O_NOFOLLOW
    with _storing(file), open(os.open(file, flags), "a", encoding="utf-8") as stream:
        stream.writelines(sealed(group_document(group)) + "\n" for group in groups)
        stream.flush()
        os.fsync(stream.fileno())


@contextmanager
def _storing(file: Path) -> Iterator[None]:
    """Raises StorageError, in which the file is named, for what cannot be written."""
    try:
        with naming(file):
            yield
    except OSError as error:
        raise StorageError(
            f"cannot write the pool: {error}; mend it, and run the command rollouts again, which "
            "goes on from there"
        ) from error


def _batches(groups: list[Group], config: Config) -> list[PackedBatch]:
    return pack(
        groups,
        [1.0] * sum(len(group.rollouts) for group in groups),
        max_tokens=config.memory.micro_batch_tokens,
        min_completion_length=config.rollout.min_completion_length,
    )


def _document(config: Config, groups: int, base: str) -> dict:
    return {"format": FORMAT, "groups": groups, "base": base, "made_with": _made_with(config)}


def _made_with(config: Config) -> dict:
    sections = config.model_dump(mode="json")
    return {f"{s}.{key}": sections[s][key] for s, keys in _MADE_WITH.items() for key in keys}


def _read(path: Path) -> dict:
    file = path / "pool.json"
    try:
        document = unsealed(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{file}: {error.strerror}: give the directory of a pool") from error
    except ValueError as error:
        raise DamageError(f"{file}: {error}: make another pool") from error
    if document.get("format") != FORMAT:
        raise ConfigError(
            f"{file} has format {document.get('format')}, this version reads {FORMAT}: "
            "make another pool"
        )
    return document


def _read_lines(path: Path) -> list[str]:
    """The lines of groups, each of which is what was written, without one that was cut off at the
    end. Raises DamageError.
    """
    try:
        *lines, _ = path.read_bytes().split(b"\n")
    except OSError as error:
        raise DamageError(f"{path}: {error.strerror}: make another pool") from error
    found = []
    for number, line in enumerate(lines, 1):
        try:
            found.append(line.decode())
            unsealed(found[-1])
        except ValueError as error:
            raise DamageError(
                f"line {number} of {path}: {error}: cut the file off before that line, and run the "
                "command rollouts again"
            ) from error
    return found


def _check_begun(path: Path, config: Config) -> dict | None:
    """As `_check`, where there is something in the directory: its document, or None."""
    if not path.exists() or all(entry.name in _NOTHING for entry in path.iterdir()):
        return None
    document = _read(path)
    _check(path, document, config)
    return document


def _check(path: Path, document: dict, config: Config) -> None:
    own = _made_with(config)
    for key, was in document["made_with"].items():
        if own.get(key) != was:
            raise ConfigError(
                f"{path} was sampled with {key} = {was!r}, and this has {own.get(key)!r}: "
                "use the same, or make another pool"
            )
