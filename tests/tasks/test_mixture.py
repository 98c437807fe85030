"""Several tasks as one: whose turn it is, in which order, and who judges."""

from __future__ import annotations

import importlib.util
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lowmem_grpo.errors import TaskError
from lowmem_grpo.rewards import load_rewards, score
from lowmem_grpo.tasks import TaskOptions, load_task
from lowmem_grpo.tasks.mixture import FIELD, Mixture, split_mixture

SUMS, PRODUCTS, COUNT = "arithmetic:digits=2,ops=+", "arithmetic:ops=*", "countdown:numbers=3"
SPEC = f"2*{SUMS} + {PRODUCTS} + 0.5*{COUNT}"


def own(problems, name):
    """The problems of one task, as that task gives them: without its number and its name."""
    return [(p.messages, p.answer) for p in problems if p.fields[FIELD] == name]


@given(st.lists(st.integers(1, 30), min_size=1, max_size=5), st.integers(0, 10**12))
def test_turns_are_shared_by_weight_and_every_task_is_read_in_its_order(weights, cycle):
    tasks = [load_task(f"arithmetic:digits={i + 1}", seed=0) for i in range(len(weights))]
    mixture = Mixture(list(zip(weights, tasks, strict=True)))
    total, taken = sum(weights), Counter()
    for turn in range(total):
        part, position = mixture._turn(cycle * total + turn)
        assert position == cycle * weights[part] + taken[part]
        taken[part] += 1
        for each, weight in enumerate(weights):
            assert abs(taken[each] - (turn + 1) * weight / total) < len(weights)
    assert [taken[part] for part in range(len(weights))] == weights


def test_training_problems_are_those_of_the_tasks():
    mixture = load_task(SPEC, seed=3)
    problems = [mixture.train_problem(i) for i in range(35)]
    for name, count in ((SUMS, 20), (PRODUCTS, 10), (COUNT, 5)):
        alone = load_task(name, seed=3)
        given_alone = [alone.train_problem(i) for i in range(count)]
        assert own(problems, name) == [(p.messages, p.answer) for p in given_alone]
    again = load_task(SPEC, seed=3)
    assert [again.train_problem(i) for i in reversed(range(35))] == problems[::-1]
    assert mixture.name == f"4*{SUMS} + 2*{PRODUCTS} + {COUNT}"


def test_held_out_problems_are_shared_out_and_go_on_where_one_task_ends():
    few, many = "arithmetic:digits=1,ops=+", "arithmetic:digits=1,ops=+-"
    mixture, other = (load_task(f"{few} + 2*{COUNT} + {many}", seed=seed) for seed in (0, 1))
    held = mixture.eval_problems(120)
    assert held == other.eval_problems(120)
    assert held[:13] == mixture.eval_problems(13)
    assert len({str(p.messages) for p in held}) == len(held) == 120
    first = Counter(p.fields[FIELD] for p in held[:20])
    assert 8 <= first[COUNT] <= 12
    assert min(first.values()) >= 3
    both = load_task(f"{few} + {many}", seed=0)  # the sums of one are among those of the other
    assert len(both.eval_problems(10_000)) == len(load_task(many, seed=0).eval_problems(10_000))
    trained = {str(both.train_problem(i).messages) for i in range(300)}
    assert not trained & {str(p.messages) for p in both.eval_problems(10_000)}


def test_every_task_judges_its_own_problems():
    mixture = load_task(f"{SUMS} + {COUNT}", seed=0)
    (reward,) = load_rewards([], None, mixture)
    problems = [mixture.train_problem(i) for i in range(6)]
    right = [mixture.reply(p) for p in problems]
    assert sum(text.startswith("<answer>") for text in right) == 3
    assert score([reward], right, problems, [[]] * 6).total == [1.0] * 6
    for problem, text in zip(problems, right, strict=True):
        assert mixture.is_correct_strict(problem, text)
        assert not mixture.is_correct_strict(problem, problem.answer + " or so")
        assert mixture.is_correct_lenient(problem, problem.answer + "; done")
    assert {where for where, _ in mixture.known_answers()} == {
        task.train_problem(0).id for task in (load_task(SUMS, seed=0), load_task(COUNT, seed=0))
    }


@pytest.mark.skipif(
    importlib.util.find_spec("reasoning_gym") is None, reason="reasoning-gym is not installed"
)
def test_generators_of_one_package_mix_with_examples_of_their_own():
    specs = ["reasoning_gym:chain_sum:max_terms=3", "reasoning_gym:leg_counting"]
    mixture = load_task(" + ".join(specs), seed=0, options=TaskOptions(few_shot=1))
    problems = [mixture.train_problem(i) for i in range(4)]
    assert [p.fields[FIELD] for p in problems] == specs * 2
    assert len({p.messages[0]["content"] for p in problems[2:]}) == 2
    for problem in problems:
        assert len(problem.messages) == 3
        assert mixture.score(problem, f"<answer>{problem.answer}</answer>") == 1.0
        assert mixture.score(problem, "<answer>-1</answer>") < 1.0


@pytest.mark.parametrize(
    ("spec", "parts"),
    [
        ("arithmetic", [(1, "arithmetic")]),
        ("arithmetic:ops=+ + arithmetic:ops=*", [(1, "arithmetic:ops=+"), (1, "arithmetic:ops=*")]),
        ("30 * a + 20*b:c=d*e", [(3, "a"), (2, "b:c=d*e")]),
        ("0.7*a + .3*b", [(7, "a"), (3, "b")]),
        ("records:2*a+b.jsonl", [(1, "records:2*a+b.jsonl")]),
    ],
)
def test_specifications_are_read_as_they_look(spec, parts):
    assert split_mixture(spec) == parts


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("arithmetic + 2*arithmetic", "'arithmetic' is given twice"),
        ("0*arithmetic + countdown", "weight 0 of a task"),
        ("1.2.3*arithmetic + countdown", "weight 1.2.3 of a task"),
        ("1*arithmetic + 99999*countdown", "add up to 10000"),
        ("arithmetic + countdwn", "did you mean 'countdown'"),
        ("arithmetic + ", "unknown task"),
    ],
)
def test_wrong_mixtures_name_the_value(spec, says):
    with pytest.raises(TaskError) as caught:
        load_task(spec, seed=0)
    assert says in str(caught.value)
