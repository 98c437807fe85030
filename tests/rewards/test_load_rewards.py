"""`load_rewards`: specifications, weights, names, and users' files that are wrong in every way."""

from __future__ import annotations

import json
import textwrap
from math import cos, pi

import pytest

from lowmem_grpo.errors import ConfigError
from lowmem_grpo.rewards import load_rewards, score
from lowmem_grpo.rewards import math as math_module
from lowmem_grpo.tasks import load_task


@pytest.fixture(scope="module")
def task():
    return load_task("arithmetic", seed=0)


@pytest.fixture
def rewards_file(tmp_path):
    def write(source, name="mine.py"):
        path = tmp_path / name
        path.write_text(textwrap.dedent(source))
        return path

    return write


def scores_of(specs, task, texts, weights=None):
    problems = [task.train_problem(i) for i in range(len(texts))]
    ids = [list(range(len(text))) for text in texts]  # a token a character
    return score(load_rewards(specs, weights, task), texts, problems, ids)


def test_the_tasks_own_rewards_are_used_where_none_is_named(task):
    assert [(r.name, r.weight) for r in load_rewards([], None, task)] == [("number", 1.0)]


def test_several_rewards_with_weights(task):
    answers = [task.train_problem(i).answer for i in range(3)]
    texts = [answers[0], f"{answers[1]} is the answer", "no"]
    scores = scores_of(["number", r"format:-?\d+", "task"], task, texts, [1.0, 0.5, -2])
    assert scores.by_name == {"number": [1, 1, 0], "format": [1, 0, 0], "task": [1, 0, 0]}
    assert scores.total == [-0.5, 1.0, 0.0]


def test_format_matches_the_whole_completion(task):
    texts = ["<a>x\ny</a>", " <a></a>\n", "say <a></a>", "<a></a> ok"]
    assert scores_of(["format:<a>.*</a>"], task, texts).total == [1.0, 1.0, 0.0, 0.0]


def test_lengths_and_repetitions_are_penalised(task):
    texts = ["a b a b", "abc", "", "A a a a a"]
    scores = scores_of(["overlong:max=8,cache=4", "repetition:ngram=2"], task, texts)
    assert scores.by_name == {
        "overlong": [-0.75, 0.0, 0.0, -1.0],
        "repetition": [pytest.approx(-1 / 3), 0.0, 0.0, -0.75],
    }


def test_the_cosine_favours_short_answers_and_long_mistakes(task):
    right = [task.train_problem(i).answer for i in range(5)]
    texts = [f"{' ' * 4}{right[0]}"[-4:], right[1], "no", "nono" * 2, "x" * 9]
    found = scores_of(["cosine:max=8"], task, texts).total

    def curve(first, last, length):
        return last + (first - last) * (1 + cos(pi * length / 8)) / 2

    lengths = [len(text) for text in texts]
    expected = [curve(1.0, 0.5, n) for n in lengths[:2]]
    expected += [curve(-1.0, -0.5, n) for n in lengths[2:4]] + [-1.0]
    assert found == pytest.approx(expected)
    assert found[1] > found[0] > found[3] > found[2]
    assert scores_of(["cosine:max=8,over=-3"], task, texts).total[4] == -3.0


def test_rewards_of_one_kind_get_names_of_their_own(task, rewards_file):
    path = rewards_file("def format(completions, **fields): return [2.0] * len(completions)")
    rewards = load_rewards(["format:a:b", "format:c", f"{path}:format"], None, task)
    assert [r.name for r in rewards] == ["format", "format_2", "format_3"]
    assert score(rewards, ["a:b"], [task.train_problem(0)], [[1]]).total == [3.0]


@pytest.mark.parametrize(
    ("specs", "weights", "says"),
    [
        (["numbr"], None, "did you mean 'number'"),
        (["maths"], None, "did you mean 'math'"),
        (["formt:x"], None, "did you mean 'format'"),
        (["mine.txt:f"], None, "FILE.py:function"),
        (["format"], None, "format:REGEX"),
        (["format:(a"], None, "position 0"),
        (["format:ab**"], None, "position 3"),
        (["mine.py"], None, "mine.py:NAME"),
        (["gone.py:f"], None, "gone.py: there is no such file"),
        (["chioce"], None, "did you mean 'choice'"),
        (["overlong"], None, "write overlong:max=NUMBER,cache=NUMBER"),
        (["overlong:max=9"], None, "write overlong:max=NUMBER,cache=NUMBER"),
        (["overlong:max=9,cache=-1"], None, "write overlong:max=NUMBER,cache=NUMBER"),
        (["overlong:max=9,cache=10"], None, "cache must be from 1 to max"),
        (["cosine"], None, "write cosine:max=NUMBER"),
        (["cosine:max=9,over=x"], None, "could not convert"),
        (["cosine:max=9,over=inf"], None, "finite"),
        (["cosine:max=0"], None, "1 or more tokens"),
        (["code"], None, "needs a column 'tests'"),
        (["json:gone.json"], None, "cannot read it"),
        (["judge:gone.toml"], None, "cannot read it"),
        (["judge"], None, "write judge:FILE.toml"),
        (["number:x"], None, "unknown reward 'number:x'"),
        (["repetition:ngram=0"], None, "ngram must be 1 or more"),
        (["repetition:n=2"], None, "write repetition:ngram=NUMBER"),
        (["number", "number"], None, "twice"),
        (["number", "task"], [1.0], "1 reward weights for 2 rewards"),
        (["number"], [], "0 reward weights"),
        (["number"], [float("nan")], "nan"),
    ],
)
def test_wrong_specifications_name_the_value(task, specs, weights, says):
    with pytest.raises(ConfigError) as caught:
        load_rewards(specs, weights, task)
    assert says in str(caught.value)
    assert caught.value.exit_code == 2


def test_number_refuses_answers_that_are_no_numbers_before_training(tmp_path):
    path = tmp_path / "r.jsonl"
    rows = [json.dumps({"prompt": str(i), "answer": str(i)}) for i in range(50)]
    path.write_text("\n".join([*rows, '{"prompt": "x", "answer": "Paris"}']))
    with pytest.raises(ConfigError, match=r"line 51.*'Paris'"):
        load_rewards(["number"], None, load_task(f"records:{path}", seed=0))


def test_choice_refuses_answers_that_are_no_letters_before_training(tmp_path):
    path = tmp_path / "r.jsonl"
    path.write_text('{"prompt": "x", "answer": "(B)"}\n{"prompt": "y", "answer": "Paris"}\n')
    with pytest.raises(ConfigError, match=r"letters from A to J.*line 2.*'Paris'"):
        load_rewards(["choice"], None, load_task(f"records:{path}", seed=0))


def test_a_users_function_gets_what_it_names(task, rewards_file):
    path = rewards_file(
        """
        import helper_beside_it
        def named(completions, answer, expression, *, missing=7):
            return [missing + (len(answer) == len(expression) == 1)] * len(completions)
        def everything(**fields):
            return [len(set(fields) & {"completions", "answer", "prompts", "operands"})] * 2
        class Scorer:
            def __call__(self, completions, **kwargs):
                return [helper_beside_it.VALUE] * len(completions)
        scorer = Scorer()
        """
    )
    rewards_file("VALUE = 0.25", "helper_beside_it.py")
    names = ["named", "everything", "scorer"]
    scores = scores_of([f"{path}:{name}" for name in names], task, ["a", "b"])
    assert scores.by_name == {"named": [7, 7], "everything": [4, 4], "scorer": [0.25, 0.25]}


def test_functions_of_one_file_share_its_state_and_files_of_one_name_do_not(task, tmp_path):
    source = """if True:
        import sys
        calls = []
        def f(completions, **_): calls.append(1); return [len(calls)]
        def g(completions): return [len(sys.modules[__name__].calls)]
    """
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "random.py").write_text(source)
    a, b = tmp_path / "a" / "random.py", tmp_path / "b" / "random.py"
    scores = scores_of([f"{a}:f", f"{a}:g", f"{b}:g"], task, ["x"])
    assert list(scores.by_name.values()) == [[1.0], [1.0], [0.0]]
    import random

    assert random.__file__ not in (str(a), str(b))


FILE = """
from math import sqrt
score_limit = 3
def lengths(completions, **fields): return [0.0] * len(completions)
def _private(completions): return []
def wants(completions, solution): return []
def no_texts(texts, answer): return []
def by_place(completions, /, **fields): return []
"""


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("length", ["no function 'length'", "did you mean 'lengths'", "lengths, wants"]),
        ("", ["no function ''", "lengths"]),
        ("score_limit", ["not a function but 3"]),
        ("wants", ["needs 'solution'", "answer", "prompts", "operands"]),
        ("no_texts", ["does not take 'completions'"]),
        ("sqrt", ["completions"]),
        ("by_place", ["'completions'", "/"]),
    ],
)
def test_functions_that_cannot_be_used(task, rewards_file, name, says):
    path = rewards_file(FILE)
    with pytest.raises(ConfigError) as caught:
        load_rewards([f"{path}:{name}"], None, task)
    for part in says:
        assert part in str(caught.value), str(caught.value)
    assert "_private" not in str(caught.value)


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("def f(:", "SyntaxError"),
        ("import there_is_no_such_package", "there_is_no_such_package"),
        ("1 / 0", "ZeroDivisionError"),
        ("raise SystemExit(0)", "SystemExit"),
        ("x = '\0'", "null bytes"),
    ],
)
def test_files_that_do_not_load(task, rewards_file, source, says):
    with pytest.raises(ConfigError, match="cannot be loaded") as caught:
        load_rewards([f"{rewards_file(source)}:f"], None, task)
    assert says in str(caught.value)


def test_a_directory_is_not_a_reward_file(task, tmp_path):
    (tmp_path / "dir.py").mkdir()
    with pytest.raises(ConfigError, match="no such file"):
        load_rewards([f"{tmp_path}/dir.py:f"], None, task)


def test_math_without_its_package_names_the_command(task, monkeypatch):
    monkeypatch.setattr(math_module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError) as caught:
        load_rewards(["math"], None, task)
    assert 'pip install "lowmem-grpo[tasks]"' in str(caught.value)


def test_rewards_that_compare_answers_explain_themselves(task):
    problem = task.train_problem(0)
    for spec in ("number", "task", "cosine:max=9"):
        (reward,) = load_rewards([spec], None, task)
        assert problem.answer in reward.function.explain("It is -1", problem), spec
    (reward,) = load_rewards(["format:x"], None, task)
    assert not hasattr(reward.function, "explain")


def test_the_cosine_takes_the_reading_of_the_tasks_reward(task):
    right = task.train_problem(0).answer
    texts = [f"\\boxed{{{right}}} in 9 steps", f"so {right}, and not -1: {right}"]
    problems = [task.train_problem(0)] * 2
    (reward,) = load_rewards(["cosine:max=999,right1=1"], None, task)
    assert score([reward], texts, problems, [[1], [1]]).total == [1.0, 1.0]
