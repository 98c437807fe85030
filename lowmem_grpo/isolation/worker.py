"""A child process that works on what a model wrote, so that the trainer does not.

Scorers parse completions as mathematics and some hand them to `eval`; a completion can make them
loop, allocate without end or call `exit()`. Here that costs one score. The child has a fixed hash
seed, because some generators walk through sets and would make other problems in every process; what
it prints goes to an `Output`, or nowhere; it sees no GPU, whose memory is planned to the last; and
`confine.py` says what it may touch.

The protocol is one JSON object a line, over pipes: nothing that the child sends can become code in
the trainer.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import logging
import math
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import threading
import traceback
import weakref
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lowmem_grpo.errors import UserError
from lowmem_grpo.isolation.confine import Limits, confine, enter_namespaces
from lowmem_grpo.isolation.output import Output

_START_LIMIT_S = 120.0
_MOST_REPLY_BYTES = 64 * 2**20
# The child's own alarm is for the case that the trainer is gone; it comes after the trainer's.
_ORPHAN_GRACE_S = 10.0
_LAST_WORDS_S = 1.0
# The path is handed over because `-c` starts from another one than the trainer did. Starting this
# file by its name would put its folder first on the path, where a file can hide a standard module.
_BOOT = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from lowmem_grpo.isolation.worker import serve; serve(**json.loads(sys.argv[2]))"
)
_WORDS = {
    "processes": "a process that outlives its reward would go on",
    "network": "they reach the network",
    "files": "they can write where you can",
    "sockets": "they reach services of this machine",
}
_log = logging.getLogger(__name__)
_told: set[str] = set()


class WorkerSetupError(Exception):
    """The child could not start: the message is the child's own."""


@dataclass(frozen=True)
class Failure:
    """Instead of a score. `reason`: timeout, died, raised or invalid; `message`: in words."""

    reason: str
    message: str


class WorkerFailure(Exception):
    """One call brought no answer: `failure` says why."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason
        self.failure = Failure(reason, message)


class Worker:
    """A child that holds `handler = factory(**arguments)` and answers `handler(**request)`. Several
    threads may call it, one after another.

    target: the factory, as "module:name"; arguments and requests are JSON. The factory runs before
    the limits on files and memory are drawn, and what it loads is loaded. missing: which limits
    this machine does not have ("processes", "network", "files", "sockets"), once it has started.
    output: takes what the child prints, under `name`.
    """

    def __init__(
        self,
        target: str,
        arguments: dict[str, Any],
        limits: Limits | None = None,
        output: Output | None = None,
        name: str = "",
    ):
        self._serve = {"target": target, "arguments": arguments, "limits": limits or Limits()}
        self._output, self._name = output, name
        if output is not None:
            output.add(self)
        self._process: subprocess.Popen[bytes] | None = None
        self._stop: weakref.finalize | None = None
        self.missing: list[str] = []
        self._calls = 0
        self._lock = threading.RLock()

    @property
    def pid(self) -> int | None:
        """Of the child, or of the process that waits for it; None where there is none."""
        return self._process.pid if self._process else None

    def start(self) -> None:
        """Starts the child if it does not run. Raises `WorkerSetupError`, or the `UserError` that
        the child raised.
        """
        with self._lock:
            if self._process is None or self._process.poll() is not None:
                self._begin()

    def _begin(self) -> None:
        self.close()
        directory = tempfile.mkdtemp(prefix="lowmem-grpo-")
        limits = self._serve["limits"]
        serve = self._serve | {"directory": directory, "limits": asdict(limits)}
        serve["heard"] = self._output is not None
        own = {"PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        own |= {"CUDA_VISIBLE_DEVICES": "", "TMPDIR": directory}
        self._process = subprocess.Popen(
            [sys.executable, "-c", _BOOT, json.dumps(sys.path), json.dumps(serve)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL if self._output is None else subprocess.PIPE,
            # A session of its own: Ctrl-C reaches the trainer alone, which then ends in order.
            start_new_session=True,
            env=os.environ | own,
        )
        reader = self._output and self._output.follow(self._process.stderr, self._name)
        self._stop = weakref.finalize(self, _end, self._process, directory, reader)
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
        self.missing = reply["value"]
        for what in self.missing:
            if what not in _told:
                _told.add(what)
                _log.warning(
                    "warning: this machine cannot confine rewards wholly: %s", _WORDS[what]
                )

    def call(self, request: dict[str, Any], limit_s: float) -> Any:
        """The handler's answer. Raises `WorkerFailure` after `limit_s` seconds, or when the child
        raises or dies.
        """
        with self._lock:
            self.start()
            self._calls += 1
            if self._output is not None:
                self._output.begin(self._name, f"call {self._calls}")
            message = {"id": self._calls, "request": request, "limit_s": limit_s}
            reply = self._exchange(message, limit_s)
            if not isinstance(reply, dict) or reply.get("id") != self._calls:
                self.close()
                raise WorkerFailure("died", "its process answered out of turn")
        if "raised" in reply:
            # What is left of the child's memory, or of its processes, is not enough for the next.
            if str(reply["raised"]).startswith(("MemoryError", "BlockingIOError")):
                self.close()
            raise WorkerFailure("raised", str(reply["raised"]))
        return reply.get("value")

    def score(self, request: dict[str, Any], limit_s: float) -> float | Failure:
        """The handler's answer as a score, or why there is none."""
        try:
            value = self.call(request, limit_s)
        except WorkerFailure as error:
            return error.failure
        except (UserError, WorkerSetupError) as error:  # it could start before
            return Failure("died", f"it cannot start again: {error}")
        # Converted here, where a whole number of a thousand digits is no float.
        with contextlib.suppress(TypeError, ValueError, OverflowError):
            if not isinstance(value, str) and math.isfinite(value):
                return float(value)
        return Failure("invalid", f"the score is {str(value)[:60]}")

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
            line = process.stdout.readline(_MOST_REPLY_BYTES)
        except OSError:  # the pipe broke: the child is gone
            line = b""
        finally:
            expired = guard.stop()
        if line.endswith(b"\n"):
            if expired:  # answered, and ended in the same moment: the next call needs another child
                self.close()
            try:
                return json.loads(line)
            except (ValueError, RecursionError):  # what runs there can write to its pipe
                self.close()
                raise WorkerFailure("died", "its process answered what cannot be read") from None
        if not expired:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(1.0)  # it ends by itself, and says how
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


def _end(process: subprocess.Popen[bytes], directory: str, reader: threading.Thread | None) -> None:
    _kill(process)
    process.wait()
    if reader is not None:
        reader.join(_LAST_WORDS_S)  # where nothing ends what it started, that can keep its pipe
    for pipe in (process.stdin, process.stdout):
        # A request that the child did not live to read may still be in the buffer.
        with contextlib.suppress(BrokenPipeError):
            pipe.close()
    shutil.rmtree(directory, ignore_errors=True)


def serve(
    target: str,
    arguments: dict[str, Any],
    limits: dict[str, Any],
    directory: str,
    heard: bool,
) -> None:
    """The child's side: builds the handler, says whether that worked, then answers line by line
    until the pipe closes. `heard`: what it prints goes to standard error.
    """
    within = Limits(**limits)
    missing = enter_namespaces(within.network, directory)
    requests, replies = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    nowhere = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1) if heard else (0, 1, 2):
        os.dup2(nowhere, descriptor)
    if heard:
        os.dup2(2, 1)
        sys.stdout.reconfigure(line_buffering=True, errors="backslashreplace")
    own = os.getpid()

    def answer(reply: dict[str, Any]) -> None:
        replies.write(json.dumps(reply, default=repr).encode() + b"\n")
        replies.flush()

    module, _, name = target.partition(":")
    try:
        handler = getattr(importlib.import_module(module), name)(**arguments)
    except UserError as error:
        return answer({"refused": str(error)})
    except Exception as error:
        return answer({"raised": describe(error)})
    missing += confine(directory, within)
    answer({"value": missing})
    for line in requests:
        message = json.loads(line)
        _set_alarm(message["limit_s"] + _ORPHAN_GRACE_S)
        reply = {"id": message["id"]}
        try:
            # To text here, where what is odd about a value costs this call alone.
            reply["value"] = json.loads(json.dumps(handler(**message["request"]), default=repr))
        except BaseException as error:  # SystemExit too: a completion can say exit()
            reply["raised"] = describe(error)
        if os.getpid() != own:  # it forked, and both came back
            os._exit(0)
        _set_alarm(0)
        answer(reply)


def describe(error: BaseException) -> str:
    """Its type, its words, cut, and where it came from; whatever it answers when it is asked."""
    try:
        words = str(error)[:300]
    except BaseException as other:
        words = f"(its text: {type(other).__name__})"
    where = place_of(error)
    return f"{type(error).__name__}: {words}{f' ({where})' if where else ''}"


def place_of(error: BaseException) -> str:
    """FILE:LINE of the last call that is neither of a library nor of this package, else of the last
    one.
    """
    frames = traceback.extract_tb(error.__traceback__)
    kinds = ("stdlib", "platstdlib", "purelib", "platlib")
    known = {*(sysconfig.get_path(kind) for kind in kinds), str(Path(__file__).parents[1])}
    own = [frame for frame in frames if not frame.filename.startswith((*known, "<"))]
    last = (own or frames)[-1:]
    return f"{Path(last[0].filename).name}:{last[0].lineno}" if last else ""


def _set_alarm(seconds: float) -> None:
    # Not on Windows; the default action ends the process, even inside C code.
    if hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_REAL, seconds)
