"""The reward `code`: programs that pass, that fail, and that want to pass without being right."""

from __future__ import annotations

import json
import time

import pytest

from lowmem_grpo.errors import ConfigError
from lowmem_grpo.isolation.worker import Worker
from lowmem_grpo.rewards import load_rewards, score
from lowmem_grpo.rewards.code import make_runner, program_of, read_tests
from lowmem_grpo.tasks import Problem, load_task
from tests.isolation.processes import family

ADD = "def add(a, b):\n    return a + b\n"
ASSERTS = ["assert add(1, 2) == 3", "assert add(-1, 1) == 0"]


@pytest.fixture(scope="module")
def run():
    return make_runner(2.0)


def passed(run, program, cell=ASSERTS):
    return run(program, read_tests(cell))


@pytest.mark.parametrize(
    ("program", "share"),
    [
        (ADD, 1.0),
        ("def add(a, b): return 3", 0.5),
        ("def add(a, b): return a - b", 0.0),
        ("def add(a, b", 0.0),
        ("", 0.0),
        ("\x00", 0.0),
        # Early ends, and a look for what says that all was run.
        ("import sys; sys.exit(0)", 0.0),
        ("import os; os._exit(0)", 0.0),
        ("import __main__ as m, os; os.write(m.descriptor, m.word.encode()); os._exit(0)", 0.0),
        ("def add(a, b): exit()", 0.0),
        ("while True: pass", 0.0),
    ],
)
def test_the_share_of_the_tests_that_pass(run, program, share, monkeypatch):
    if "while" in program:
        run = make_runner(0.2)
    assert passed(run, program) == share


def test_input_and_output(run):
    cell = {"inputs": ["1 2\n", "3 4\n", ""], "outputs": ["3", "7  \n\n", "none"]}
    program = (
        "import sys\nwords = sys.stdin.read().split()\n"
        "print(sum(map(int, words)) if words else 'none')\n"
    )
    assert passed(run, program, cell) == 1.0
    assert passed(run, "print(3)", cell) == pytest.approx(1 / 3)
    assert passed(run, "print(3); import os; os._exit(0)", cell) == 0.0  # lost in its buffer
    assert passed(run, program, json.dumps(cell)) == 1.0  # as a CSV has it


LEAVES = """import os, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0: time.sleep(1000)
    os._exit(0)
os.wait()
"""


def test_what_a_program_starts_and_says_is_gone_with_it(monkeypatch):
    monkeypatch.setenv("SECRET_TOKEN", "hidden")
    worker = Worker("lowmem_grpo.rewards.code:make_runner", {"limit_s": 5.0})
    worker.start()
    before = len(family(worker.pid))
    assert worker.score({"program": LEAVES + ADD, "tests": read_tests(ASSERTS)}, 20) == 1.0
    if "processes" not in worker.missing:
        ended = time.monotonic() + 5  # until they are waited for
        while len(family(worker.pid)) > before and time.monotonic() < ended:
            time.sleep(0.05)
        assert len(family(worker.pid)) == before
    told = f"import os\nif 'SECRET_TOKEN' in os.environ or os.listdir('.'): 1 / 0\n{ADD}"
    assert worker.score({"program": told, "tests": read_tests(ASSERTS)}, 20) == 1.0
    worker.close()


def test_the_last_block_of_a_completion_is_the_program():
    text = f"First:\n```python\nwrong\n```\nNo, this:\n```py\n{ADD}```\nDone."
    assert program_of(text) == ADD
    assert program_of(ADD) == ADD


@pytest.mark.parametrize("cell", ["", [], [1], {"inputs": []}, {"inputs": ["1"], "outputs": []}, 7])
def test_cells_without_tests_are_refused(cell):
    with pytest.raises(ConfigError, match="finds no tests"):
        read_tests(cell)


def test_as_a_reward_of_a_task(tmp_path):
    path = tmp_path / "code.jsonl"
    rows = [{"prompt": f"Write add, {i}", "answer": "-", "tests": ASSERTS} for i in range(4)]
    path.write_text("\n".join(map(json.dumps, rows)))
    task = load_task(f"records:{path}", seed=0)
    problems = [task.train_problem(i) for i in range(2)]
    texts = [f"```python\n{ADD}```", "def add(a, b): return 3"]
    rewards = load_rewards(["code", "code:score=all,timeout=2"], None, task)
    found = score(rewards, texts, problems, [[1], [1]])
    assert found.by_name == {"code": [1.0, 0.5], "code_2": [1.0, 0.0]}
    kept = tmp_path / "kept"
    kept.write_text("kept")
    attack = f"open({str(kept)!r}, 'w')\n{ADD}"
    found = score(rewards[:1], [attack, attack], problems, [[1], [1]])
    if "files" not in rewards[0].function._worker.missing:
        assert found.total == [0.0, 0.0]
        assert kept.read_text() == "kept"
    other = Problem("other", (), "-", {})
    (failure,) = rewards[0].function(completions=["x"], problems=[other])
    assert "finds no tests in None" in failure.message
    for spec, says in (
        ("code:column=test", "did you mean 'tests'"),
        ("code:timeout=x", "timeout=x"),
        ("code:score=most", "score=most"),
        ("code:colum=x", "write code"),
    ):
        with pytest.raises(ConfigError, match=says):
            load_rewards([spec], None, task)
