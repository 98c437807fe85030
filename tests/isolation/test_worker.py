"""The child process: whatever happens in it, the parent gets an answer or a reason and goes on."""

from __future__ import annotations

import os
import resource
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lowmem_grpo.errors import UserError
from lowmem_grpo.isolation.confine import Limits
from lowmem_grpo.isolation.worker import Worker, WorkerFailure, WorkerSetupError
from tests.isolation.processes import family, gone

HANDLERS = """
import os, sys, time
from lowmem_grpo.errors import TaskError

def make(prefix="", refuse=False, broken=False):
    if refuse:
        raise TaskError("not like this")
    if broken:
        raise OSError("disk")
    print("noise on standard output")
    def handle(do, x=0):
        print("more noise")
        if do == "echo": return prefix + x
        if do == "score": return x
        if do == "eval": return eval(x)
        if do == "hang": time.sleep(1000)
        if do == "power": return len(str(10 ** 10 ** 10))
        if do == "fork":
            if os.fork() == 0: time.sleep(1000)
            return time.sleep(1000)
        if do == "die": os._exit(3)
        if do == "pid": return os.getpid()
        if do == "leave":  # a grandchild in a session of its own
            if os.fork() == 0:
                os.setsid()
                if os.fork() == 0: time.sleep(1000)
                os._exit(0)
            return 0
        if do == "forged": os.write(4, b'{"id": 7, "value": 1.0}' + chr(10).encode()); return 0
        if do == "garbage": os.write(4, b'no JSON' + chr(10).encode()); return 0
        if do == "mute": os.closerange(0, 100); return 0
        if do == "fork both": os.fork(); return 1
    return handle
"""


@pytest.fixture
def make_worker(tmp_path, monkeypatch):
    (tmp_path / "handlers_of_the_test.py").write_text(HANDLERS)
    monkeypatch.syspath_prepend(tmp_path)
    workers = []

    def make(**arguments):
        limits = arguments.pop("limits", None)
        workers.append(Worker("handlers_of_the_test:make", arguments, limits))
        return workers[-1]

    yield make
    for worker in workers:
        worker.close()


def test_answers_come_back_whole(make_worker):
    worker = make_worker(prefix="\u00fc")
    text = 'line\nline\u2028\ud800\x00"' * 30_000  # longer than a pipe, and nothing JSON likes
    assert worker.call({"do": "echo", "x": text}, 20) == "\u00fc" + text
    assert worker.call({"do": "pid"}, 5) == worker.call({"do": "pid"}, 5)


@pytest.mark.parametrize("do", ["hang", "power", "fork"])
def test_a_call_that_does_not_end_is_ended(make_worker, do):
    worker = make_worker()
    worker.start()
    processes = family(worker.pid)
    start = time.monotonic()
    with pytest.raises(WorkerFailure) as caught:
        worker.call({"do": do}, 0.3)
    assert caught.value.reason == "timeout"
    assert time.monotonic() - start < 3
    assert gone(processes)
    assert worker.call({"do": "echo", "x": "on we go"}, 5) == "on we go"


def test_death_exit_and_errors_cost_one_score_each(make_worker):
    worker = make_worker()
    bad = [{"do": "die"}, {"do": "eval", "x": "exit()"}, {"do": "eval", "x": "1/0"}]
    bad += [{"do": "score", "x": x} for x in ("text", None)]
    bad += [
        {"do": "eval", "x": x}
        for x in (
            "float('nan')",
            "len(bytearray(6 * 2**30)) > 0",
            "[0] * 10**10",
            "open('/dev/stdin').read() and 1",
            "10**400",
        )
    ]
    failures = [worker.score(request, 5) for request in bad]
    reasons = [failure.reason for failure in failures]
    assert reasons == [
        "died",
        "raised",
        "raised",
        *["invalid"] * 3,
        "raised",
        "raised",
        "invalid",
        "invalid",
    ]
    assert "exit status 3" in failures[0].message
    assert worker.score({"do": "score", "x": 0.5}, 5) == 0.5


def test_a_child_that_cannot_start_says_why(make_worker):
    with pytest.raises(UserError, match="not like this"):
        make_worker(refuse=True).start()
    with pytest.raises(WorkerSetupError, match="OSError: disk"):
        make_worker(broken=True).start()
    with pytest.raises(WorkerSetupError, match="ModuleNotFoundError"):
        Worker("there_is_no_such_module:make", {}).start()


def test_the_hash_seed_is_fixed(make_worker):
    request = {"do": "eval", "x": "hash('text')"}
    first, second = make_worker(), make_worker()
    assert first.call(request, 5) == second.call(request, 5)


def test_a_child_that_was_killed_between_calls_is_replaced(make_worker):
    worker = make_worker()
    worker.start()
    os.kill(worker.pid, 9)
    time.sleep(0.2)
    assert worker.call({"do": "echo", "x": "back"}, 5) == "back"


def test_no_child_survives_its_worker_or_its_parent(make_worker):
    worker = make_worker()
    worker.call({"do": "leave"}, 5)
    processes = family(worker.pid)
    assert len(processes) > 1
    worker.close()
    assert gone(processes)
    script = (
        "import os, threading; from lowmem_grpo.isolation.worker import Worker; "
        "w = Worker('handlers_of_the_test:make', {}); w.start(); print(w.pid, flush=True); "
        "own = {'do': 'eval', 'x': 'os.environ[\"TMPDIR\"]'}; "
        "print(w.call(own, 5), flush=True); "
        # It is busy, and would be for a minute more.
        "busy = threading.Thread(target=w.call, args=({'do': 'power'}, 60)); busy.start(); "
        "busy.join(0.5); os._exit(1)"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    run = [sys.executable, "-c", script]
    out = subprocess.run(run, env=environment, capture_output=True, text=True, check=False)
    pid, directory = out.stdout.split()
    if "processes" not in worker.missing:
        assert gone([int(pid)])
        assert not Path(directory).exists()


def test_a_child_cannot_write_connect_or_signal_outside(make_worker, tmp_path):
    """Where this machine can confine it; what is missing is said at its start."""
    worker = make_worker()
    kept = tmp_path / "kept"
    kept.write_text("kept")
    server = socket.create_server(("127.0.0.1", 0))
    path = tmp_path / "socket"
    service = socket.socket(socket.AF_UNIX)
    service.bind(str(path))
    service.listen()
    tries = (
        f"__import__('socket').socket(1).connect({str(path)!r})",
        f"open({str(kept)!r}, 'w')",
        f"os.remove({str(kept)!r})",
        f"os.truncate({str(kept)!r}, 0)",
        f"os.mkdir({str(tmp_path / 'new')!r})",
        f"os.rename({str(kept)!r}, {str(kept)!r} + '2')",
        f"__import__('socket').create_connection(('127.0.0.1', {server.getsockname()[1]}), 1)",
        f"os.kill({os.getpid()}, 0)",
    )
    for expression in tries:
        with pytest.raises(WorkerFailure, match=r"PermissionError|OSError|ProcessLookupError"):
            worker.call({"do": "eval", "x": expression}, 5)
    assert kept.read_text() == "kept"
    assert worker.call({"do": "eval", "x": f"open({str(kept)!r}).read()"}, 5) == "kept"
    own = "__import__('tempfile').TemporaryFile().write(b'own')"
    assert worker.call({"do": "eval", "x": own}, 5) == 3
    pair = "[s.close() for s in __import__('socket').socketpair()] and 1"  # which asyncio needs
    assert worker.call({"do": "eval", "x": pair}, 5) == 1
    server.close()
    service.close()


def test_what_is_allowed_beyond_that(make_worker, tmp_path):
    limits = Limits(network=True, writable=(str(tmp_path),))
    worker = make_worker(limits=limits)
    server = socket.create_server(("127.0.0.1", 0))
    port = server.getsockname()[1]
    connect = f"__import__('socket').create_connection(('127.0.0.1', {port}), 1) and 1"
    assert worker.call({"do": "eval", "x": connect}, 5) == 1
    write = f"open({str(tmp_path / 'new')!r}, 'w').write('there')"
    assert worker.call({"do": "eval", "x": write}, 5) == 5
    assert (tmp_path / "new").read_text() == "there"
    server.close()


def test_answers_that_are_none_cost_their_call(make_worker):
    worker = make_worker()
    for do in ("forged", "garbage", "mute"):
        with pytest.raises(WorkerFailure) as caught:
            worker.call({"do": do}, 1)
        assert caught.value.reason in ("died", "timeout"), do
        assert worker.call({"do": "echo", "x": do}, 5) == do
    assert worker.call({"do": "fork both"}, 5) == 1
    assert worker.call({"do": "echo", "x": "one answer"}, 5) == "one answer"


def test_a_child_that_cannot_start_again_is_a_failure(make_worker, tmp_path):
    worker = make_worker()
    assert worker.score({"do": "score", "x": 0.5}, 5) == 0.5
    (tmp_path / "handlers_of_the_test.py").write_text("raise OSError('gone')")
    assert worker.score({"do": "die"}, 5).reason == "died"
    failure = worker.score({"do": "score", "x": 0.5}, 5)
    assert (failure.reason, "OSError: gone" in failure.message) == ("died", True)


def test_the_number_of_processes_is_the_namespace_s(make_worker):
    """Outside of one it would be all of the user's, threads included."""
    worker = make_worker()
    worker.start()
    limit = "__import__('resource').getrlimit(__import__('resource').RLIMIT_NPROC)[0]"
    found = worker.call({"do": "eval", "x": limit}, 5)
    own = resource.getrlimit(resource.RLIMIT_NPROC)[0]
    assert found == (own if "processes" in worker.missing else 256)
