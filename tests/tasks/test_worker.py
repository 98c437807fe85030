"""The child process: whatever happens in it, the parent gets an answer or a reason and goes on."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest

from lowmem_grpo.errors import UserError
from lowmem_grpo.tasks.worker import Worker, WorkerFailure, WorkerSetupError

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
    return handle
"""


@pytest.fixture
def make_worker(tmp_path, monkeypatch):
    (tmp_path / "handlers_of_the_test.py").write_text(HANDLERS)
    monkeypatch.syspath_prepend(tmp_path)
    workers = []

    def make(**arguments):
        workers.append(Worker("handlers_of_the_test:make", arguments))
        return workers[-1]

    yield make
    for worker in workers:
        worker.close()


def gone(pid):
    for _ in range(100):
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.05)
    return False


def test_answers_come_back_whole(make_worker):
    worker = make_worker(prefix="\u00fc")
    text = 'line\nline\u2028\ud800\x00"' * 30_000  # longer than a pipe, and nothing JSON likes
    assert worker.call({"do": "echo", "x": text}, 20) == "\u00fc" + text
    assert worker.call({"do": "pid"}, 5) == worker.call({"do": "pid"}, 5)


@pytest.mark.parametrize("do", ["hang", "power", "fork"])
def test_a_call_that_does_not_end_is_ended(make_worker, do):
    worker = make_worker()
    pid = worker.call({"do": "pid"}, 5)
    start = time.monotonic()
    with pytest.raises(WorkerFailure) as caught:
        worker.call({"do": do}, 0.3)
    assert caught.value.reason == "timeout"
    assert time.monotonic() - start < 3
    assert gone(pid)
    assert worker.call({"do": "echo", "x": "on we go"}, 5) == "on we go"


def test_death_exit_and_errors_cost_one_score_each(make_worker, caplog):
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
        )
    ]
    assert [worker.score(request, 5) for request in bad] == [0.0] * len(bad)
    assert worker.failures == {"died": 1, "raised": 8}
    assert len(caplog.records) == 2  # the first of each kind
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
    pid = worker.call({"do": "pid"}, 5)
    os.kill(pid, 9)
    time.sleep(0.2)
    assert worker.call({"do": "echo", "x": "back"}, 5) == "back"


def test_no_child_survives_its_worker_or_its_parent(make_worker):
    worker = make_worker()
    pid = worker.call({"do": "pid"}, 5)
    worker.close()
    assert gone(pid)
    script = (
        "import os; from lowmem_grpo.tasks.worker import Worker; "
        "w = Worker('handlers_of_the_test:make', {}); print(w.call({'do': 'pid'}, 5), flush=True); "
        "os._exit(1)"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    run = [sys.executable, "-c", script]
    out = subprocess.run(run, env=environment, capture_output=True, text=True, check=False)
    assert gone(int(out.stdout))
