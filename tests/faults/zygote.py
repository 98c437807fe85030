"""A process that has imported everything and planned a tiny run, and forks a child for each command
line that it is given: a run then takes a third of a second.

Requests and replies are JSON objects, a line each:

    {"warm": [[...]]}    run command lines in this process, once: imports and plans; {}
    {"start": {...}}     fork, see `run`; {"pid": of the child}
    {"wait": pid}        until it ends or stops; {"status": as os.wait4 has it, "cpu_s"}
    {"command": [...]}   another program, in the namespaces of this process; {"code", "said"}

Nothing may run on several threads before a fork, so OMP_NUM_THREADS has to be 1.
"""

import atexit
import ctypes
import faulthandler
import json
import logging
import os
import signal
import subprocess
import sys
from typing import Any
from unittest import mock

LIMIT_S = 300  # of a child: one that hangs must not hang the tests
PR_SET_PDEATHSIG = 1


def run(
    arguments: list[str],
    said: str,
    limits: dict,
    shim: dict | None,
    phases: dict | None,
    moment: list | None,
):
    """In the child: the command line. `said`: where its standard output and error go. `limits`: of
    setrlimit, by name. `shim`, `phases`, `moment`: arguments of `arm` in shim.c, of `watch_phases`,
    and of `signal_after` in shim.c.
    """
    import resource

    from lowmem_grpo.cli import main
    from tests.faults.points import watch_phases

    handle = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    for name, value in limits.items():
        resource.setrlimit(getattr(resource, name), (value, resource.RLIM_INFINITY))
    if phases:
        watch_phases(**phases)
    library = ctypes.CDLL(os.environ["FAULTS_SHIM"])
    if shim:
        arm(library, **shim)
    if moment:
        assert library.signal_after(ctypes.c_double(moment[0]), moment[1]) == 0
    code = 0
    try:
        main(arguments, prog_name="lowmem-grpo")
    except SystemExit as end:
        code = end.code
    # As an interpreter ends, but for taking itself apart, which takes as long as two runs.
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def arm(
    library, root: str, at: int, action: int, number: int, lasting: bool, kinds: int, log: str
) -> None:
    texts = [text.encode() for text in (root, log)]
    library.arm(texts[0], ctypes.c_long(at), action, number, int(lasting), kinds, texts[1])


def serve(requests, replies) -> dict[str, Any] | None:
    """Answer until there are no more requests. In a child, what it was started with."""
    parent = os.getpid()
    for line in requests:
        request = json.loads(line)
        if "start" in request:
            pid = os.fork()
            if pid == 0:
                ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
                if os.getppid() != parent:
                    os._exit(1)
                requests.close()
                replies.close()
                signal.alarm(LIMIT_S)
                return request["start"]
            reply = {"pid": pid}
        elif "warm" in request:
            warm(request["warm"])
            reply = {}
        elif "wait" in request:
            _, status, used = os.wait4(request["wait"], os.WUNTRACED)
            reply = {"status": status, "cpu_s": used.ru_utime + used.ru_stime}
        else:
            done = subprocess.run(request["command"], capture_output=True, text=True)
            reply = {"code": done.returncode, "said": done.stdout + done.stderr}
        replies.write(json.dumps(reply) + "\n")
        replies.flush()
    return None


def warm(commands: list[list[str]]) -> None:
    from tests.runs import call

    for command in commands:
        result = call(*command)
        assert result.exit_code == 0, result.output


def main() -> None:
    faulthandler.enable()
    requests, replies = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)  # replies are the only thing that is said there
    import torch

    torch.set_num_threads(1)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    os.environ.pop("LD_PRELOAD", None)  # for this process and its forks, and no other program
    from lowmem_grpo.memory import plan
    from tests import runs

    with mock.patch.object(plan, "Phases", runs._phases):
        child = serve(requests, replies)
        if child is not None:
            run(**child)


if __name__ == "__main__":
    main()
