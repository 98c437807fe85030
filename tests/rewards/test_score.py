"""`score`: what functions receive, the weighted total, and functions that misbehave."""

from __future__ import annotations

import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lowmem_grpo.errors import RewardError
from lowmem_grpo.isolation.worker import Failure
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


def test_functions_receive_the_columns_of_all_problems():
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
        "only": ["here", None],
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


def test_what_there_is_none_of_adds_nothing_and_is_told_once(caplog):
    failed = Failure("timeout", "it took more than 1 s")
    mine = Reward("mine", 2.0, lambda **_: [failed, 1.0])
    other = Reward("other", 1.0, lambda **_: [0.5, None])
    for _ in range(2):
        scores = score([mine, other], TEXTS, PROBLEMS, IDS)
    assert scores.by_name == {"mine": [None, 1.0], "other": [0.5, None]}
    assert scores.total == [0.5, 2.0]
    assert scores.failures == {"mine": {0: failed}}
    assert scores.failed == {0}
    (record,) = caplog.records
    for part in ("'mine'", "1 of 2", "1 timeout", "it took more than 1 s", "p/0", "'two'"):
        assert part in record.getMessage()


def test_a_failure_stops_where_it_should():
    with pytest.raises(
        RewardError, match=r"'mine' failed for 2 of 2 completions \(2 raised\)"
    ) as e:
        score(
            [Reward("mine", 1.0, lambda **_: [Failure("raised", "KeyError: 'x'")] * 2)],
            *(TEXTS, PROBLEMS, IDS),
            stop_on_failure=True,
        )
    assert e.value.exit_code == 1


def test_rewards_run_at_the_same_time():
    barrier = threading.Barrier(2, timeout=10)

    def meets(**_):
        barrier.wait()
        return [0.0, 0.0]

    assert score([Reward(name, 1.0, meets) for name in "ab"], TEXTS, PROBLEMS, IDS).total


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
        score(
            [Reward("r", 1.0, lambda **_: [Failure("raised", "x"), 1.0])],
            *(["x" * 100_000, "4"], PROBLEMS, IDS),
            stop_on_failure=True,
        )
    assert len(str(caught.value)) < 400


def test_nothing_to_score_and_lists_that_do_not_fit():
    assert score([Reward("r", 1.0, lambda **_: [])], [], [], []).total == []
    with pytest.raises(ValueError, match="1 completions for 2 problems"):
        run(lambda **_: [], ["one"])


def test_values_for_steps_are_checked_and_added_up_step_by_step():
    texts = ["a\n\nb\n\n", "c"]

    def spy(completions, steps, **_):
        assert steps == [["a\n\n", "b\n\n"], ["c"]]
        return [[1.0, 0.0], [0.5]]

    two = Reward("two", 2.0, lambda **_: [[0.0, 0.25], [1.0, 1.0]])
    rewards = [Reward("spy", 1.0, spy), two, Reward("whole", 3.0, lambda **_: [1.0, 0.0])]
    scores = score(rewards, texts, PROBLEMS, IDS, separator="\n\n")
    assert scores.by_name == {"spy": [0.5, 0.5], "two": [0.125, None], "whole": [1.0, 0.0]}
    assert scores.steps == [[1.0, 0.5], [0.5]]
    assert scores.outcomes == [3.0, 0.0]
    assert scores.total == [0.5 + 0.25 + 3.0, 0.5]
    assert "2 values for 1 steps" in scores.failures["two"][1].message
    without = score([Reward("spy", 1.0, lambda **_: [[1.0], 2.0])], texts, PROBLEMS, IDS)
    assert without.by_name == {"spy": [None, 2.0]}
    assert "rewards.step_separator is not set" in without.failures["spy"][0].message


def test_a_value_whose_square_is_no_number_is_none():
    """Alone it is finite, and neither a total nor an advantage of it would be."""
    found = score([Reward("mine", 100.0, lambda **_: [1e308, 1.0])], TEXTS, PROBLEMS, IDS)
    assert found.by_name["mine"] == [None, 1.0]
    assert found.failures["mine"][0].reason == "invalid"
    assert found.total == [0.0, 100.0]
