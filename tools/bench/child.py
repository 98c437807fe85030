"""One measurement in a process of its own: a request goes in as JSON, a result comes back."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

MARK = "RESULT "
SHOWN = 2000  # characters of what a failed process said last


def ask(script: str, side: str, request: dict[str, Any]) -> dict[str, Any]:
    """Run `script --child SIDE` for a request and return its result; exit if it fails."""
    done = subprocess.run(
        [sys.executable, script, "--child", side],
        input=json.dumps(request),
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith(MARK)]
    if done.returncode == 0 and lines:
        return json.loads(lines[-1].removeprefix(MARK))
    if done.returncode < 0:
        said = f"killed by signal {-done.returncode}; if it is 9, memory ran out: free some"
    else:
        said = done.stderr.strip()[-SHOWN:]
    sys.exit(f"the process of {side} failed, asked for {json.dumps(request)}:\n{said}")


def answer(run: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """In the process itself: read the request, run, and write the result."""
    result = run(json.loads(sys.stdin.read()))
    print(MARK + json.dumps(result), flush=True)
