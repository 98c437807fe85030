"""The head's Triton kernels compiled ahead of time, for every compute capability: no GPU.

    python tools/compile_kernels.py [--json]

Prints registers and spilled bytes of a thread, and shared memory of a block, as ptxas reports them
for what Triton makes of the kernels, with logits in bfloat16 (float16 for 7.5, which has no other).
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from lowmem_grpo.policy.head_kernels import BLOCK, WARPS, merge_kernel, probabilities_kernel

CAPABILITIES = (75, 80, 86, 89, 90, 120)
NUMBERS = {"stride": "i32", "start": "i32", "width": "i32", "scale": "fp32"}


def signature(kernel, dtype: str) -> dict[str, str]:
    """Types of the arguments, by name."""
    found = {}
    for name in kernel.arg_names:
        if name == "BLOCK":
            found[name] = "constexpr"
        elif name == "z_ptr":
            found[name] = f"*{dtype}"
        elif name == "targets_ptr":
            found[name] = "*i64"
        else:
            found[name] = NUMBERS.get(name, "*fp32")
    return found


def compiled(kernel, capability: int) -> dict[str, int | str]:
    """A row: what the kernel takes on cards of that capability."""
    dtype = "fp16" if capability < 80 else "bf16"
    source = ASTSource(kernel, signature(kernel, dtype), constexprs={"BLOCK": BLOCK})
    target = GPUTarget("cuda", capability, 32)
    made = triton.compile(source, target=target, options={"num_warps": WARPS})
    report = ptxas(made.asm["ptx"])
    return {
        "kernel": kernel.__name__,
        "capability": f"{capability // 10}.{capability % 10}",
        "dtype": dtype,
        "registers": int(re.search(r"Used (\d+) registers", report)[1]),
        "spill_bytes": sum(map(int, re.findall(r"(\d+) bytes spill", report))),
        "shared_bytes": made.metadata.shared,
    }


def ptxas(ptx: str) -> str:
    """What ptxas says of a program, by the newest that Triton brings."""
    folder = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    program = folder / "ptxas-blackwell"
    if not program.exists():
        program = folder / "ptxas"
    with tempfile.TemporaryDirectory() as scratch:
        source = Path(scratch) / "kernel.ptx"
        source.write_text(ptx, encoding="utf-8")
        run = subprocess.run(
            [str(program), "-v", f"--gpu-name={architecture(ptx)}", str(source), "-o", "/dev/null"],
            capture_output=True,
            text=True,
            check=True,
        )
    return run.stderr


def architecture(ptx: str) -> str:
    """The architecture that a program names."""
    return re.search(r"\.target (sm_\w+)", ptx)[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    options = parser.parse_args()
    rows = [compiled(k, c) for k in (merge_kernel, probabilities_kernel) for c in CAPABILITIES]
    if options.json:
        print("\n".join(json.dumps(row) for row in rows))
        return
    print("| " + " | ".join(rows[0]) + " |\n" + "|---" * len(rows[0]) + "|")
    for row in rows:
        print("| " + " | ".join(map(str, row.values())) + " |")


if __name__ == "__main__":
    main()
