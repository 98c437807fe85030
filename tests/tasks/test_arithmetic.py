"""The embedded task: right answers, a split that nothing leaks through, random access."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lowmem_grpo.errors import TaskError
from lowmem_grpo.tasks import TaskOptions, load_task

SPECS = ["arithmetic", "arithmetic:digits=1,ops=+-*", "arithmetic:digits=2,ops=-,terms=4"]


@given(
    st.integers(1, 6), st.sampled_from(["+", "-", "*", "+-", "*+", "+-*"]), st.integers(2, 8),
    st.integers(0, 10**9), st.integers(-5, 5),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_the_answer_is_what_python_computes(digits, ops, terms, index, seed):
    task = load_task(f"arithmetic:digits={digits},ops={ops},terms={terms}", seed=seed)
    problem = task.train_problem(index)
    question = problem.messages[-1]["content"]
    expression = question.removesuffix(" = ? End with the result.")
    assert eval(expression) == int(problem.answer)
    operands = expression.split()[::2]
    assert len(operands) == terms
    assert all(len(n) == digits for n in operands)
    assert set(expression.split()[1::2]) <= set(ops)


@pytest.mark.parametrize("spec", SPECS)
def test_no_operands_are_on_both_sides_under_any_seed(spec):
    held = {
        tuple(sorted(p.fields["operands"])) for p in load_task(spec, seed=0).eval_problems(9999)
    }
    assert held
    for seed in range(3):
        task = load_task(spec, seed=seed)
        trained = {tuple(sorted(task.train_problem(i).fields["operands"])) for i in range(700)}
        assert not held & trained


def test_one_digit_sums_fill_both_sides():
    task = load_task("arithmetic:digits=1,ops=+", seed=0)
    held = [p.id for p in task.eval_problems(10_000)]
    trained = {task.train_problem(i).id for i in range(3000)}
    assert len(held) == len(set(held))
    assert 15 <= len(held) <= 30
    assert len(trained) + len(held) == 100


@pytest.mark.parametrize("spec", [*SPECS, "arithmetic:digits=6,ops=+-"])
def test_eval_problems_are_distinct_and_the_same_for_every_seed(spec):
    task = load_task(spec, seed=1)
    problems = task.eval_problems(20)
    assert problems == load_task(spec, seed=2).eval_problems(20)
    assert problems[:7] == task.eval_problems(7)
    assert len({p.id for p in problems}) == len(problems) == 20


def test_training_is_random_access_and_belongs_to_the_seed():
    first, again = (
        load_task("arithmetic:digits=3", seed=5),
        load_task("arithmetic:digits=3", seed=5),
    )
    forward = [first.train_problem(i) for i in range(50)]
    assert [again.train_problem(i) for i in reversed(range(50))] == forward[::-1]
    other = load_task("arithmetic:digits=3", seed=6)
    assert sum(other.train_problem(i) == p for i, p in enumerate(forward)) < 5


def test_strict_and_lenient():
    task = load_task("arithmetic", seed=0)
    problem = task.train_problem(0)
    right = problem.answer
    for text in (right, f" {right}.\n", f"1 + 1 = {right}", f"It is {right}."):
        assert task.is_correct_strict(problem, text)
        assert task.is_correct_lenient(problem, text)
    for text in (f"{right} is the answer", f"It is {right}!", f"${right}.0"):
        assert not task.is_correct_strict(problem, text)
        assert task.is_correct_lenient(problem, text)
    for text in ("", "no idea", f"{right} or 99"):
        assert not task.is_correct_strict(problem, text)
        assert not task.is_correct_lenient(problem, text)


def test_the_system_prompt_comes_first():
    task = load_task("arithmetic", seed=0, options=TaskOptions(system_prompt="Be brief."))
    for problem in (task.train_problem(0), task.eval_problems(1)[0]):
        assert [m["role"] for m in problem.messages] == ["system", "user"]
        assert problem.messages[0]["content"] == "Be brief."


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("aritmetic:digits=1", "did you mean 'arithmetic'"),
        ("arithmetic:digit=1", "did you mean 'digits'"),
        ("arithmetic:digits=0", "from 1 to 6"),
        ("arithmetic:digits=\u00b2", "from 1 to 6"),
        ("arithmetic:digits=two", "digits=two"),
        ("arithmetic:digits", "digits=VALUE"),
        ("arithmetic:digits=1,digits=2", "twice"),
        ("arithmetic:ops=/", "ops=/"),
        ("arithmetic:ops=++", "ops=++"),
        ("arithmetic:terms=1", "from 2 to 8"),
        ("", "the tasks are"),
    ],
)
def test_wrong_specifications_name_the_value(spec, says):
    with pytest.raises(TaskError, match=r".") as caught:
        load_task(spec, seed=0)
    assert says in str(caught.value)
    assert caught.value.exit_code == 2
