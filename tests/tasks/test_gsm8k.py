"""gsm8k from a local file: what is asked for, what counts, and where the rows come from."""

from __future__ import annotations

import json

import pytest

from lowmem_grpo.errors import TaskError
from lowmem_grpo.rewards import load_rewards
from lowmem_grpo.tasks import TaskOptions, load_task


def write(path, numbers):
    rows = [
        {"question": f"Ann has {i} pens. Ben has 1,000 more?", "answer": solution(i)}
        for i in numbers
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def solution(i):
    return f"He has {i}+1000=<<{i}+1000={i + 1000}>>{i + 1000} pens.\n#### {i + 1000:,}"


@pytest.fixture
def file(tmp_path):
    return write(tmp_path / "train.jsonl", range(30))


def load(**options):
    return load_task("gsm8k", seed=0, options=TaskOptions(**options))


def test_the_line_is_asked_for_and_the_system_prompt_comes_before(file):
    task = load(path=file, system_prompt="Be kind.")
    for problem in (task.train_problem(0), task.eval_problems(1)[0]):
        system, user = problem.messages
        assert system == {"role": "system", "content": "Be kind."}
        assert "more?\n" in user["content"]
        assert "####" in user["content"]
    (reward,) = load_rewards([], None, task)
    assert reward.name == "number"


def test_strict_wants_the_last_line_and_lenient_the_last_number(file):
    task = load(path=file, shuffle=False, eval_fraction=0)
    problem = task.train_problem(5)
    for text in ("So:\n#### 1005", "#### 1,005", "a\n  #### 1005.00 \n\n", solution(5)):
        assert task.is_correct_strict(problem, text), text
        assert task.is_correct_lenient(problem, text), text
    wrong_form = ("1005", "It is #### 1005", "####1005", "#### 1005 pens", "#### 1005\n#### ", "")
    for text in (*wrong_form, "#### 1006", "#### 1005\nor 1006"):
        assert not task.is_correct_strict(problem, text), text
    assert [task.is_correct_lenient(problem, text) for text in wrong_form] == [True] * 5 + [False]
    assert task.score(problem, "#### 1005") == 1.0
    assert "<<" not in task.reply(problem)
    assert task.is_correct_strict(problem, task.reply(problem))


def test_test_rows_come_from_their_own_file(tmp_path, file):
    task = load(path=file, eval_path=write(tmp_path / "test.jsonl", range(28, 33)))
    held = {p.messages[0]["content"] for p in task.eval_problems(100)}
    trained = {task.train_problem(i).messages[0]["content"] for i in range(task.num_train)}
    assert (len(held), len(trained)) == (5, 28)
    assert not held & trained
    with pytest.raises(TaskError, match="no column 'question'"):
        load(path=write_other(tmp_path))
    assert load(path=write_other(tmp_path), prompt_column="q").train_problem(0).answer == "#### 1"


def write_other(tmp_path):
    (tmp_path / "other.jsonl").write_text('{"q": "a", "answer": "#### 1"}')
    return str(tmp_path / "other.jsonl")


def test_without_a_file_the_rows_are_the_hubs(monkeypatch, file):
    asked = []

    def away(name, config, split):
        asked.append((name, config, split))
        raise ConnectionError("no network\nat all")

    monkeypatch.setattr(pytest.importorskip("datasets"), "load_dataset", away)
    with pytest.raises(TaskError) as caught:
        load()
    assert asked == [("openai/gsm8k", "main", "train")]
    assert "no network; " in str(caught.value)
    assert "task.path = FILE" in str(caught.value)
    from lowmem_grpo.tasks import records
    from lowmem_grpo.tasks.tables import open_table

    monkeypatch.setattr(records, "open_hub", lambda path: asked.append(path) or open_table(file))
    with pytest.raises(TaskError, match="no row is left"):  # the stand-in's splits are one
        load()
    assert asked[1:] == ["hub:openai/gsm8k@main/train", "hub:openai/gsm8k@main/test"]
    with pytest.raises(TaskError, match=r"'main' was given.*task\.path=FILE"):
        load_task("gsm8k:main", seed=0)
