"""`score`: what functions receive, the weighted total, and functions that misbehave."""

from __future__ import annotations

from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lowmem_grpo.errors import RewardError
from lowmem_grpo.rewards import Reward, score
from lowmem_grpo.rewards.number import number_reward
from lowmem_grpo.tasks import Problem

PROBLEMS = [
    Problem("p/0", ({"role": "user", "content": "1+1?"},), "2", {"level": 1, "only": "here"}),
    Problem("p/1", ({"role": "user", "content": "2+2?"},), "4", {"level": 2, "answer": "old"}),
]
TEXTS = ["two", "4"]
IDS = [[7, 8, 0], [9]]


def run(function, texts=TEXTS, problems=PROBLEMS):
    return score([Reward("mine", 1.0, function)], texts, problems, IDS[: len(texts)])


def test_functions_receive_the_columns_that_all_problems_have():
    seen = {}

    def spy(completions, **fields):
        seen.update(fields, completions=completions)
        return [0.0, 0.0]

    run(spy)
    assert seen == {
        "completions": TEXTS,
        "answer": ["2", "4"],
        "prompts": [[{"role": "user", "content": q}] for q in ("1+1?", "2+2?")],
        "problems": PROBLEMS,
        "completion_ids": IDS,
        "level": [1, 2],
    }


def test_columns_cannot_take_the_place_of_our_own_fields():
    fields = {"completions": "x", "prompts": "y", "problems": "z", "completion_ids": "w"}
    problem = Problem("p", ({"role": "user", "content": "q"},), "2", fields)

    def spy(completions, prompts, problems, completion_ids, **_):
        return [
            completions == ["text"]
            and prompts[0][0]["content"] == "q"
            and problems == [problem]
            and completion_ids == IDS[:1]
        ]

    assert run(spy, ["text"], [problem]).total == [1.0]


def test_a_function_cannot_change_what_the_next_one_sees():
    def vandal(completions, answer, prompts, completion_ids, **_):
        completions.clear()
        completion_ids[0].clear()
        answer.reverse()
        prompts[0][0]["content"] = "gone"
        return [0.0, 0.0]

    def honest(completions, answer, prompts, completion_ids, **_):
        return [
            completions == TEXTS and answer == ["2", "4"] and completion_ids == IDS,
            prompts[0][0]["content"] == "1+1?",
        ]

    scores = score([Reward("v", 1, vandal), Reward("h", 1, honest)], TEXTS, PROBLEMS, IDS)
    assert scores.by_name["h"] == [1.0, 1.0]
    assert PROBLEMS[0].messages[0]["content"] == "1+1?"


@given(
    st.lists(
        st.tuples(st.floats(-10, 10), st.floats(-5, 5), st.floats(-5, 5)), min_size=1, max_size=4
    )
)
def test_the_total_is_the_weighted_sum(rows):
    rewards = [
        Reward(f"r{i}", weight, lambda completions, values=(a, b), **_: list(values))
        for i, (weight, a, b) in enumerate(rows)
    ]
    scores = score(rewards, TEXTS, PROBLEMS, IDS)
    for column in (0, 1):
        expected = sum(w * values[column] for w, *values in rows)
        assert scores.total[column] == pytest.approx(expected, abs=1e-9)
    assert scores.by_name == {f"r{i}": [a, b] for i, (_, a, b) in enumerate(rows)}


class Array:
    """Stands for a tensor or a numpy array."""

    def __init__(self, values):
        self.values = values

    def tolist(self):
        return self.values


class Scalar:
    def __init__(self, value):
        self.value = value

    def item(self):
        return self.value

    def __float__(self):
        return self.value


@pytest.mark.parametrize(
    "values", [(1, 0), [True, False], Array([1.0, 0.0]), [Scalar(1.0), Scalar(0.0)]]
)
def test_numbers_of_every_kind_are_taken_as_floats(values):
    total = run(lambda **_: values).total
    assert total == [1.0, 0.0]
    assert all(type(value) is float for value in total)


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (float("nan"), "nan"),
        (float("inf"), "inf"),
        (None, "None"),
        ("1.0", "'1.0'"),
        (1j, "1j"),
        (Decimal(1), "Decimal('1')"),
        ([1.0], "[1.0]"),
        (Scalar(float("nan")), "nan"),
    ],
)
def test_a_value_that_is_no_finite_number_names_its_rollout(value, shown):
    with pytest.raises(RewardError) as caught:
        run(lambda **_: [1.0, value])
    message = str(caught.value)
    assert "'mine'" in message
    assert shown in message
    assert "p/1" in message
    assert "'4'" in message
    assert caught.value.exit_code == 1


@pytest.mark.parametrize(
    ("returned", "says"),
    [
        ([1.0], "1 values for 2 completions"),
        ([1.0] * 3, "3 values for 2"),
        ([], "0 values"),
        (Array([[1.0, 2.0]]), "1 values"),
        (1.0, "float"),
        (Array(1.0), "not a list"),
        (None, "NoneType"),
        ("10", "str"),
        ({0: 1.0, 1: 0.0}, "dict"),
        ((x for x in (1.0, 2.0)), "generator"),
    ],
)
def test_anything_but_one_value_for_each_completion_is_refused(returned, says):
    with pytest.raises(RewardError) as caught:
        run(lambda **_: returned)
    assert says in str(caught.value)
    assert "'mine'" in str(caught.value)


@pytest.mark.parametrize("error", [ValueError("bad\nluck"), SystemExit(0), KeyError("x")])
def test_a_function_that_raises_is_named_with_its_line_and_chained(error):
    def breaks(**_):
        raise error

    with pytest.raises(RewardError) as caught:
        run(breaks)
    message = str(caught.value)
    for part in (
        "'mine'",
        type(error).__name__,
        "test_score.py, line",
        "2 completions",
        "p/0",
        "two",
    ):
        assert part in message
    assert caught.value.__cause__ is error


def test_number_says_which_answer_is_none():
    problem = Problem("p", (), "Paris", {})
    with pytest.raises(RewardError, match=r"^reward 'number': the answer 'Paris' is not a number$"):
        run(number_reward, ["4"], [problem])


def test_ctrl_c_is_not_swallowed():
    def interrupted(**_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(interrupted)


def test_long_completions_are_cut_in_messages():
    with pytest.raises(RewardError) as caught:
        run(lambda **_: [None, 1.0], ["x" * 100_000, "4"])
    assert len(str(caught.value)) < 400


def test_nothing_to_score_and_lists_that_do_not_fit():
    assert score([Reward("r", 1.0, lambda **_: [])], [], [], []).total == []
    with pytest.raises(ValueError, match="1 completions for 2 problems"):
        run(lambda **_: [], ["one"])
