"""A reward that says nothing of a first step stops the run; what it prints is kept."""

import pytest

from lowmem_grpo.errors import RewardError
from lowmem_grpo.isolation import output
from lowmem_grpo.isolation.confine import Limits
from lowmem_grpo.isolation.output import LogFile, Output
from lowmem_grpo.rewards import Reward, score
from lowmem_grpo.rewards.user import open_file
from lowmem_grpo.tasks import Problem
from tests.runs import TINY, call

PROBLEMS = [Problem(f"p/{i}", ({"role": "user", "content": "?"},), str(i)) for i in range(4)]
TEXTS = ["zero", "one", "two", "three"]
FILE = """
import os, sys
print("loaded")
def one_value(completions): return [1.0]
def no_return(completions): print("seen")
def nones(completions): return [None for _ in completions]
def conversational(completions): return [len(c[0]["content"]) for c in completions]
def conversational_too(completions): return [len(c[-1].get("content")) for c in completions]
def missing(completions, **fields): return [float(x) for x in fields["solution"]]
def now_and_then(completions): return [None, 1.0, "x", 0.0]
calls = []
def later(completions):
    calls.append(1)
    return [1.0] * (4 if len(calls) == 1 else 1)
def prints(completions):
    os.write(1, b"to 1\\xff\\n"); os.write(2, b"to 2\\n"); print("by print")
    os.system("echo by a child")
    print("much " * 50_000)
    return [1.0] * 4
"""


@pytest.fixture
def open_reward(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(FILE)

    def open_reward(name, output=None):
        spec = f"{path}:{name}"
        functions = open_file(str(path), [spec], ("answer",), 30.0, Limits(2**31), output)
        return Reward(name, 1.0, functions[spec])

    return open_reward


def ask(reward, **how):
    return score([reward], TEXTS, PROBLEMS, [[1]] * 4, check_first=True, **how)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("one_value", "1 value for 4 completions: it must return one for each (mine.py:4)"),
        ("no_return", "it returned None (NoneType), not a list of numbers (mine.py:5)"),
        ("nones", "returned None for all 4 completions of the first step"),
        ("conversational", "not 'str' (mine.py:7); completions are texts here"),
        ("conversational_too", "no attribute 'get' (mine.py:8); completions are texts here"),
        ("missing", "KeyError: 'solution' (mine.py:9)"),
    ],
)  # fmt: skip
def test_a_reward_without_any_value_stops_the_first_step(open_reward, name, says):
    reward = open_reward(name)
    with pytest.raises(RewardError) as caught:
        ask(reward)
    assert f"'{name}'" in str(caught.value)
    assert says in str(caught.value)


def test_later_failures_and_single_ones_are_counted_and_said(open_reward, caplog):
    found = ask(open_reward("now_and_then"))
    assert found.by_name["now_and_then"] == [None, 1.0, None, 0.0]
    later = open_reward("later")
    assert ask(later).total == [1.0] * 4
    found = ask(later)
    assert found.by_name["later"] == [None] * 4
    assert found.failed == {0, 1, 2, 3}
    said = [record.getMessage() for record in caplog.records]
    assert "'later' failed for 4 of 4 completions (4 invalid)" in said[-1]


def test_what_rewards_print_and_their_tracebacks_are_kept_within_bounds(
    open_reward, tmp_path, monkeypatch
):
    heard, log = Output(), tmp_path / "rewards.log"
    kept = [open_reward("prints", heard), open_reward("missing", heard)]
    heard.send_to(LogFile(log))
    ask(kept[0])
    with pytest.raises(RewardError):
        ask(kept[1])
    heard.close()
    said = log.read_bytes()
    for part in (
        b"loaded\n",
        b"to 1\xff\n",
        b"to 2\n",
        b"by print\n",
        b"by a child\n",
        b"Traceback",
    ):
        assert part in said
    assert b'mine.py", line 9, in missing' in said
    assert b"mine.py, call 1\n" in said
    assert output.PER_CALL <= len(said) < output.PER_CALL + 4096
    monkeypatch.setattr(output, "MOST", 1000)
    ask(kept[0])
    heard.close()
    assert not log.exists()
    assert (tmp_path / "rewards.log.1").stat().st_size > 1000


@pytest.mark.slow
def test_a_run_stops_in_its_first_step_and_says_what_to_mend(tiny_model_dir, open_reward, tmp_path):
    open_reward("missing")
    run, reward = tmp_path / "run", f"{tmp_path / 'mine.py'}:missing"
    arguments = ["--model", tiny_model_dir, "--output", run, "--steps", "2", *TINY]
    result = call("train", *arguments, "--reward", reward, "--task", "arithmetic")
    assert result.exit_code == 1
    assert "KeyError: 'solution' (mine.py:9)" in result.stderr
    said = (run / "rewards.log").read_text()
    assert "loaded" in said
    assert "KeyError: 'solution'" in said
    assert not (run / "metrics.jsonl").exists() or not (run / "metrics.jsonl").read_text()
