"""The run directory: who may write in it, and how files come to be in it.

A file of a run is whole or not there: it is written beside its name, synced, and renamed.
`metrics.jsonl` and the other line files are appended to; a line that was cut off is dropped when
the run is resumed.
"""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from lowmem_grpo.errors import ConfigError, UserError

__all__ = [
    "RunDirectory", "check_directory", "read_document", "read_lines", "replace_directory",
    "sync_directory", "write_atomic",
]  # fmt: skip


class RunDirectory:
    """OUTPUT, locked for this process. A context manager.

    Raises ConfigError when it exists and neither `resume` nor `overwrite` is given, when `resume`
    finds no run, and when another process trains in it.
    """

    def __init__(self, path: str | Path, *, resume: bool, overwrite: bool):
        self.path = Path(path)
        taken = check_directory(path, resume=resume, overwrite=overwrite)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = FileLock(self.path / "run.lock")
            self._lock.acquire(timeout=0)
        except Timeout:
            raise ConfigError(f"another process is training in {self.path}") from None
        except OSError as error:
            raise ConfigError(f"cannot write in {self.path}: {error.strerror}") from error
        self._replaces = taken and overwrite and not resume

    def begin(self) -> None:
        """A run begins: what `overwrite` replaces is removed, and not before."""
        if self._replaces:
            self._clear()
            self._replaces = False

    def __enter__(self) -> "RunDirectory":
        return self

    def __exit__(self, *_: object) -> None:
        # The file stays: removing it would let two later processes lock two files of that name.
        self._lock.release()

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    def append(self, name: str, record: dict[str, Any]) -> None:
        """Add one JSON object as a line to a file."""
        with (self.path / name).open("a", encoding="utf-8") as file:
            file.write(json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n")

    def lines(self, name: str) -> list[dict[str, Any]]:
        """The records of a line file; none where there is no file."""
        path = self.path / name
        return list(read_lines(path)) if path.is_file() else []

    def rewind(self, name: str, step: int) -> None:
        """Drop the lines of a line file that belong to steps after `step`, and a line that was cut
        off.
        """
        path = self.path / name
        if path.is_file():
            kept = [
                json.dumps(r, ensure_ascii=False) + "\n"
                for r in read_lines(path)
                if r["step"] <= step
            ]
            write_atomic(path, "".join(kept))

    def _clear(self) -> None:
        for entry in self.path.iterdir():
            if entry.name == "run.lock":
                continue
            shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()


def check_directory(path: str | Path, *, resume: bool, overwrite: bool) -> bool:
    """Whether there is something in the directory. Changes nothing.

    Raises ConfigError when `resume` finds no run, and when what is there may be neither continued
    nor replaced.
    """
    path = Path(path)
    if resume and not (path / "config.toml").is_file():
        raise ConfigError(f"--resume: {path} holds no run (it has no config.toml)")
    if path.exists() and not path.is_dir():
        raise ConfigError(f"--output {path} is a file: name a directory")
    taken = path.is_dir() and any(p.name != "run.lock" for p in path.iterdir())
    if taken and not resume and not overwrite:
        raise ConfigError(f"{path} exists: --resume continues it, --overwrite replaces it")
    if taken and overwrite and not resume and not (path / "config.toml").is_file():
        raise ConfigError(f"--overwrite: {path} is not a run directory, so it is left alone")
    return taken


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a line file; stops at a last line that was cut off."""
    with path.open(encoding="utf-8") as file:
        for line in file:
            if not line.endswith("\n"):
                return
            yield json.loads(line)


def read_document(path: Path, version: int, error: type[UserError]) -> dict[str, Any]:
    """A JSON object with a "format", which has to be `version`. Raises `error`."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        found = document["format"]
    except (OSError, ValueError, KeyError, TypeError) as problem:
        raise error(f"cannot read {path}: {problem}") from problem
    if found != version:
        raise error(f"{path} has format {found}, this version reads {version}")
    return document


def write_atomic(path: Path, text: str) -> None:
    """Write a text file whole or not at all, surviving a crash right after."""
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
    sync_directory(path.parent)


def replace_directory(partial: Path, target: Path) -> None:
    """Put a complete directory in the place of `target`, which may be there."""
    replaced = target.with_name(f".{target.name}.replaced")
    if target.exists():
        target.rename(replaced)
    partial.rename(target)
    sync_directory(target.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def sync_directory(path: Path) -> None:
    """Make renames in a directory durable (POSIX; elsewhere a directory cannot be opened)."""
    if os.name == "posix":
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
