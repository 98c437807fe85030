"""A disk that is full, read-only, broken or gone: the run ends with one message that names what
could not be written and where to go on from, and when the storage is back it ends as if nothing
had been.

Errors are made by the shim, and by real file systems: a small tmpfs, a read-only mount and one that
is taken away, in namespaces of their own (user_namespaces(7)), where the machine allows it.
"""

import errno
import json
import random
import shutil
import signal
import subprocess
from pathlib import Path

import pytest

from tests.faults.harness import (
    CHANGE,
    FAIL,
    GROW,
    LOOK,
    RUN,
    Zygote,
    assert_same_ending,
    last_good,
    shim,
    watching,
    why_not,
)
from tests.runs import TINY

# errno -> the calls that it comes from, and whether the fault stays.
FAULTS = {
    "full": (errno.ENOSPC, GROW, True),
    "full for a moment": (errno.ENOSPC, GROW, False),
    "over quota": (errno.EDQUOT, GROW, True),
    "read-only": (errno.EROFS, GROW | CHANGE, True),
    "forbidden": (errno.EACCES, GROW | CHANGE, True),
    "broken": (errno.EIO, LOOK | GROW | CHANGE, True),
    "stale": (errno.ESTALE, LOOK | GROW | CHANGE, True),
}
MOMENTS = 16  # of each


def assert_it_says_so(code, said, run):
    """One message, no traceback, what could not be written, and where the run goes on from."""
    assert code == 1, said
    errors = [line for line in said.splitlines() if not line.startswith("warning: ")]
    assert len(errors) == 1, said
    assert errors[0].startswith("error: "), said
    assert "Traceback" not in said, said
    assert "--debug" not in said, said
    assert str(run) in errors[0].partition(";")[0], said
    good = last_good(run)
    assert good is None or str(good) in said, (good, said)


def let_down(zygote, model, run, fault, event):
    """A run whose storage fails at an event; returns exit code and what it said."""
    number, kinds, lasting = FAULTS[fault]
    how = {"number": number, "kinds": kinds, "lasting": lasting}
    child = zygote.train(model, run, shim=shim(run, event, FAIL, **how))
    return child.wait(), child.words()


def go_on(zygote, model, run):
    begun = (run / "config.toml").is_file()
    child = zygote.train(model, run, *(["--resume"] if begun else []))
    assert child.wait() == 0, child.words()


def test_a_run_whose_storage_fails_says_where_to_go_on(zygote, whole, tiny_model_dir, tmp_path):
    """In the middle of a run; the slow test goes through all of it."""
    run, middle = tmp_path / "run", len(whole.events(GROW)) // 2
    code, said = let_down(zygote, tiny_model_dir, run, "full", middle)
    assert_it_says_so(code, said, run)
    go_on(zygote, tiny_model_dir, run)
    assert_same_ending(whole.run, run)


def test_a_pool_whose_storage_fails_is_gone_on_with(zygote, tiny_model_dir, tmp_path):
    rollouts = ["rollouts", "--model", tiny_model_dir, *TINY, "--groups", "4", "--output"]
    whole, log = tmp_path / "whole", tmp_path / "log"
    zygote.warm([*rollouts, tmp_path / "warm"])
    code, said = zygote.call(*rollouts, whole, shim=shim(whole, log=str(log)))
    assert code == 0, said
    events = [line.split(maxsplit=1)[1] for line in log.read_text().splitlines()]
    appended = events.index("write /groups.jsonl")
    for fault, event in (
        ("full", events.index("write /.pool.json.partial")),
        ("full", appended),
        ("broken", events.index("fsync /groups.jsonl", appended)),
    ):
        pool = tmp_path / f"pool-{event}"
        how = {"number": FAULTS[fault][0], "lasting": True}
        code, said = zygote.call(*rollouts, pool, shim=shim(pool, event + 1, FAIL, **how))
        assert_it_says_so(code, said, pool)
        assert "run the command rollouts again, which goes on from there" in said
        code, said = zygote.call(*rollouts, pool)
        assert code == 0, said
        for name in ("pool.json", "groups.jsonl"):
            assert (pool / name).read_bytes() == (whole / name).read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_storage_that_fails_at_any_operation(warm_zygote, whole, tiny_model_dir, tmp_path, fault):
    zygote, chosen = warm_zygote, random.Random(0)
    events = whole.events(FAULTS[fault][1])
    begun = 1 + events.index("open /.plan.json.partial")
    wrong, survived = [], 0
    moments = sorted(chosen.sample(range(1, len(events) + 1), MOMENTS))
    for event in moments:
        run = tmp_path / f"run-{event}"
        try:
            code, said = let_down(zygote, tiny_model_dir, run, fault, event)
            assert "Traceback" not in said, said
            if code == 0:  # what failed was not needed
                survived += 1
            elif event <= begun:  # nothing had begun
                assert code in (1, 2), said
            else:
                assert_it_says_so(code, said, run)
            go_on(zygote, tiny_model_dir, run)
            assert_same_ending(whole.run, run)
        except AssertionError as error:
            wrong.append((events[event - 1], str(error)[:400]))
    print(json.dumps({"fault": fault, "runs": MOMENTS, "wrong": len(wrong), "survived": survived}))
    assert not wrong, "\n".join(map(str, wrong))


def test_a_directory_that_is_moved_away(zygote, whole, tiny_model_dir, tmp_path):
    run, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    phases = watching(tmp_path / "log", "update", "inside", 3, signal.SIGSTOP)
    child = zygote.train(tiny_model_dir, run, phases=phases)
    assert child.wait() == signal.SIGSTOP
    good = last_good(run)
    run.rename(elsewhere)
    child.send(signal.SIGCONT)
    code, said = child.wait(), child.words()
    assert not run.exists()
    elsewhere.rename(run)
    assert last_good(run) == good
    assert_it_says_so(code, said, run)
    go_on(zygote, tiny_model_dir, run)
    assert_same_ending(whole.run, run)


@pytest.mark.slow
def test_a_file_that_may_not_grow(warm_zygote, whole, tiny_model_dir, tmp_path):
    """RLIMIT_FSIZE: whatever the largest files are, they are not written."""
    largest = max(p.stat().st_size for p in whole.run.rglob("*") if p.is_file())
    run = tmp_path / "run"
    limits = {"RLIMIT_FSIZE": largest - 1}
    child = warm_zygote.train(tiny_model_dir, run, limits=limits)
    assert_it_says_so(child.wait(), child.words(), run)
    go_on(warm_zygote, tiny_model_dir, run)
    assert_same_ending(whole.run, run)


def test_what_is_renamed_into_place_was_synced_before(whole):
    """So that a power cut leaves no name whose contents never came to the disk."""
    unsynced, source, renamed = set(), "", 0
    for line in whole.log:
        _, call, path = (line + " ").split(" ", 2)
        path = path.strip()
        if call in ("write", "truncate"):
            unsynced.add(path)
        elif call in ("fsync", "unlink"):
            unsynced.discard(path)
            if path.endswith(".safetensors") and call == "fsync":
                # It was written beside its name, and put there out of the shim's sight.
                beside = f"{path.rpartition('/')[0]}/.tmp"
                unsynced.remove(next(p for p in unsynced if p.startswith(beside)))
        elif call == "from":
            source = path
        elif call == "rename":
            moved = {p for p in unsynced if p == source or p.startswith(f"{source}/")}
            if "/." not in path:  # it is seen from here on
                renamed += 1
                assert not moved, (path, moved)
            unsynced = (unsynced - moved) | {path + p.removeprefix(source) for p in moved}
    assert renamed > 10
    assert not {path for path in unsynced if "/." not in path}


class Disk:
    """A zygote in namespaces of its own, with a mount that only it sees. `path`: where the mount is
    for its children; `seen`: where it is for us.
    """

    def __init__(self, zygote: Zygote, path: Path):
        self.zygote, self.path = zygote, path
        self.path.mkdir()
        self.seen = Path(f"/proc/{zygote.pid}/root{path}")

    def do(self, *command) -> None:
        done = self.zygote.ask(command=[str(part) for part in command])
        assert done["code"] == 0, done


@pytest.fixture(scope="module")
def spaced_zygote(tiny_model_dir, tmp_path_factory):
    """A zygote that may mount."""
    allowed = shutil.which("unshare") and subprocess.run(
        ["unshare", "-Urm", "mount", "-t", "tmpfs", "none", "/mnt"], capture_output=True
    )
    if why_not() is not None or not allowed or allowed.returncode:
        pytest.skip(why_not() or "no mounts without privileges here")
    here = tmp_path_factory.mktemp("spaced")
    with Zygote(here, ("unshare", "-Urm")) as zygote:
        train = ["train", "--model", tiny_model_dir, "--output", here / "warm", *RUN]
        zygote.warm([*train, "--steps", "2"], [*train, "--resume"])
        yield zygote


@pytest.fixture
def spaced(spaced_zygote, tmp_path):
    return Disk(spaced_zygote, tmp_path / "disk")


@pytest.mark.slow
def test_a_disk_that_is_really_full(spaced, whole, tiny_model_dir):
    """In twelve sizes, of which the last would hold a run's files but for those of the moment."""
    needed = sum(p.stat().st_size for p in whole.run.rglob("*") if p.is_file())
    codes = []
    for i in range(12):
        room = int(needed * (i + 1) / 12)
        spaced.do("mount", "-t", "tmpfs", "-o", f"size={room}", "none", spaced.path)
        run = spaced.path / "run"
        child = spaced.zygote.train(tiny_model_dir, run)
        codes.append(child.wait())
        if codes[-1]:
            assert "Traceback" not in child.words(), (room, child.words())
        if codes[-1] and (spaced.seen / "run/config.toml").is_file():
            assert_it_says_so(codes[-1], child.words(), run)
        spaced.do("mount", "-o", "remount,size=1g", spaced.path)
        begun = (spaced.seen / "run/config.toml").is_file()
        child = spaced.zygote.train(tiny_model_dir, run, *(["--resume"] if begun else []))
        assert child.wait() == 0, child.words()
        assert_same_ending(whole.run, spaced.seen / "run")
        spaced.do("umount", spaced.path)
    print(json.dumps({"rooms": len(codes), "full": sum(map(bool, codes))}))
    assert codes.count(1) > 6


@pytest.mark.slow
@pytest.mark.parametrize("how", ["read-only", "gone", "another"])
@pytest.mark.parametrize("turn", [1, 3])
def test_a_mount_that_changes_under_the_run(spaced, whole, tiny_model_dir, tmp_path, how, turn):
    """It becomes read-only; it vanishes, and leaves an empty directory; another one is there."""
    kept, run = tmp_path / "kept", spaced.path / "run"
    kept.mkdir()
    spaced.do("mount", "--bind", kept, spaced.path)
    phases = watching(tmp_path / "log", "update", "inside", turn, signal.SIGSTOP)
    child = spaced.zygote.train(tiny_model_dir, run, phases=phases)
    assert child.wait() == signal.SIGSTOP
    good = last_good(kept / "run")
    if how == "read-only":  # over the other one, in which files are open
        spaced.do("mount", "--bind", kept, spaced.path)
        spaced.do("mount", "-o", "remount,bind,ro", spaced.path)
    elif how == "gone":
        spaced.do("umount", "--lazy", spaced.path)
    else:
        spaced.do("mount", "-t", "tmpfs", "none", spaced.path)
        (spaced.seen / "run/checkpoints").mkdir(parents=True)
    child.send(signal.SIGCONT)
    code, said = child.wait(), child.words()
    if how != "gone":
        spaced.do("umount", spaced.path)
    assert not list(spaced.path.iterdir())  # nothing was written beside it
    assert code == 1, said
    assert "Traceback" not in said
    assert "--debug" not in said
    assert str(run) in said
    assert last_good(kept / "run") == good
    assert good is None or good.name in said
    spaced.do("mount", "--bind", kept, spaced.path)
    child = spaced.zygote.train(tiny_model_dir, run, "--resume")
    assert child.wait() == 0, child.words()
    assert_same_ending(whole.run, kept / "run")
