"""Compiling guard.cpp (see there) against the torch that is installed."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import torch

__all__ = ["build_guard", "run_with_guard", "why_not"]


def why_not() -> str | None:
    """Why fake CUDA tensors cannot be had here, or None."""
    if torch.version.cuda is not None:
        return "torch is a CUDA build: its own device guard is there and asks the driver"
    if shutil.which("g++") is None:
        return "no C++ compiler (g++) to build the device guard with"
    return None


def build_guard(directory: Path) -> Path:
    """Compile the guard into `directory`; returns the library's path."""
    root = Path(torch.__file__).parent
    library = directory / "libfakecuda.so"
    command = ["g++", "-std=c++20", "-O0", "-shared", "-fPIC"]
    command += [f"-I{root}/include", f"-I{root}/include/torch/csrc/api/include"]
    command += [str(Path(__file__).with_name("guard.cpp")), f"-L{root}/lib", "-lc10"]
    command += [f"-Wl,-rpath,{root}/lib", "-o", str(library)]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return library


def run_with_guard(directory: Path, program: str, *arguments: str) -> list[dict]:
    """The JSON objects that a program of this folder printed, a line each, under the guard that is
    built in `directory`. Fails the test unless it ends well.
    """
    here = Path(__file__).parent
    run = subprocess.run(
        [sys.executable, str(here / program), str(build_guard(directory)), *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(here.parents[1])},
    )
    assert run.returncode == 0, run.stderr
    print(run.stderr)  # the tracebacks of cases, for whoever reads a failure
    return [json.loads(line) for line in run.stdout.splitlines() if line.startswith("{")]
