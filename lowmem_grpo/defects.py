"""A defect of this program leaves its traceback in a file: `error.txt` of the run, or where there
is no run, one among the temporary files.
"""

from __future__ import annotations

import os
import platform
import sys
import tempfile
import time
import traceback
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from lowmem_grpo.run.directory import DEFECT, LOCK

__all__ = ["keep_traceback"]

_PACKAGES = ("lowmem-grpo", "torch", "transformers", "peft", "bitsandbytes", "triton", "numpy")


def keep_traceback(error: BaseException, output: str | None) -> Path | None:
    """Write the traceback of `error`, and with what it came about, into the directory `output`, if
    a run is there; returns where it is, or None where it cannot be written anywhere.
    """
    text = "\n".join(_text(error))
    if output is not None and any(
        (Path(output) / name).is_file() for name in (LOCK, "config.toml")
    ):
        path = Path(output) / DEFECT
        try:
            _write(path, text)
            return path
        except OSError:  # it may be what has failed
            pass
    try:
        handle, name = tempfile.mkstemp(prefix="lowmem-grpo-error-", suffix=".txt")
        with open(handle, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.write(text)
        return Path(name)
    except OSError:
        return None


def _write(path: Path, text: str) -> None:
    # As a new file: what has its name may be a link.
    path.unlink(missing_ok=True)
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    with open(handle, "w", encoding="utf-8", errors="backslashreplace") as file:
        file.write(text)


def _text(error: BaseException) -> list[str]:
    packages = [f"{name} {_version(name)}" for name in _PACKAGES]
    return [
        time.strftime("%Y-%m-%d %H:%M:%S"),
        f"command: {' '.join(sys.argv)}",
        f"Python {platform.python_version()}, {platform.platform()}",
        ", ".join(packages),
        "",
        *traceback.format_exception(type(error), error, error.__traceback__),
    ]


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not there"
