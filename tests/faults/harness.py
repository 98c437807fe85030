"""Runs that are killed, stopped, or let down by their storage, and what is left of them.

`Zygote` starts children (zygote.py) under the shim that counts and breaks what they do to files
(shim.c). `RUN` is the run that they make: with everything in it that a directory can hold.
"""

import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from tests.runs import TINY, metrics

__all__ = [
    "FAIL", "KILL", "RUN", "SIGNAL", "TEAR", "Child", "Zygote", "assert_same_ending", "begun",
    "build_shim", "last_good", "repeated", "shim",
    "watching", "why_not",
]  # fmt: skip

COUNT, KILL, TEAR, SIGNAL, FAIL = range(5)
LOOK, GROW, CHANGE = 1, 2, 4
ROOT = Path(__file__).parents[2]

# Two iterations on a batch, groups that make way for others, pass rates, a reference that moves,
# evaluations of which not the first is the best: whatever a run keeps is there, and changes.
RUN = [
    *TINY,
    *("--task", "arithmetic:digits=1,ops=+"),
    *("--steps", "4", "--save-every", "1", "--eval-every", "2"),
    *("--seed", "6", "--reward", "overlong:max=6,cache=6"),
    *("--set", "rollout.dynamic_sampling=1", "--set", "rollout.curriculum=2"),
    *("--set", "grpo.num_iterations=2"),
    *("--set", "grpo.sync_ref_model=true", "--set", "grpo.ref_model_sync_steps=2"),
    *("--metric-for-best", "lenient_accuracy", "--set", "eval.num_problems=16"),
    *("--set", "eval.temperature=1"),
]


def why_not() -> str | None:
    """Why there are no faults here, or None."""
    if sys.platform != "linux":
        return "the shim is for Linux"
    if shutil.which("gcc") is None:
        return "no C compiler (gcc) to build the shim with"
    return None


def build_shim(directory: Path) -> Path:
    """Compile shim.c into `directory`; returns the library's path."""
    library = directory / "shim.so"
    source = Path(__file__).with_name("shim.c")
    command = ["gcc", "-O1", "-shared", "-fPIC", "-o", str(library), str(source), "-ldl"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return library


def shim(root: Path, at: int = 0, action: int = COUNT, **how: Any) -> dict[str, Any]:
    """What `Zygote.start` takes: `action` at event `at` on the files below `root`. `number`: the
    signal or errno; `lasting`: every event from there on; `kinds`: which are counted, all that
    write if not given; `log`: a file that names them.
    """
    given = {"number": 0, "lasting": False, "kinds": GROW | CHANGE, "log": "", **how}
    return {"root": str(root), "at": at, "action": action, **given}


@dataclass
class Child:
    """A command that runs. `said`: the file with what it says. `cpu_s`: the processor time that it
    took, once it has ended.
    """

    zygote: "Zygote"
    pid: int
    said: Path
    cpu_s: float = 0.0

    def wait(self) -> int:
        """Until it has ended: its exit code, or the negative number of the signal that ended it; or
        until it has stopped: SIGSTOP.
        """
        reply = self.zygote.ask(wait=self.pid)
        status, self.cpu_s = reply["status"], reply["cpu_s"]
        if os.WIFSTOPPED(status):
            return os.WSTOPSIG(status)
        return os.waitstatus_to_exitcode(status)

    def send(self, number: int) -> None:
        os.kill(self.pid, number)

    def words(self) -> str:
        return self.said.read_text()


class Zygote:
    """The process that children are forked from. A context manager.

    `here`: a directory for its files. `inside`: the command that it is started by, for namespaces
    of its own.
    """

    def __init__(self, here: Path, inside: tuple[str, ...] = ()):
        self.here = here
        self._number = 0
        library = str(build_shim(here))
        own = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
        own |= {"LD_PRELOAD": library, "FAULTS_SHIM": library, "PYTHONPATH": str(ROOT)}
        self._errors = (here / "zygote.txt").open("w")
        self._process = subprocess.Popen(
            [*inside, sys.executable, "-m", "tests.faults.zygote"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            cwd=ROOT,
            env=os.environ | own,
        )

    @property
    def pid(self) -> int:
        return self._process.pid

    def __enter__(self) -> "Zygote":
        return self

    def __exit__(self, *_: object) -> None:
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()
        self._errors.close()

    def ask(self, **request: Any) -> dict[str, Any]:
        """A request of zygote.py, and its reply."""
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        reply = self._process.stdout.readline()
        assert reply, (self.here / "zygote.txt").read_text()
        return json.loads(reply)

    def warm(self, *commands: list[Any]) -> None:
        """Run commands in the process itself, once: its children have their imports and plans."""
        self.ask(warm=[[str(a) for a in command] for command in commands])

    def start(
        self,
        *arguments: Any,
        shim: dict | None = None,
        phases: dict | None = None,
        limits: dict | None = None,
        moment: tuple[float, int] | None = None,
    ) -> Child:
        """`lowmem-grpo ARGUMENTS` in a child. `shim`, `phases`: what the functions `shim` and
        `watching` return. `limits`: of setrlimit, by name. `moment`: processor seconds after which
        it gets a signal, and its number.
        """
        self._number += 1
        said = self.here / f"said-{self._number}.txt"
        said.touch()
        child = {"arguments": [str(a) for a in arguments], "said": str(said)}
        child |= {"shim": shim, "phases": phases, "limits": limits or {}, "moment": moment}
        return Child(self, self.ask(start=child)["pid"], said)

    def call(self, *arguments: Any, **how: Any) -> tuple[int, str]:
        """The same to its end: exit code and what it said."""
        child = self.start(*arguments, **how)
        return child.wait(), child.words()

    def train(self, model: Path, output: Path, *arguments: Any, **how: Any) -> Child:
        """`RUN` in a child."""
        return self.start("train", "--model", model, "--output", output, *RUN, *arguments, **how)

    def resume(self, model: Path, output: Path, *arguments: Any, **how: Any) -> None:
        """`RUN` gone on with; fails the test unless it ends well."""
        child = self.train(model, output, "--resume", *arguments, **how)
        assert child.wait() == 0, child.words()


def watching(log: Path, phase: str = "", where: str = "", turn: int = 0, number: int = 0) -> dict:
    """What `Zygote.start` takes as `phases`: `log` gets them; and the process gets signal `number`
    when it is at the "begin", at the "end" or "inside" of a phase for the `turn`-th time.
    """
    point = {"phase": phase, "where": where, "turn": turn, "number": number}
    return {"log": str(log), "point": point if phase else None}


def begun(log: Path) -> Counter[str]:
    """How often each phase began, of all processes that wrote into the log."""
    lines = [line.split() for line in log.read_text().splitlines()]
    return Counter(phase for where, phase in lines if where == "begin")


def repeated(log: Path, whole: Path) -> Counter[str]:
    """The phases that processes began beyond those of the undisturbed run; an update and its
    optimizer's step are one.
    """
    more = begun(log) - begun(whole)
    more.pop("optimizer", None)
    return more


def last_good(run: Path) -> Path | None:
    """The checkpoint that a run goes on from, or None."""
    found = sorted(run.glob("checkpoints/step-*/state.json"))
    return found[-1].parent if found else None


def assert_same_ending(one: Path, other: Path) -> None:
    """Two finished runs have the same files, with the same in them, to the bit; times and memory
    aside.
    """
    assert _names(one) == _names(other), set(_names(one)) ^ set(_names(other))
    for name in _names(one):
        mine, theirs = one / name, other / name
        if name.endswith(".safetensors"):
            tensors, others = load_file(mine), load_file(theirs)
            assert tensors.keys() == others.keys(), name
            for key, tensor in tensors.items():
                assert torch.equal(tensor, others[key]), (name, key)
        elif name == "metrics.jsonl":
            assert metrics(one) == metrics(other)
        elif name == "config.toml":
            assert _settings(mine) == _settings(theirs)
        elif name.endswith("state.json"):
            assert _state(mine) == _state(theirs), name
        elif name not in ("memory.json", "plan.json", "run.lock"):
            assert mine.read_bytes() == theirs.read_bytes(), name


def _names(run: Path) -> list[str]:
    return sorted(str(p.relative_to(run)) for p in run.rglob("*") if p.is_file())


def _settings(file: Path) -> str:
    """Without the comments, which tell where a value came from, and without its own place."""
    lines = [line.partition("#")[0].rstrip() for line in file.read_text().splitlines()]
    return "\n".join(line for line in lines if not line.startswith("output ="))


def _state(file: Path) -> dict[str, Any]:
    state = json.loads(file.read_text())
    state["config"]["run"].pop("output")
    state.pop("sha256", None)  # of the rest
    return state
