"""The generated task countdown: every problem can be solved, sides are apart, and what scores."""

from __future__ import annotations

import pytest

from lowmem_grpo.errors import TaskError
from lowmem_grpo.tasks import TaskOptions, load_task

SPECS = ["countdown", "countdown:numbers=2,max=9,target=10", "countdown:numbers=3-6,max=30"]


@pytest.mark.parametrize("spec", SPECS)
def test_every_problem_has_a_solution_within_its_options(spec):
    task = load_task(spec, seed=4)
    low, high, most, target = {"": (3, 4, 99, 100), "2": (2, 2, 9, 10), "3": (3, 6, 30, 100)}[
        spec.partition("numbers=")[2][:1]
    ]
    lengths = set()
    for problem in [task.train_problem(i) for i in range(150)] + task.eval_problems(15):
        numbers = problem.fields["numbers"]
        lengths.add(len(numbers))
        assert 1 <= min(numbers) <= max(numbers) <= most
        assert 1 <= problem.fields["target"] <= target
        assert eval(problem.answer) == problem.fields["target"]
        assert task.is_correct_strict(problem, task.reply(problem))
        assert f"the numbers {', '.join(map(str, numbers))}." in problem.messages[-1]["content"]
        assert f"Make {problem.fields['target']} " in problem.messages[-1]["content"]
    assert lengths == set(range(low, high + 1))


def test_no_set_of_numbers_is_on_both_sides_under_any_seed():
    spec = "countdown:numbers=3,max=9"
    held = {tuple(sorted(p.fields["numbers"])) for p in load_task(spec, seed=0).eval_problems(300)}
    assert len(held) > 15
    for seed in range(3):
        task = load_task(spec, seed=seed)
        assert not held & {
            tuple(sorted(task.train_problem(i).fields["numbers"])) for i in range(300)
        }


def test_evaluation_is_the_same_for_every_seed_and_ends_where_problems_end():
    tasks = [load_task("countdown:numbers=2,max=9,target=10", seed=seed) for seed in (0, 1)]
    held = tasks[0].eval_problems(10_000)
    assert tasks[1].eval_problems(7) == held[:7]
    keys = {(*sorted(p.fields["numbers"]), p.fields["target"]) for p in held}
    assert 10 < len(keys) == len(held) < 40


def test_training_is_random_access_and_belongs_to_the_seed():
    first, again, other = (load_task("countdown", seed=seed) for seed in (5, 5, 6))
    forward = [first.train_problem(i) for i in range(30)]
    assert [again.train_problem(i) for i in reversed(range(30))] == forward[::-1]
    assert sum(other.train_problem(i) == p for i, p in enumerate(forward)) < 3
    assert len({p.id for p in forward}) > 25


def test_what_scores():
    task = load_task("countdown", seed=0, options=TaskOptions(system_prompt="Be brief."))
    problem = task.train_problem(0)
    assert problem.messages[0]["content"] == "Be brief."
    right, target = problem.answer, problem.fields["target"]
    first, *others = problem.fields["numbers"]
    wrong = " + ".join(map(str, [first, *others]))
    assert eval(wrong) != target
    scores = {
        f"<answer>{right}</answer>": 1.0,
        f"<answer>0</answer> no, <answer> {right} = {target} </answer> yes": 1.0,
        f"<answer>{wrong}</answer>": 0.1,
        f"<answer>{wrong} = {target}</answer>": 0.1,
        f"<answer>{right}</answer> no, <answer>{wrong}</answer>": 0.1,
        f"<answer>{right} = {target + 1}</answer>": 0.0,
        f"<answer>{right} = {target} = {target}</answer>": 0.0,
        f"<answer>{target}</answer>": 0.0,
        f"<answer>{right} + {first} - {first}</answer>": 0.0,
        f"<answer>{' + '.join(map(str, others))}</answer>": 0.0,
        f"<answer>so {right}</answer>": 0.0,
        f"<answer>{right}": 0.0,
        right: 0.0,
        "": 0.0,
    }
    assert {text: task.score(problem, text) for text in scores} == scores
    for text, score in scores.items():
        assert task.is_correct_strict(problem, text) == (score == 1.0)
    for text in (f"I get {right} = {target}!", f"{wrong}\nso: {right}", f"<answer>so {right}<"):
        assert task.is_correct_lenient(problem, text)
    for text in (wrong, f"{right}, no: {wrong}", str(target), ""):
        assert not task.is_correct_lenient(problem, text)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ("numbers=1", "from 2 to 6"),
        ("numbers=4-3", "numbers=4-3"),
        ("numbers=7", "numbers=7"),
        ("max=5", "max=5: use a whole number from 9 to 999"),
        ("max=900,target=20", "target=20: use a whole number from 90"),
        ("most=3", "no option 'most'"),
    ],
)
def test_wrong_options_name_the_value(options, says):
    with pytest.raises(TaskError) as caught:
        load_task(f"countdown:{options}", seed=0)
    assert says in str(caught.value)
