"""Tasks without some of their problems: which ones stay, in which order, and what is said."""

import json

import pytest

from lowmem_grpo.errors import TaskError
from lowmem_grpo.tasks import TaskOptions, load_task
from lowmem_grpo.tasks.base import held_out


@pytest.fixture
def path(tmp_path):
    """Rows of which every third has a long prompt."""
    file = tmp_path / "rows.jsonl"
    rows = [{"prompt": f"{i}" + " long" * (i % 3 == 0), "answer": str(i)} for i in range(90)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def is_short(problem):
    return "long" not in problem.messages[-1]["content"]


def test_rows_that_stay_come_once_in_an_epoch_and_none_changes_sides(path):
    whole, task = (load_task(f"records:{path}", seed=3) for _ in range(2))
    task = task.leaving_out(is_short)
    trained = [whole.train_problem(i) for i in range(whole.num_train)]
    held = whole.eval_problems(90)
    kept = [problem.id for problem in trained if is_short(problem)]
    for epoch in range(2):
        start = epoch * len(kept)
        ids = [task.train_problem(i).id for i in range(start, start + len(kept))]
        assert sorted(ids) == sorted(kept)
    wanted = [problem.id for problem in held if is_short(problem)]
    assert sorted(problem.id for problem in task.eval_problems(90)) == sorted(wanted)
    assert task.left_out() == (
        f"{len(trained) - len(kept)} of {len(trained)} training problems and "
        f"{len(held) - len(wanted)} of {len(held)} held-out ones"
    )
    assert whole.left_out() == ""


@pytest.mark.parametrize(
    "spec",
    ["arithmetic:digits=2", "arithmetic:digits=3", "2*arithmetic:digits=2 + records:PATH"],
)
def test_other_problems_stand_in_the_place_of_generated_ones(path, spec):
    spec = spec.replace("PATH", str(path))

    def stays(problem):
        text = problem.messages[-1]["content"]
        return "7" not in text and "long" not in text

    whole = load_task(spec, seed=1)
    task, again = (load_task(spec, seed=1).leaving_out(stays) for _ in range(2))
    problems = [task.train_problem(i) for i in range(40)]
    assert all(map(stays, problems + task.eval_problems(30)))
    assert [again.train_problem(i) for i in reversed(range(40))] == problems[::-1]
    assert again.eval_problems(30) == task.eval_problems(30)
    assert len({problem.id for problem in task.eval_problems(30)}) > 20
    held = {problem.id for problem in whole.eval_problems(2000)}
    assert not held & {problem.id for problem in problems}
    if " + " not in spec:
        same = [whole.train_problem(i) for i in range(40)]
        assert [p for p in problems if p in same] == [p for p in same if stays(p)]
        replaced = sum(not stays(problem) for problem in same)
        left, looked = map(int, task.left_out().split()[:3:2])
        assert left >= replaced > 0
        assert looked == left + 40


def test_a_request_and_examples_are_part_of_what_is_looked_at(path):
    path.write_text(path.read_text().replace("prompt", "question"))
    options = TaskOptions(path=str(path), few_shot=2, system_prompt="s")
    seen = []
    task = load_task("gsm8k", seed=0, options=options)
    task.leaving_out(lambda problem: not seen.append(problem))
    for problem in seen:
        assert len(problem.messages) == 6
    asked = {problem.id: problem for problem in seen}
    assert all(asked[p.id] == p for p in [task.train_problem(0), *task.eval_problems(9)])
    assert task.left_out().startswith("0 of ")


@pytest.mark.parametrize("spec", ["records:PATH", "arithmetic"])
def test_nothing_left_to_train_on_is_said(path, spec):
    with pytest.raises(TaskError, match=r"none of .* --max-prompt-length"):
        load_task(spec.replace("PATH", str(path)), seed=0).leaving_out(
            lambda problem: False
        ).train_problem(0)


def test_nothing_held_out_is_said(tmp_path):
    file = tmp_path / "same.jsonl"
    file.write_text('{"prompt": "q", "answer": "1"}\n{"prompt": "q", "answer": "2"}\n')
    with pytest.raises(TaskError, match=r"same\.jsonl holds out no problem.*task\.eval_path"):
        held_out(load_task(f"records:{file}", seed=0), 4)
    task = load_task("arithmetic", seed=0)
    assert held_out(task, 3) == task.eval_problems(3)
