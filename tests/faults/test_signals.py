"""Runs that are asked to stop, made to wait, or shared; and what a killed one leaves running."""

import json
import random
import signal
import time

import pytest

from tests.faults.harness import SIGNAL, assert_same_ending, shim, watching
from tests.isolation.processes import family, gone

STOPPED = 4
RUNS, EVERY = 20, 12


def test_a_second_process_waits_until_the_first_is_gone(zygote, whole, tiny_model_dir, tmp_path):
    run = tmp_path / "run"
    first = zygote.train(
        tiny_model_dir,
        run,
        phases=watching(tmp_path / "log", "update", "inside", 1, signal.SIGSTOP),
    )
    assert first.wait() == signal.SIGSTOP
    for how in ("--resume", "--overwrite"):
        second = zygote.train(tiny_model_dir, run, how)
        assert second.wait() == 2
        assert f"another process is training in {run}" in second.words()
    first.send(signal.SIGKILL)
    assert first.wait() == -signal.SIGKILL
    zygote.resume(tiny_model_dir, run)  # the lock was the process's, and went with it
    assert_same_ending(whole.run, run)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_asked_to_stop_at_random_moments(
    warm_zygote, cpu_s, whole, tiny_model_dir, tmp_path, number
):
    chosen, codes = random.Random(int(number)), []
    for i in range(RUNS):
        run = tmp_path / f"run-{i}"
        moment = chosen.uniform(0, cpu_s), int(number)
        child = warm_zygote.train(tiny_model_dir, run, moment=moment)
        codes.append(child.wait())
        if (run / "adapter").is_dir():  # it had ended, and Python was taking itself apart
            continue
        assert "Traceback" not in child.words()
        if (run / "config.toml").is_file():
            assert codes[-1] == STOPPED, child.words()
            warm_zygote.resume(tiny_model_dir, run)
            assert_same_ending(whole.run, run)
    print(json.dumps({"signal": number.name, "codes": codes}))
    assert codes.count(STOPPED) > RUNS / 4


@pytest.mark.slow
@pytest.mark.parametrize("twice", [False, True])
def test_asked_to_stop_while_it_works_on_files(warm_zygote, whole, tiny_model_dir, tmp_path, twice):
    """The run ends in order; where it is asked again at each operation that follows, at once.
    Nothing is half done in either case.
    """
    codes = []
    events = whole.events()
    for event in range(1 + events.index("rename /config.toml"), len(events), EVERY):
        run = tmp_path / f"run-{event}"
        faulty = shim(run, event, SIGNAL, number=int(signal.SIGTERM), lasting=twice)
        child = warm_zygote.train(tiny_model_dir, run, shim=faulty)
        codes.append(child.wait())
        about = events[event - 1], codes[-1], child.words()
        # The second of two signals is what ends a program whose end is not worth waiting for.
        assert codes[-1] in ((1,) if twice else (0, STOPPED)), about
        assert "Traceback" not in child.words(), about
        warm_zygote.resume(tiny_model_dir, run)
        assert_same_ending(whole.run, run)
    print(json.dumps({"twice": twice, "runs": len(codes), "codes": sorted(set(codes))}))


@pytest.mark.slow
def test_made_to_wait_at_random_moments(warm_zygote, cpu_s, whole, tiny_model_dir, tmp_path):
    chosen = random.Random(0)
    for i in range(10):
        run = tmp_path / f"run-{i}"
        moment = chosen.uniform(0, cpu_s), int(signal.SIGSTOP)
        child = warm_zygote.train(tiny_model_dir, run, moment=moment)
        code = child.wait()
        if code == signal.SIGSTOP:
            time.sleep(0.2)
            child.send(signal.SIGCONT)
            code = child.wait()
        assert code == 0, child.words()
        assert_same_ending(whole.run, run)


REWARD = """
import time
def slow(completions, **fields):
    time.sleep(60)
    return [0.0] * len(completions)
"""


@pytest.mark.slow
@pytest.mark.parametrize("where", ["begin", "end", "busy"])
def test_a_killed_trainer_leaves_no_worker(zygote, tiny_model_dir, tmp_path, where):
    """Before, after and while its reward runs."""
    (tmp_path / "reward.py").write_text(
        REWARD
        if where == "busy"
        else "def slow(completions, **fields): return [0.0] * len(completions)"
    )
    at = "end" if where == "end" else "begin"
    phases = watching(tmp_path / "log", "reward", at, 1, signal.SIGSTOP)
    arguments = ["--reward", f"{tmp_path}/reward.py:slow"]
    child = zygote.train(tiny_model_dir, tmp_path / "run", *arguments, phases=phases)
    assert child.wait() == signal.SIGSTOP
    if where == "busy":
        child.send(signal.SIGCONT)
    while len(workers := family(child.pid)[1:]) < 3 and where == "busy":
        time.sleep(0.1)  # it is starting
    assert workers or where == "begin"
    child.send(signal.SIGKILL)
    while (code := child.wait()) == signal.SIGSTOP:
        pass
    assert code == -signal.SIGKILL
    assert gone(workers)
