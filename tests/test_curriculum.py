"""Which problems are taken, given what is known of them."""

import pytest

from lowmem_grpo.curriculum import Rates, chosen
from lowmem_grpo.rollout.types import Group
from lowmem_grpo.tasks import Problem


def problem(name, level=None):
    return Problem(name, (), "1", {"level": level})


def group(name, rewards, level=None):
    group = Group(problem(name, level), [1], [], rewards=rewards)
    group.dropped = [False] * len(rewards)
    return group


def test_problems_near_a_half_come_first_and_new_ones_count_as_that():
    rates = Rates()
    rates.learn(
        [group("easy", [1, 1, 1]), group("half", [0, 1, 0]), group("hard", [0, 0, 0])], None
    )
    problems = [problem(name) for name in ("easy", "hard", "half", "new", "newer")]
    assert chosen(problems, 3, rates, None) == [2, 3, 4]
    assert chosen(problems, 1, rates, None) == [3]
    assert chosen(problems, 5, rates, None) == [0, 1, 2, 3, 4]


def test_a_new_problem_is_rated_as_its_level():
    rates = Rates()
    rates.learn([group("a", [1, 1], "low"), group("b", [0, 1], "middle")], "level")
    problems = [problem("c", "low"), problem("d", "middle"), problem("a", "middle")]
    assert chosen(problems, 1, rates, "level") == [1]
    # Its own rate counts more than its level's.
    assert rates.of(problems[2], "level") == rates.of(problems[0], "level")


def test_rates_are_shares_of_the_range_and_the_latest_count_most():
    rates = Rates()
    rates.learn([group("x", [-2.0, -2.0])], None)
    assert rates.of(problem("x"), None) == 0.5  # nothing to compare it with
    rates.learn([group("y", [2.0, 0.0])], None)
    assert rates.of(problem("y"), None) == pytest.approx((0.75 + 0.5) / 2)
    for _ in range(30):
        rates.learn([group("y", [-2.0, -2.0])], None)
    assert rates.of(problem("y"), None) < 0.1
    for _ in range(30):
        rates.learn([group("y", [2.0, 2.0])], None)
    assert rates.of(problem("y"), None) > 0.9
