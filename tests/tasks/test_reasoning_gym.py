"""Tasks of the package reasoning-gym, through the child process that runs it."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest

from lowmem_grpo.errors import TaskError
from lowmem_grpo.tasks import TaskOptions, load_task
from lowmem_grpo.tasks import reasoning_gym as module

# Asked for, not imported as pytest.importorskip would: the package takes two seconds to import, and
# the task does it in a child.
needs_package = pytest.mark.skipif(
    importlib.util.find_spec("reasoning_gym") is None, reason="reasoning-gym is not installed"
)


@pytest.fixture(scope="module")
def sums():
    return load_task("reasoning_gym:chain_sum:max_terms=3,max_digits=2", seed=3)


@pytest.fixture(scope="module")
def few():
    """A generator with few different questions."""
    return load_task("reasoning_gym:chain_sum:min_terms=2,max_terms=2,max_digits=1", seed=0)


def question(problem):
    return problem.messages[-1]["content"]


@needs_package
def test_sides_share_no_question_and_eval_repeats_none(sums):
    held = [question(p) for p in sums.eval_problems(60)]
    trained = {question(sums.train_problem(i)) for i in [*range(300), 10**9]}
    assert len(held) == len(set(held)) == 60
    assert not trained & set(held)
    assert [question(p) for p in sums.eval_problems(10)] == held[:10]


@needs_package
def test_few_questions_make_a_short_list_and_no_leak(few):
    held = few.eval_problems(10_000)
    assert 10 < len(held) < 200
    assert len({question(p) for p in held}) == len(held)
    assert not {question(p) for p in held} & {question(few.train_problem(i)) for i in range(300)}


@needs_package
def test_the_packages_scorer_is_used(sums):
    problem = sums.train_problem(0)
    right = problem.answer
    assert sums.default_rewards == ("task",)
    assert sums.score(problem, f"\n {right} ") == 1.0
    assert sums.score(problem, f"I add. <answer>9</answer> no: <answer> {right}\n</answer>.") == 1.0
    assert sums.score(problem, "x") == 0.0
    assert sums.is_correct_strict(problem, right)
    assert sums.is_correct_lenient(problem, right)
    assert not sums.is_correct_strict(problem, f"The sum is {right}.")
    assert sums.is_correct_lenient(problem, f"The sum is {right}.")
    assert problem.fields["metadata"]["source_dataset"] == "chain_sum"


@needs_package
def test_training_is_the_same_in_another_process_with_another_hash_seed():
    # ransom_note walks through sets: in the trainer's process a resumed run would see other ones.
    script = (
        "from lowmem_grpo.tasks import load_task; "
        "t = load_task('reasoning_gym:ransom_note', seed=1); "
        "print([t.train_problem(i) for i in (5, 0, 700)], t.eval_problems(2))"
    )
    outputs = set()
    for hash_seed in ("1", "2"):
        environment = os.environ | {
            "PYTHONHASHSEED": hash_seed,
            "PYTHONPATH": os.pathsep.join(sys.path),
        }
        run = [sys.executable, "-c", script]
        outputs.add(subprocess.run(run, env=environment, capture_output=True, check=True).stdout)
    assert len(outputs) == 1


@needs_package
@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("reasoning_gym:chain_summ", "did you mean 'chain_sum'"),
        ("reasoning_gym:chain_sum:min_term=2", "did you mean 'min_terms'"),
        ("reasoning_gym:chain_sum:min_terms=9,max_terms=2", "max_terms must be >= min_terms"),
        ("reasoning_gym:", "reasoning_gym:NAME"),
    ],
)
def test_wrong_specifications_name_the_value(spec, says):
    with pytest.raises(TaskError) as caught:
        load_task(spec, seed=0)
    assert says in str(caught.value)


def test_a_missing_package_names_the_command(monkeypatch):
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(TaskError) as caught:
        load_task("reasoning_gym:chain_sum", seed=0, options=TaskOptions())
    assert 'pip install "lowmem-grpo[tasks]"' in str(caught.value)
