"""The process that children are forked from, and the run that nothing disturbs."""

from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.faults.harness import CHANGE, GROW, LOOK, RUN, Zygote, shim, watching, why_not


@dataclass
class Whole:
    """A run that nothing disturbed: `run`, its directory; `log`, what it did to its files, as
    shim.c has it; `phases`, the log of them.
    """

    run: Path
    log: list[str]
    phases: Path

    def events(self, kinds: int = GROW | CHANGE) -> list[str]:
        """As "write /metrics.jsonl", in the order that a shim counts them in."""
        parts = [line.split(maxsplit=1) for line in self.log]
        return [event for kind, event in parts if int(kind) & kinds]


@pytest.fixture(scope="session")
def zygote(tiny_model_dir, tmp_path_factory):
    if why_not() is not None:
        pytest.skip(why_not())
    here = tmp_path_factory.mktemp("zygote")
    with Zygote(here) as zygote:
        train = ["train", "--model", tiny_model_dir, "--output", here / "warm", *RUN]
        zygote.warm([*train, "--steps", "2"], [*train, "--resume"])
        yield zygote


@pytest.fixture(scope="session")
def warm_zygote(zygote, tiny_model_dir, tmp_path_factory):
    """The same, where many children make its warming up worth while: a process compares its first
    and its last step with plans for their shapes, so runs are resumed at every step.
    """
    run = tmp_path_factory.mktemp("warm") / "run"
    train = ["train", "--model", tiny_model_dir, "--output", run, *RUN]
    zygote.warm(
        [*train, "--steps", "1"],
        *([*train, "--resume", "--steps", str(steps)] for steps in (2, 3, 4)),
        ["eval", run, "--json", "--num-problems", "2"],
        ["memory", "report", run, "--json"],
        ["export", run, "--output", run.with_name("exported")],
    )
    return zygote


@pytest.fixture(scope="session")
def whole(zygote, tiny_model_dir, tmp_path_factory):
    here = tmp_path_factory.mktemp("whole")
    child = zygote.train(
        tiny_model_dir,
        here / "run",
        shim=shim(here / "run", kinds=LOOK | GROW | CHANGE, log=str(here / "events")),
        phases=watching(here / "phases"),
    )
    assert child.wait() == 0, child.words()
    return Whole(here / "run", (here / "events").read_text().splitlines(), here / "phases")


@pytest.fixture(scope="session")
def cpu_s(warm_zygote, tiny_model_dir, tmp_path_factory):
    """The processor seconds of an undisturbed run."""
    child = warm_zygote.train(tiny_model_dir, tmp_path_factory.mktemp("timed") / "run")
    assert child.wait() == 0, child.words()
    return child.cpu_s
