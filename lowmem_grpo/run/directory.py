"""The run directory: who may write in it, and how files come to be in it.

A file of a run is whole or not there: it is written beside its name, synced, and renamed.
`metrics.jsonl` and the other line files are appended to; a line that was cut off is dropped when
the run is resumed. Links are not followed: a directory that somebody else made may have some.
"""

import contextlib
import ctypes
import errno
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from lowmem_grpo.errors import ConfigError, DamageError
from lowmem_grpo.plain_json import parse_json

__all__ = [
    "RunDirectory", "check_directory", "naming", "read_lines", "replace_directory",
    "sync_directory", "sync_file", "write_atomic",
]  # fmt: skip

LOCK, PARTIAL = "run.lock", ".partial"
DEFECT = "error.txt"
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # linux/fcntl.h, linux/fs.h


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
            self._lock = FileLock(self.path / LOCK)
            self._lock.acquire(timeout=0)
        except Timeout:
            raise ConfigError(f"another process is training in {self.path}") from None
        except OSError as error:
            raise ConfigError(f"cannot write in {self.path}: {error.strerror}") from error
        self._replaces = taken and overwrite and not resume
        self._locked = os.stat(self.path)

    def begin(self) -> None:
        """A run begins: what `overwrite` replaces is removed, and not before; so is what a process
        left half-written that was killed.
        """
        if self._replaces:
            self._clear()
            self._replaces = False
        for left in self.path.glob(f".*{PARTIAL}"):
            _remove(left)

    def __enter__(self) -> "RunDirectory":
        return self

    def __exit__(self, *_: object) -> None:
        # The file stays: removing it would let two later processes lock two files of that name.
        self._lock.release()

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    def check_is_there(self) -> None:
        """Raises OSError where another directory is at the path by now, such as the empty one below
        a mount that is gone: what is written there would be lost.
        """
        if not os.path.samestat(os.stat(self.path), self._locked):
            what = "another directory is there than when the run began"
            raise OSError(errno.ESTALE, what, str(self.path))

    def append(self, name: str, *records: dict[str, Any]) -> None:
        """Add JSON objects as lines to a file. Raises OSError, also as `check_is_there`."""
        self.check_is_there()
        lines = [json.dumps(r, ensure_ascii=False, allow_nan=False) + "\n" for r in records]
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW
        path = self.path / name
        with naming(path), open(os.open(path, flags, 0o666), "a", encoding="utf-8") as file:
            file.writelines(lines)
            file.flush()
            os.fsync(file.fileno())

    def lines(self, name: str) -> list[dict[str, Any]]:
        """The records of a line file; none where there is no file."""
        path = self.path / name
        return list(read_lines(path)) if path.is_file() else []

    def rewind(self, name: str, step: int) -> None:
        """Drop the lines of a line file that belong to steps after `step`, and a line that was cut
        off.
        """
        path = self.path / name
        if not path.exists():
            return
        kept = []
        for record in read_lines(path):
            if not isinstance(record.get("step"), int):
                raise DamageError(f"a line of {path} has no step: mend or remove it")
            if record["step"] <= step:
                kept.append(json.dumps(record, ensure_ascii=False) + "\n")
        write_atomic(path, "".join(kept))

    def _clear(self) -> None:
        # Its config.toml last: without it, what is left would be nobody's.
        entries = sorted(self.path.iterdir(), key=lambda entry: entry.name == "config.toml")
        for entry in entries:
            if entry.name == LOCK:
                continue
            _remove(entry)


def _remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def check_directory(path: str | Path, *, resume: bool, overwrite: bool) -> bool:
    """Whether there is something in the directory. Changes nothing.

    Raises ConfigError when `resume` finds no run, and when what is there may be neither continued
    nor replaced.
    """
    path = Path(path)
    if resume and not (path / "config.toml").is_file():
        raise ConfigError(f"--resume: {path} holds no run (it has no config.toml)")
    if resume and (link := _link_in(path)):
        raise ConfigError(
            f"--resume: {link} is a link, through which would be written elsewhere: put what it "
            "leads to in its place"
        )
    if path.exists() and not path.is_dir():
        raise ConfigError(f"--output {path} is a file: name a directory")
    taken = path.is_dir() and not all(_is_nothing(entry.name) for entry in path.iterdir())
    if taken and not resume and not overwrite:
        raise ConfigError(f"{path} exists: --resume continues it, --overwrite replaces it")
    if taken and overwrite and not resume and not (path / "config.toml").is_file():
        raise ConfigError(f"--overwrite: {path} is not a run directory, so it is left alone")
    return taken


def _link_in(path: Path) -> Path | None:
    for folder, folders, files in os.walk(path):
        for name in (*folders, *files):
            if (entry := Path(folder) / name).is_symlink():
                return entry
    return None


def _is_nothing(name: str) -> bool:
    """Of a run that was killed before it began."""
    return name in (LOCK, DEFECT) or (name.startswith(".") and name.endswith(PARTIAL))


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a line file; stops at a last line that was cut off. Raises DamageError."""
    if path.is_dir():
        raise DamageError(f"{path} is a directory: remove it")
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                return
            try:
                record = parse_json(line)
            except ValueError as error:
                raise DamageError(
                    f"line {number} of {path} is damaged ({error}): mend or remove it"
                ) from error
            if not isinstance(record, dict):
                raise DamageError(f"line {number} of {path} is not an object: mend or remove it")
            yield record


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Lets an OSError name the file: those of writing and syncing name none."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise


def write_atomic(path: Path, text: str) -> None:
    """Write a text file whole or not at all, surviving a crash right after."""
    partial = path.with_name(f".{path.name}{PARTIAL}")
    partial.unlink(missing_ok=True)  # of a process that was killed; or a link
    with naming(path), partial.open("x", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
    sync_directory(path.parent)


def replace_directory(partial: Path, target: Path) -> None:
    """Put a complete directory in the place of `target`, which may be there."""
    sync_directory(partial)
    if target.is_symlink():
        target.unlink()
    if not target.exists():
        partial.rename(target)
    elif not _exchange(partial, target):
        replaced = target.with_name(f".{target.name}.replaced{PARTIAL}")
        shutil.rmtree(replaced, ignore_errors=True)
        target.rename(replaced)
        partial.rename(target)
        partial = replaced
    sync_directory(target.parent)
    shutil.rmtree(partial, ignore_errors=True)


def _exchange(one: Path, other: Path) -> bool:
    """Let two directories change names at once, so that there is no moment without either. False
    where the system cannot (other than Linux, some file systems).
    """
    rename = getattr(ctypes.CDLL(None), "renameat2", None)
    if rename is None:
        return False
    names = os.fsencode(one), os.fsencode(other)
    return rename(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_EXCHANGE) == 0


def sync_file(path: Path) -> None:
    """Make a file's contents durable, which something else wrote."""
    with naming(path), path.open("rb") as file:
        os.fsync(file.fileno())


def sync_directory(path: Path) -> None:
    """Make renames in a directory durable (POSIX; elsewhere a directory cannot be opened)."""
    if os.name == "posix":
        handle = os.open(path, os.O_RDONLY)
        try:
            with naming(path):
                os.fsync(handle)
        finally:
            os.close(handle)
