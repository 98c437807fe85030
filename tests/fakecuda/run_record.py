"""The steps of record.py on fake CUDA tensors; a program of its own, like run_policy.py.

    python run_record.py LIBRARY OPERATION ...

A CPU build of torch has no CUDA kernels, and splits an operation for which it knows a composition
into its parts. The operations named are given a kernel, which no fake tensor ever calls: then they
stay whole, as in a CUDA build. Every case prints one JSON line: {"case", "error", "events"}.
"""

import ctypes
import json
import sys
import traceback


def main(library: str, operations: list[str]) -> None:
    assert ctypes.CDLL(library, mode=ctypes.RTLD_GLOBAL).install_fake_cuda() == 0
    import torch

    from tests.fakecuda.record import record_steps

    torch.set_num_threads(1)

    def report(case: str, architecture: str, checkpointing: bool) -> None:
        try:
            events = record_steps(architecture, "cuda", checkpointing=checkpointing)
            found = {"error": None, "events": events}
        except Exception as error:
            traceback.print_exc()
            found = {"error": f"{type(error).__name__}: {error}", "events": []}
        print(json.dumps({"case": case, **found}), flush=True)

    def no_kernel(*args):
        raise AssertionError("a kernel ran")

    report("split", "llama", False)
    kernels = torch.library.Library("aten", "IMPL")
    for operation in operations:
        kernels.impl(operation, no_kernel, "CUDA")
    for architecture in ("llama", "qwen2", "qwen3"):
        for checkpointing in (False, True):
            report(f"{architecture} {checkpointing}", architecture, checkpointing)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
