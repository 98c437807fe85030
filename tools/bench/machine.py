"""What a measurement was taken on."""

from __future__ import annotations

import os
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from lowmem_grpo.hardware import choose_compute_dtype, detect

PACKAGES = ("torch", "transformers", "trl", "peft", "bitsandbytes")


def describe() -> dict[str, Any]:
    """CPU, cores that this process may use, compute dtype, versions, and the commit of the checkout
    (with "+changes" where files differ from it; None outside of one).
    """
    machine = detect("cpu")
    affinity = getattr(os, "sched_getaffinity", None)
    return {
        "cpu": machine.cpu_name,
        "cores": len(affinity(0)) if affinity else os.cpu_count(),
        "threads": machine.cpu_threads,
        "compute_dtype": choose_compute_dtype(machine).value,
        "versions": {name: _version(name) for name in PACKAGES},
        "commit": _commit(),
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    head = _git("rev-parse", "--short", "HEAD")
    return head and head + "+changes" * bool(_git("status", "--porcelain"))


def _git(*arguments: str) -> str | None:
    where = Path(__file__).parent
    try:
        done = subprocess.run(["git", *arguments], cwd=where, capture_output=True, text=True)
    except FileNotFoundError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None
