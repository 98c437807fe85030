"""The reward `code[:column=tests,timeout=5,score=fraction]`: how many of a problem's tests the
program in the completion passes.

The program is the last ```python block (or ``` block) of the completion, or all of it. The tests
are in a column of the problem, in one of three forms:

    "assert f(1) == 2\\nassert f(2) == 3"        one test: what runs after the program, in its names
    ["assert f(1) == 2", "assert f(2) == 3"]     several
    {"inputs": ["1 2\\n"], "outputs": ["3\\n"]}  standard input, and the output that it should bring

Each test runs in an interpreter of its own, confined as `isolation/` says, in a directory that is
empty, for at most `timeout` seconds, and what it leaves running is ended with it. A test is passed
when its last line was reached, not when the process has ended well. Outputs are compared without
white space at the ends of lines and of the whole. score: `fraction` of the tests, or `all` (1.0 or
0.0).

Program and test share an interpreter: one that sets out to can answer an assert with an object that
equals everything. Input and output leave no such way. A problem without tests has no score.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from typing import Any

from lowmem_grpo.errors import ConfigError
from lowmem_grpo.isolation.confine import end_others
from lowmem_grpo.isolation.worker import Failure, Worker
from lowmem_grpo.rewards.isolated import Values

__all__ = ["CodeReward", "make_runner"]

_BLOCK = re.compile(r"```(?:python|py)?[ \t]*\n(.*?)```", re.DOTALL)
_MOST_OUTPUT = 2**20
# The program comes from a file without a name, and what says that all was run is in no name that it
# has: a program that wants to pass without being right has to look for it.
_DRIVER = """
def drive():
    import json, os, sys
    program, test, word, descriptor = json.loads(os.fdopen(int(sys.argv[1])).read())
    reached, write = word.encode(), os.write
    names = {"__name__": "__main__"}
    exec(compile(program, "program", "exec"), names)
    if test is not None:
        exec(compile(test, "test", "exec"), names)
    write(descriptor, reached)
drive()
"""


class CodeReward:
    """The reward function. `column`: where the tests are; `limit_s`: for each test; `whole`: all
    tests have to pass.
    """

    def __init__(self, column: str, limit_s: float, whole: bool) -> None:
        self._column, self._limit_s, self._whole = column, limit_s, whole
        self._worker = Worker("lowmem_grpo.rewards.code:make_runner", {"limit_s": limit_s})

    def __call__(self, completions: list[str], problems: list, **fields: Any) -> Values:
        return [
            self._one(text, problem.fields.get(self._column))
            for text, problem in zip(completions, problems, strict=True)
        ]

    def _one(self, completion: str, cell: Any) -> float | Failure:
        try:
            tests = read_tests(cell)
        except ConfigError as error:  # a row that nobody has looked at
            return Failure("invalid", str(error))
        limit = len(tests) * (self._limit_s + 1.0) + 5.0
        found = self._worker.score({"program": program_of(completion), "tests": tests}, limit)
        return float(found == 1.0) if self._whole and isinstance(found, float) else found


def program_of(completion: str) -> str:
    """The program in a completion."""
    blocks = _BLOCK.findall(completion)
    return blocks[-1] if blocks else completion


def read_tests(cell: Any) -> list[dict[str, str]]:
    """The tests of a problem: {"code"} or {"input", "output"}. Raises `ConfigError` for a cell that
    has none of the three forms.
    """
    if isinstance(cell, str) and cell.lstrip()[:1] in ("[", "{"):
        with contextlib.suppress(ValueError):  # a program can begin like that too
            cell = json.loads(cell)  # what a CSV can hold of a list
    if isinstance(cell, str) and cell.strip():
        return [{"code": cell}]
    if isinstance(cell, list) and cell and all(isinstance(x, str) for x in cell):
        return [{"code": test} for test in cell]
    if isinstance(cell, dict):
        inputs, outputs = cell.get("inputs"), cell.get("outputs")
        texts = isinstance(inputs, list) and isinstance(outputs, list)
        if texts and len(inputs) == len(outputs) > 0:
            pairs = zip(inputs, outputs, strict=True)
            return [{"input": str(given), "output": str(wanted)} for given, wanted in pairs]
    raise ConfigError(
        f"reward 'code' finds no tests in {cell!r:.60}: give a text, a list of texts, or "
        '{"inputs": [...], "outputs": [...]}'
    )


def make_runner(limit_s: float) -> Callable[[str, list[dict[str, str]]], float]:
    """The child's side: the fraction of the tests that the program passes."""

    def run(program: str, tests: list[dict[str, str]]) -> float:
        return sum(_passes(program, test, limit_s) for test in tests) / len(tests)

    return run


def _passes(program: str, test: dict[str, str], limit_s: float) -> bool:
    word = secrets.token_hex(8)
    with (
        tempfile.TemporaryDirectory() as here,
        tempfile.TemporaryFile() as source,
        tempfile.TemporaryFile() as answer,
        tempfile.TemporaryFile() as output,
    ):
        source.write(json.dumps([program, test.get("code"), word, answer.fileno()]).encode())
        source.seek(0)
        process = subprocess.Popen(
            [sys.executable, "-I", "-c", _DRIVER, str(source.fileno())],
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=subprocess.DEVNULL,
            cwd=here,
            env={"PATH": os.defpath, "PYTHONHASHSEED": "0"},  # and nothing that is secret
            pass_fds=(source.fileno(), answer.fileno()),
            start_new_session=True,
        )
        try:
            with contextlib.suppress(subprocess.TimeoutExpired, BrokenPipeError):
                process.communicate(test.get("input", "").encode(), timeout=limit_s)
        finally:
            _end(process)
        answer.seek(0)
        if answer.read(64) != word.encode():
            return False
        if "output" not in test:
            return True
        output.seek(0)
        return _lines(output.read(_MOST_OUTPUT)) == _lines(test["output"].encode())


def _end(process: subprocess.Popen) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)  # with whatever it started
    end_others()  # and what went to a session of its own
    process.wait()


def _lines(text: bytes) -> list[bytes]:
    return [line.rstrip() for line in text.strip().splitlines()]
