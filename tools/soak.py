"""Does a long run grow? `lowmem-grpo train`, watched at every step.

    python tools/soak.py --model MODEL --output DIR --steps 500 [any other option of train]

After every fifth step, and a collection of Python's garbage: resident memory; bytes of Python's
objects (tracemalloc); bytes of the tensors that Python can reach; open files, threads and child
processes; files of the run and their bytes, line files (*.jsonl) apart. A line for each: the mean
of the first and of the last fifth of the samples after the warm-up, the slope of a straight line
through all of them in units a step, and that slope's standard error. The last line is one JSON
object.

tracemalloc makes steps slower and memory larger, by an amount of its own that does not grow.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import tempfile
import tracemalloc
from pathlib import Path
from statistics import fmean
from typing import Any
from unittest import mock

import psutil
import torch
from torch._subclasses.fake_tensor import FakeTensor

import lowmem_grpo.run.console as console
from lowmem_grpo.cli import main as command_line

EVERY = 5  # steps; to walk through all objects takes longer than a tiny step
WARM_UP = 0.2  # of the steps: plans, first calls, buffers that reach their size
LEAST = 5  # samples


class Soak(console.Console):
    """A console that measures at steps' lines, into a file: in memory they would be what grows."""

    output, samples = "", None  # of the class, since the command line makes the console

    def step(self, record: dict[str, Any], steps: int) -> None:
        super().step(record, steps)
        if not tracemalloc.is_tracing():
            tracemalloc.start()
        if record["step"] % EVERY == 0:
            self.samples.write(json.dumps(sample(Path(self.output))) + "\n")


def sample(run: Path) -> dict[str, int]:
    """What this process holds now, and what its run has on the disk."""
    gc.collect()
    process = psutil.Process()
    files = [path for path in run.rglob("*") if path.is_file()]
    lines = [path for path in files if path.suffix == ".jsonl"]
    return {
        "resident_bytes": process.memory_info().rss,
        "python_bytes": tracemalloc.get_traced_memory()[0],
        "tensor_bytes": tensor_bytes(),
        "open_files": len(os.listdir("/proc/self/fd")),
        "threads": process.num_threads(),
        "children": len(process.children(recursive=True)),
        "files": len(files) - len(lines),
        "file_bytes": sum(path.stat().st_size for path in files if path not in lines),
        "line_bytes": sum(path.stat().st_size for path in lines),
    }


def tensor_bytes() -> int:
    """Of all storages behind tensors that the garbage collector knows, but for fake ones."""
    found = {}
    for thing in gc.get_objects():
        # By its type: to ask some proxies for their class runs their code.
        if issubclass(type(thing), torch.Tensor) and not isinstance(thing, FakeTensor):
            storage = thing.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
    return sum(found.values())


def growth(values: list[int]) -> dict[str, float]:
    """Of one number in all samples, after the warm-up: means of the first and last fifth, least and
    most, the slope of the least squares in units a step, and its standard error as if the residuals
    were independent.
    """
    values = values[int(WARM_UP * len(values)) :]
    count, fifth = len(values), max(1, len(values) // 5)
    steps = [EVERY * (i - (count - 1) / 2) for i in range(count)]
    spread = sum(step * step for step in steps)
    mean = fmean(values)
    slope = sum(s * (v - mean) for s, v in zip(steps, values, strict=True)) / spread
    residual = sum((v - mean - slope * s) ** 2 for s, v in zip(steps, values, strict=True))
    return {
        "first": fmean(values[:fifth]),
        "last": fmean(values[-fifth:]),
        "least": min(values),
        "most": max(values),
        "slope": slope,
        "error": (residual / (count - 2) / spread) ** 0.5,
    }


def main() -> None:
    arguments = sys.argv[1:]
    if not arguments or "--output" not in arguments:
        sys.exit(__doc__)
    Soak.output = arguments[arguments.index("--output") + 1]
    with tempfile.TemporaryFile("w+") as Soak.samples:
        with mock.patch.object(console, "Console", Soak):
            try:
                command_line(["train", *arguments])
            except SystemExit as end:
                if end.code:
                    raise  # it has said itself what went wrong
        Soak.samples.seek(0)
        samples = [json.loads(line) for line in Soak.samples]
    if len(samples) < LEAST:
        sys.exit(f"{len(samples)} samples: more steps, see --steps")
    found = {name: growth([each[name] for each in samples]) for name in samples[0]}
    print(f"{EVERY * len(samples)} steps, of which {WARM_UP:.0%} are warm-up")
    for name, g in found.items():
        print(
            f"{name:<15} {g['first']:>16,.1f} -> {g['last']:>16,.1f}   "
            f"{g['slope']:+12.2f} ± {g['error']:.2f} a step"
        )
    print(json.dumps({"steps": EVERY * len(samples), **found}))


if __name__ == "__main__":
    main()
