"""A run that is killed, at any moment, and resumed ends like one that was not, to the bit."""

import json
import random
import shutil
import signal

import pytest

from tests.faults.harness import KILL, TEAR, assert_same_ending, repeated, shim, watching
from tests.faults.points import PHASES

KILLED = -signal.SIGKILL
WHOLE_PHASES = ("reward", "optimizer")  # nothing is told of their parts
READ_EVERY = 5  # of the operations; three commands take longer than the run


def go_on(zygote, model, run, **how):
    """What a person does whose run was killed: resume it, or where nothing had begun start it."""
    begun = (run / "config.toml").is_file()
    return zygote.train(model, run, *(["--resume"] if begun else []), **how)


def assert_readers_understand(zygote, run, tmp_path):
    """Commands that read a run find something whole, or say in a line that there is nothing yet."""
    copy = tmp_path / f"{run.name}-read"
    if run.is_dir():  # it may not have come to that
        shutil.copytree(run, copy)  # a report is written into its run
    run = copy
    for command in (
        ["eval", run, "--json", "--num-problems", "2"],
        ["memory", "report", run, "--json"],
        ["export", run, "--output", tmp_path / f"{run.name}-exported"],
    ):
        code, said = zygote.call(*command)
        if code == 0:
            continue
        assert code == 2, (command, said)
        assert len(said.splitlines()) == 1, (command, said)
        assert "--debug" not in said, (command, said)
        assert str(run) in said, (command, said)


def killed_at(zygote, model, run, event, action, log):
    child = zygote.train(model, run, shim=shim(run, event, action), phases=watching(log))
    assert child.wait() == KILLED, child.words()


def test_killed_between_two_operations_on_files(zygote, whole, tiny_model_dir, tmp_path):
    """A few of those that the slow test goes through: as many in each part of the run."""
    count, chosen = 2, random.Random(0)
    part = len(whole.events()) / count
    for i in range(count):
        event, run = 1 + int(part * (i + chosen.random())), tmp_path / f"run-{i}"
        log = tmp_path / f"log-{i}"
        killed_at(zygote, tiny_model_dir, run, event, chosen.choice([KILL, TEAR]), log)
        child = go_on(zygote, tiny_model_dir, run, phases=watching(log))
        assert child.wait() == 0, (event, child.words())
        assert_same_ending(whole.run, run)
        assert repeated(log, whole.phases).total() <= 1


@pytest.mark.slow
def test_killed_in_every_phase(warm_zygote, whole, tiny_model_dir, tmp_path):
    """As it begins, between its parts (micro-batches, tokens, held-out problems), at its end."""
    lines = whole.phases.read_text().splitlines()
    points = [(phase, where) for phase in PHASES for where in ("begin", "inside", "end")]
    for phase, where in points:
        if where == "inside" and phase in WHOLE_PHASES:
            continue
        turn = lines.count(f"begin {phase}")  # the last of them
        run, log = tmp_path / f"run-{phase}-{where}", tmp_path / f"log-{phase}-{where}"
        phases = watching(log, phase, where, turn, signal.SIGKILL)
        child = warm_zygote.train(tiny_model_dir, run, phases=phases)
        assert child.wait() == KILLED, (phase, where, child.words())
        child = go_on(warm_zygote, tiny_model_dir, run, phases=watching(log))
        assert child.wait() == 0, child.words()
        assert_same_ending(whole.run, run)
        assert repeated(log, whole.phases).total() <= 1, (phase, where)


@pytest.mark.slow
def test_killed_before_every_operation_on_files(warm_zygote, whole, tiny_model_dir, tmp_path):
    zygote, wrong, most = warm_zygote, [], 0
    events = whole.events()
    # Before an operation, but where the one before it changed nothing; and in the middle of writes.
    before = ["", *events]
    moments = [(i, KILL) for i in range(1, len(before)) if before[i - 1][:5] != "fsync"]
    moments += [(i, TEAR) for i, event in enumerate(events, 1) if event[:5] == "write"]
    for event, action in moments:
        run, log = tmp_path / f"run-{event}-{action}", tmp_path / f"log-{event}-{action}"
        try:
            killed_at(zygote, tiny_model_dir, run, event, action, log)
            if event % READ_EVERY == 0:
                assert_readers_understand(zygote, run, tmp_path)
            child = go_on(zygote, tiny_model_dir, run, phases=watching(log))
            assert child.wait() == 0, child.words()
            assert_same_ending(whole.run, run)
            more = repeated(log, whole.phases)
            assert more.total() <= 1, more
            most = max(most, more.total())
        except AssertionError as error:
            wrong.append((events[event - 1], action, str(error)[:300]))
    print(
        f"{len(moments) - len(wrong)} of {len(moments)} end bit-identical, {most} phases repeated"
    )
    assert not wrong, "\n".join(map(str, wrong))


@pytest.mark.slow
def test_a_hundred_runs_killed_at_random_moments(
    warm_zygote, cpu_s, whole, tiny_model_dir, tmp_path
):
    zygote, chosen = warm_zygote, random.Random(0)
    kills = again = most = 0
    for i in range(100):
        run, log = tmp_path / f"run-{i}", tmp_path / f"log-{i}"
        log.touch()
        wanted, hits = chosen.choice([1, 1, 2, 3]), 0
        while hits < wanted:
            # A resumed run has less to do, but not by how much is left of it.
            moment = chosen.uniform(0, cpu_s), int(signal.SIGKILL)
            child = go_on(zygote, tiny_model_dir, run, phases=watching(log), moment=moment)
            code = child.wait()
            if code == 0 and hits:
                break
            if code == 0:  # it was faster than this: once more
                shutil.rmtree(run)
                log.write_text("")
                continue
            assert code == KILLED, child.words()
            hits += 1
        kills, again = kills + hits, again + (hits > 1)
        child = go_on(zygote, tiny_model_dir, run, phases=watching(log))
        assert child.wait() == 0, child.words()
        assert_same_ending(whole.run, run)
        more = repeated(log, whole.phases)
        assert more.total() <= hits, (more, hits)
        most = max(most, more.total() / hits)
    found = {"runs": 100, "identical": 100, "kills": kills, "killed_again": again}
    print(json.dumps({**found, "phases_repeated_for_a_kill": most}))
