"""Reward functions that do what none should: (name, source of a file that defines `f`).

Each deed is done in one of several ways: always, for single completions only, for some of them, at
the second call, in a thread, in an async function.
"""

from __future__ import annotations

import textwrap

# What runs in the place of a reward; `return` gives its values, else every completion gets 0.5.
# PRECIOUS is a directory outside of its reach.
DEEDS = {
    "sleeps": "time.sleep(1000)",
    "loops": "while True: pass",
    "computes for ever": "len(str(10 ** 10 ** 10))",
    "waits for input": "os.read(os.pipe()[0], 1)",
    "forks and both return": "os.fork()",
    "forks and the child hangs": "os.fork() or time.sleep(1000)",
    "forks often": "for _ in range(40): os.fork() or time.sleep(1000)",
    "leaves a daemon": "os.fork() or (os.setsid(), os.fork() and os._exit(0), time.sleep(1000))",
    "allocates 50 GB": "bytearray(50 * 2**30)",
    "allocates without end": "x = []\nwhile True: x.append(bytearray(2**24))",
    "leaks": "LEAK.append(bytearray(900 * 2**20))",
    "exits": "sys.exit(0)",
    "exits at once": "os._exit(0)",
    "aborts": "os.abort()",
    "crashes": "ctypes.string_at(0)",
    "kills itself": "os.kill(os.getpid(), signal.SIGKILL)",
    "stops itself": "os.kill(os.getpid(), signal.SIGSTOP)",
    "kills its parent": "os.kill(os.getppid(), signal.SIGKILL)",
    "kills its group": "os.killpg(0, signal.SIGKILL)",
    "prints": "print('x' * 10**6, flush=True); os.write(1, b'y' * 10**5)",
    "writes to every pipe": "for n in range(3, 20):\n    with contextlib.suppress(OSError): "
    "os.write(n, b'garbage' + bytes([10]))",
    "closes every file": "os.closerange(0, 1000)",
    "raises": "raise ValueError('no')",
    "raises what it should not": "raise KeyboardInterrupt",
    "raises what cannot be shown": "raise Unshown()",
    "recurses": "deep = lambda: deep()\ndeep()",
    "returns NaN": "return [float('nan')] * len(completions)",
    "returns infinity": "return [float('-inf')] * len(completions)",
    "returns texts": "return ['1.0'] * len(completions)",
    "returns nothing": "return None",
    "returns too few": "return [1.0] * (len(completions) - 1)",
    "returns too many": "return [1.0] * 10**6",
    "returns what never ends": "return Endless()",
    "returns much text": "return ['x' * 10**8]",
    "deletes files": "shutil.rmtree(PRECIOUS)",
    "truncates files": "for p in Path(PRECIOUS).rglob('*'): p.is_file() and os.truncate(p, 0)",
    "writes files": "Path(PRECIOUS, 'kept').write_text('changed')",
    "renames files": "os.rename(PRECIOUS, PRECIOUS + '2')",
    "rewrites its own file": "Path(__file__).write_text('')",
    "breaks json": "import json; json.dumps = json.loads = None",
    "breaks builtins": "import builtins; builtins.len = builtins.isinstance = None",
    "ignores signals": "signal.signal(signal.SIGALRM, signal.SIG_IGN)\ntime.sleep(1000)",
}
# The deeds that reach beyond their process, by the limit that stops them.
STOPPED_BY = {
    "processes": (
        *("forks and the child hangs", "forks often", "leaves a daemon"),
        *("kills its parent", "kills its group"),
    ),
    "files": (
        *("deletes files", "truncates files", "writes files", "renames files"),
        "rewrites its own file",
    ),
}
WAYS = {
    "always": "{deed}",
    "alone": "if len(completions) == 1:\n{deed}",
    "sometimes": "if any(len(text) % 3 == 1 for text in completions):\n{deed}",
    "second": "CALLS.append(1)\nif len(CALLS) == 2:\n{deed}",
    "async": "{deed}",
}
FILE = """
import contextlib, ctypes, os, shutil, signal, sys, time
from pathlib import Path

PRECIOUS, LEAK, CALLS = {precious!r}, [], []
class Unshown(Exception):
    def __str__(self): raise RuntimeError
class Endless:
    def tolist(self):
        while True: pass

{kind}def f(completions, **fields):
{body}
    return [0.5] * len(completions)
"""


def functions(precious: str) -> list[tuple[str, str]]:
    """All of them, in an order that mixes the deeds."""
    found = []
    for way, frame in WAYS.items():
        for name, deed in DEEDS.items():
            inner = textwrap.indent(deed, "    ") if ":\n" in frame else deed
            body = textwrap.indent(frame.replace("{deed}", inner), "    ")
            kind = "async " if way == "async" else ""
            source = FILE.format(precious=precious, kind=kind, body=body)
            found.append((f"{name}, {way}", source))
    return found


# What a model may write, whatever reads it.
COMPLETIONS = [
    "",
    " " * 100_000,
    "9" * 100_000,
    "-" * 50_000 + "1",
    "1/" * 30_000 + "3",
    "1," * 30_000,
    "$10^{10^{10}}$",
    "\\boxed{" * 5_000,
    "\\frac{" * 5_000 + "1" + "}{2}" * 5_000,
    "(" * 20_000 + "1" + ")" * 20_000,
    "\ud800\x00\u2028\u202e",
    "a" * 40_000 + "b",
    "<answer>" * 5_000,
    "__import__('os')._exit(1)",
    "exit()",
    "9**9**9**9",
    "[[]]*10**10",
    "```python\nwhile True: pass\n```",
    '{"a":' * 20_000,
    "NaN",
]
