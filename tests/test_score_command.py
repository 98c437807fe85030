"""`lowmem-grpo score`: given completions are worth what they would be in training."""

import json
import subprocess
import sys

import pytest

from tests.runs import call

ROWS = [
    {"answer": "72", "completion": "The answer is 72", "right": True},
    {"answer": "5", "completion": "6", "right": False},
    {"answer": None, "completion": "7", "right": False},
    {"answer": "9", "completion": "8 and then 9", "right": False},
]


@pytest.fixture
def file(tmp_path):
    def write(rows, name="given.jsonl"):
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    return write


def scored(path, *arguments):
    result = call("score", "--task", f"records:{path}", "--json", *arguments)
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


def test_rows_are_scored_in_order_by_the_reward_that_training_would_take(file):
    found = scored(file(ROWS))
    assert [each["completion"] for each in found] == [row["completion"] for row in ROWS]
    assert [each["total"] for each in found] == [1.0, 0.0, 0.0, 1.0]
    assert [each["rewards"] for each in found] == [{"number": x} for x in (1.0, 0.0, 0.0, 1.0)]
    assert found[2]["why"] == {"number": "no answer to compare"}
    assert "5" in found[1]["why"]["number"]


def test_what_is_printed_counts_says_why_and_compares_with_what_is_expected(file):
    result = call("score", "--task", f"records:{file(ROWS)}", "--expected-column", "right")
    assert result.exit_code == 0
    assert "1 of 4 rows have no 'answer'" in result.stderr
    assert "line 4: 1  NOT AS EXPECTED  '8 and then 9'" in result.stdout
    assert "number: mean 0.500, 1 for 2 of 4, 0 for 2" in result.stdout
    assert "as 'right' says: 3 of 4" in result.stdout


def test_columns_have_other_names_and_rewards_have_weights(file, tmp_path):
    rows = [
        {"q": "1+1?", "key": {"solution": "2"}, "response": "<b>2</b>"},
        {"q": "1+2?", "key": {"solution": "3"}, "response": "3"},
    ]
    run = tmp_path / "run.toml"
    run.write_text(
        f"[task]\nname = 'records:{file(rows)}'\nprompt_column = 'q'\n"
        "answer_column = 'key.solution'\n"
        "[rewards]\nfunctions = ['number', 'format:<b>.*</b>']\nweights = [1.0, 0.5]\n"
    )
    result = call("score", run, "--completion-column", "response", "--json")
    assert [each["total"] for each in json.loads(result.stdout)] == [1.5, 1.0]
    named = call("score", run, "--json")
    assert (named.exit_code, "'completion'" in named.stderr) == (2, True)


def test_an_own_function_gets_all_rows_at_once_and_what_it_prints_is_shown(file, tmp_path):
    (tmp_path / "mine.py").write_text(
        "def share(completions, answer, **_):\n"
        "    print('heard', len(completions))\n"
        "    return [1 / len(completions) for _ in completions]\n"
        "def broken(completions, **fields):\n"
        "    return [fields['nothing']]\n"
    )
    path = file(ROWS)
    result = call("score", "--task", f"records:{path}", "--reward", f"{tmp_path}/mine.py:share")
    assert "heard 3" in result.stderr  # one row has no answer
    assert "share: mean 0.250" in result.stdout
    result = call("score", "--task", f"records:{path}", "--reward", f"{tmp_path}/mine.py:broken")
    assert result.exit_code == 1
    assert "KeyError: 'nothing' (mine.py:5)" in result.stderr


def test_rollouts_of_a_run_are_scored_as_they_were_step_by_step(file, tmp_path):
    (tmp_path / "mine.py").write_text(
        "def count(completions): return [len(completions)] * len(completions)\n"
    )
    prompt = [{"role": "user", "content": "?"}]
    more = {"prompt": prompt, "answer": "1", "problem": "p", "reward": 0, "tokens": 3}
    rows = [{"step": step, "completion": "1", **more} for step in (1, 1, 2)]
    found = scored(file(rows, "rollouts.jsonl"), "--reward", f"{tmp_path}/mine.py:count")
    assert [each["total"] for each in found] == [2.0, 2.0, 1.0]


def test_rows_without_answers_are_for_rewards_that_need_none(file):
    path = file([{"completion": "<b>1</b>"}, {"completion": "1"}])
    assert [each["total"] for each in scored(path, "--reward", "format:<b>.*</b>")] == [1.0, 0.0]
    for more, says in (
        ([], "no row has an answer in 'answer'"),
        (["--reward", "number"], "no row has an answer in 'answer'"),
        (["--reward", "model:some/thing"], "loads no model"),
        (["--completion-column", "complete"], "did you mean 'completion'?"),
    ):
        result = call("score", "--task", f"records:{path}", *more)
        assert (result.exit_code, says in result.stderr) == (2, True), result.stderr
    assert call("score", "--task", "gsm8k").exit_code == 2


def test_it_does_without_torch(file):
    code = (
        "import sys; from lowmem_grpo.cli import main; "
        f"main(['score', '--task', 'records:{file(ROWS)}'], standalone_mode=False); "
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
