"""The reference pass and the update on fake CUDA tensors; a program of its own.

    python run_policy.py LIBRARY

The device guard must be in the process before torch is, hence the program. Every case prints one
JSON line: {"case", "error"} and what the test wants to know of it. The code under test is the
product's own; what is replaced is the loading of weights (none exist) and the reading of values
(there are none).
"""

import ctypes
import json
import sys
import traceback


def main(library: str) -> None:
    assert ctypes.CDLL(library, mode=ctypes.RTLD_GLOBAL).install_fake_cuda() == 0
    from tests.fakecuda import cases

    for name, case in cases.CASES.items():
        try:
            found = {"error": None, **case()}
        except Exception as error:
            traceback.print_exc()
            found = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps({"case": name, **found}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
