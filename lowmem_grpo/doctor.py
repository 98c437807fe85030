"""What `lowmem-grpo doctor` shows: the machine, what was chosen for it, what could be in the way.

`examine` gathers everything as one JSON value, `page` sets it for a terminal.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from lowmem_grpo.hardware import Choice, Machine, describe

_GIB = 2**30


def examine(machine: Machine, choices: dict[str, Choice], cache: Path) -> dict[str, Any]:
    """Everything that `doctor --json` prints: plain JSON values, bytes as bytes.

    `cache` is the cache directory; it need not exist yet. Imports torch and bitsandbytes, and on a
    card starts CUDA.
    """
    report = describe(machine, choices)
    report["memory"] = _memory(machine)
    report["threads"] = {"torch": machine.cpu_threads, "cores": _usable_cores()}
    report["cache"] = _cache(cache)
    report["bitsandbytes"] = _bitsandbytes(machine)
    report["warnings"] = _warnings(report)
    return report


def page(report: dict[str, Any]) -> str:
    """`examine`'s report for a terminal, without colours."""
    machine, memory, cache = report["machine"], report["memory"], report["cache"]
    capability = machine["compute_capability"]
    rows = [
        ("device", f"{machine['device']}  {machine['name']}"),
        ("memory", f"{_gib(memory['free_bytes'])} free of {_gib(memory['total_bytes'])}"),
        ("host memory", f"{_gib(memory['host_free_bytes'])} free of {_gib(memory['host_bytes'])}"),
        ("cpu", f"{machine['cpu_name']}, {report['threads']['torch']} threads"),
        ("cache", f"{cache['path']}, {_gib(cache['free_bytes'])} free"),
        ("bitsandbytes", report["bitsandbytes"]["library"] or "native library not loaded"),
        (
            "versions",
            ", ".join(f"{name} {version}" for name, version in machine["versions"].items()),
        ),
    ]
    if capability:
        rows.insert(1, ("compute capability", capability))
    rows += [
        (name.replace("_", " "), f"{choice['value']}  ({choice['reason']})")
        for name, choice in report["choices"].items()
    ]
    rows += [("warning", warning) for warning in report["warnings"]]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {text}" for name, text in rows)


def _memory(machine: Machine) -> dict[str, int]:
    import psutil

    host_free = min(psutil.virtual_memory().available, machine.host_memory_bytes)
    free, total = host_free, machine.memory_bytes
    if machine.device_type == "cuda":
        import torch

        # Asking starts a CUDA context, so what is free here already lacks our own (300 to 600 MiB).
        free, total = torch.cuda.mem_get_info(machine.device_index)
    return {
        "free_bytes": free,
        "total_bytes": total,
        "host_free_bytes": host_free,
        "host_bytes": machine.host_memory_bytes,
    }


def _usable_cores() -> int:
    if hasattr(os, "sched_getaffinity"):  # Linux: what this process may use, not what is there
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _cache(cache: Path) -> dict[str, Any]:
    existing = next(path for path in (cache, *cache.absolute().parents) if path.exists())
    return {
        "path": str(cache),
        "exists": cache.exists(),
        "free_bytes": shutil.disk_usage(existing).free,
    }


def _bitsandbytes(machine: Machine) -> dict[str, Any]:
    """Which native library bitsandbytes loaded (None: it runs without one), and what is wrong."""
    from bitsandbytes.cextension import ErrorHandlerMockBNBNativeLibrary, lib

    if isinstance(lib, ErrorHandlerMockBNBNativeLibrary):
        # On a CPU it then computes through torch: right, only slower. On a card nothing 4-bit runs.
        problem = "no native library: 4-bit layers run through torch, slower"
        if machine.device_type == "cuda":
            problem = f"its CUDA library does not load: {lib.error_msg.splitlines()[0]}"
        return {"library": None, "problem": problem}
    library = Path(lib._lib._name).stem
    if machine.device_type == "cuda" and not lib.compiled_with_cuda:
        return {"library": library, "problem": f"it loaded {library}, which has no CUDA code"}
    return {"library": library, "problem": None}


def _warnings(report: dict[str, Any]) -> list[str]:
    warnings = []
    if report["bitsandbytes"]["problem"]:
        warnings.append(f"bitsandbytes: {report['bitsandbytes']['problem']}")
    if report["cache"]["free_bytes"] < 2 * _GIB:
        free = _gib(report["cache"]["free_bytes"])
        warnings.append(f"only {free} free for models in {report['cache']['path']}")
    threads, cores = report["threads"]["torch"], report["threads"]["cores"]
    if report["machine"]["device_type"] == "cpu" and threads < cores:
        warnings.append(f"torch uses {threads} of {cores} cores (OMP_NUM_THREADS?)")
    return warnings


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / _GIB:.1f} GiB"
