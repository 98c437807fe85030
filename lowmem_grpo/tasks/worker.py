"""A child process that works on what a model wrote, so that the trainer does not.

Scorers parse completions as mathematics and some hand them to `eval`; a completion can make them
loop, allocate without end or call `exit()`. Here that costs one score. The child has a fixed hash
seed, because some generators walk through sets and would make other problems in every process; and
its standard output leads nowhere, because some print.

The protocol is one JSON object a line, over pipes: nothing that the child sends can become code in
the trainer. This is protection against accidents. It is no sandbox: the child has the rights of the
user.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import logging
import math
import os
import signal
import subprocess
import sys
import threading
import weakref
from collections import Counter
from typing import Any

from lowmem_grpo.errors import UserError

_START_LIMIT_S = 120.0
_CHILD_MEMORY_BYTES = 4 * 2**30
# The child's own alarm is for the case that the trainer is gone; it comes after the trainer's.
_ORPHAN_GRACE_S = 10.0
# The path is handed over because `-c` starts from another one than the trainer did. Starting this
# file by its name would put its folder first on the path, where a file can hide a standard module.
_BOOT = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from lowmem_grpo.tasks.worker import serve; serve(sys.argv[2], json.loads(sys.argv[3]))"
)
_log = logging.getLogger(__name__)


class WorkerSetupError(Exception):
    """The child could not start: the message is the child's own."""


class WorkerFailure(Exception):
    """One call brought no answer. `reason` is "timeout", "died" or "raised"."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class Worker:
    """A child that holds `handler = factory(**arguments)` and answers `handler(**request)`.

    target: the factory, as "module:name"; arguments and requests are JSON.
    failures: how many calls of `score` failed, by reason.
    """

    def __init__(self, target: str, arguments: dict[str, Any]) -> None:
        self.failures: Counter[str] = Counter()
        self._command = [
            *(sys.executable, "-c", _BOOT),
            *(json.dumps(sys.path), target, json.dumps(arguments)),
        ]
        self._process: subprocess.Popen[bytes] | None = None
        self._stop: weakref.finalize | None = None

    def start(self) -> None:
        """Starts the child if it does not run. Raises `WorkerSetupError`, or the `UserError` that
        the child raised.
        """
        if self._process is not None and self._process.poll() is None:
            return
        self.close()
        self._process = subprocess.Popen(
            self._command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            # A session of its own: Ctrl-C reaches the trainer alone, which then ends in order.
            start_new_session=True,
            env=os.environ
            | {"PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
        )
        self._stop = weakref.finalize(self, _end, self._process)
        try:
            reply = self._exchange(None, _START_LIMIT_S)
        except WorkerFailure as failure:
            raise WorkerSetupError(str(failure)) from failure
        if "refused" in reply:
            self.close()
            raise UserError(reply["refused"])
        if "raised" in reply:
            self.close()
            raise WorkerSetupError(reply["raised"])

    def call(self, request: dict[str, Any], limit_s: float) -> Any:
        """The handler's answer. Raises `WorkerFailure` after `limit_s` seconds, or when the child
        raises or dies.
        """
        self.start()
        reply = self._exchange({"request": request, "limit_s": limit_s}, limit_s)
        if "raised" in reply:
            raise WorkerFailure("raised", reply["raised"])
        return reply["value"]

    def score(self, request: dict[str, Any], limit_s: float) -> float:
        """The handler's answer as a score; 0.0 where it fails or is not a finite number, which is
        counted in `failures`.
        """
        try:
            value = self.call(request, limit_s)
            if isinstance(value, (int, float)) and math.isfinite(value):
                return float(value)
            failure = WorkerFailure("raised", f"the score is {value!r}")
        except WorkerFailure as error:
            failure = error
        self.failures[failure.reason] += 1
        if self.failures[failure.reason] == 1:
            _log.warning("a completion was scored 0 because its scorer failed: %s", failure)
        return 0.0

    def close(self) -> None:
        """Ends the child; the next call starts another."""
        if self._stop is not None:
            self._stop()
        self._process = self._stop = None

    def _exchange(self, message: dict[str, Any] | None, limit_s: float) -> dict[str, Any]:
        process = self._process
        guard = _Guard(process, limit_s)
        try:
            if message is not None:
                process.stdin.write(json.dumps(message).encode() + b"\n")
                process.stdin.flush()
            line = process.stdout.readline()
        except OSError:  # the pipe broke: the child is gone
            line = b""
        finally:
            expired = guard.stop()
        if line.endswith(b"\n"):
            if expired:  # answered, and ended in the same moment: the next call needs another child
                self.close()
            return json.loads(line)
        self.close()
        if expired:
            raise WorkerFailure("timeout", f"it took more than {limit_s:g} s")
        raise WorkerFailure("died", f"its process ended with exit status {process.returncode}")


class _Guard:
    """Ends the child after a time, unless stopped first; a blocked read of the child's pipe then
    returns.
    """

    def __init__(self, process: subprocess.Popen[bytes], limit_s: float) -> None:
        self._process = process
        self._lock = threading.Lock()
        self._stopped = self._expired = False
        self._timer = threading.Timer(limit_s, self._expire)
        self._timer.daemon = True
        self._timer.start()

    def _expire(self) -> None:
        # Under the lock: a stopped guard must not end a child that already serves the next call.
        with self._lock:
            if not self._stopped:
                self._expired = True
                _kill(self._process)

    def stop(self) -> bool:
        """Whether the time had run out."""
        self._timer.cancel()
        with self._lock:
            self._stopped = True
            return self._expired


def _kill(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is not None:
        return
    if os.name == "posix":
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # with whatever the child started
    else:
        process.kill()


def _end(process: subprocess.Popen[bytes]) -> None:
    _kill(process)
    process.wait()
    for pipe in (process.stdin, process.stdout):
        # A request that the child did not live to read may still be in the buffer.
        with contextlib.suppress(BrokenPipeError):
            pipe.close()


def serve(target: str, arguments: dict[str, Any]) -> None:
    """The child's side: builds the handler, says whether that worked, then answers line by line
    until the pipe closes.
    """
    requests, replies = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    nowhere = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(nowhere, descriptor)

    def answer(reply: dict[str, Any]) -> None:
        replies.write(json.dumps(reply, default=str).encode() + b"\n")
        replies.flush()

    module, _, name = target.partition(":")
    try:
        handler = getattr(importlib.import_module(module), name)(**arguments)
    except UserError as error:
        return answer({"refused": str(error)})
    except Exception as error:
        return answer({"raised": _describe(error)})
    _limit_memory()
    answer({"value": "ready"})
    for line in requests:
        message = json.loads(line)
        _set_alarm(message["limit_s"] + _ORPHAN_GRACE_S)
        try:
            reply = {"value": handler(**message["request"])}
        except BaseException as error:  # SystemExit too: a completion can say exit()
            reply = {"raised": _describe(error)}
        _set_alarm(0)
        answer(reply)


def _describe(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error)[:300]}"


def _limit_memory() -> None:
    try:
        import resource
    except ImportError:  # not on Windows
        return
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    if hard == resource.RLIM_INFINITY or hard > _CHILD_MEMORY_BYTES:
        resource.setrlimit(resource.RLIMIT_AS, (_CHILD_MEMORY_BYTES, hard))


def _set_alarm(seconds: float) -> None:
    if hasattr(
        signal, "setitimer"
    ):  # not on Windows; the default action ends the process, even inside C code
        signal.setitimer(signal.ITIMER_REAL, seconds)
