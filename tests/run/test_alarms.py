"""Alarms: each by records in which one thing goes wrong, when it begins and only then."""

import copy

import pytest

from lowmem_grpo.run.alarms import WINDOW, Alarms

QUIET = {
    "sampler_kl": 0.002,
    "grad_norm": 1.0,
    "tokens_trained": 100,
    "adapter_change": 0.01,
    "frac_reward_zero_std": 0.3,
    "constant_rewards": [],
    "rollouts": 10,
    "reward_failures": {},
    "kl": 0.1,
    "entropy": 1.5,
    "completion_truncated_fraction": 0.1,
    "rewards": {"number": 0.4, "format": 0.2},
}


def records(*parts):
    """(how many steps, what differs in them), ... as records."""
    found = []
    for count, changes in parts:
        for _ in range(count):
            found.append({**copy.deepcopy(QUIET), "step": len(found) + 1, **changes})
    return found


def said(steps):
    """(name of the alarm, step at which it is said) for all, and the names in the last record."""
    alarms, told = Alarms(), []
    for record in steps:
        before = set(told_names(steps, record))
        new = alarms.step(record)
        names = set(record["alarms"]) - before
        assert len(new) == len(names)
        assert all(text.startswith(f"step {record['step']}: ") for text in new)
        told += [(name, record["step"]) for name in sorted(names)]
    return told, steps[-1]["alarms"]


def told_names(steps, record):
    previous = steps[record["step"] - 2] if record["step"] > 1 else {}
    return previous.get("alarms", [])


def test_a_run_that_goes_well_has_no_alarms():
    assert said(records((45, {}))) == ([], [])


@pytest.mark.parametrize(
    ("name", "wrong"),
    [("sampler_apart", {"sampler_kl": 0.06}), ("adapters_still", {"adapter_change": 0.0})],
)
def test_what_a_single_step_shows_is_said_at_once_and_when_it_comes_back(name, wrong):
    steps = records((2, {}), (3, wrong), (1, {}), (1, wrong))
    assert said(steps) == ([(name, 3), (name, 7)], [name])


@pytest.mark.parametrize(
    "nothing",
    [{"grad_norm": None}, {"grad_norm": 0.0}, {"tokens_trained": 0}, {"sampler_kl": None}],
)
def test_a_step_that_was_left_out_does_not_move_adapters(nothing):
    still = {"adapter_change": 0.0} if "sampler_kl" not in nothing else {}
    assert said(records((3, {**still, **nothing}))) == ([], [])


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("no_signal", {"frac_reward_zero_std": 0.95}),
        ("constant_reward", {"constant_rewards": ["number"]}),
        ("reward_failing", {"reward_failures": {"mine": {"timeout": 1}}}),
        ("kl_runaway", {"kl": 1.05}),
    ],
)
def test_what_ten_steps_show(name, wrong):
    assert said(records((WINDOW - 1, wrong), (1, {}))) == ([], [])
    assert said(records((WINDOW, wrong))) == ([(name, WINDOW)], [name])
    told, now = said(records((5, {}), (WINDOW, wrong), (WINDOW, {})))
    assert [each for each, _ in told] == [name]
    assert now == []


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("entropy_collapse", {"entropy": 0.1}),
        ("length_runaway", {"completion_truncated_fraction": 0.6}),
        ("reward_hacking", {"rewards": {"number": 0.41, "format": 0.5}}),
    ],
)
def test_what_the_first_ten_steps_are_compared_with(name, wrong):
    told, now = said(records((WINDOW, {}), (WINDOW, wrong)))
    assert told == [(name, 2 * WINDOW)]
    assert now == [name]
    assert said(records((30, wrong))) == ([], [])  # as it always was


@pytest.mark.parametrize(
    "rewards",
    [
        {"number": 0.6, "format": 0.9},  # both went up
        {"number": 0.4, "format": 0.3},  # hardly
        {"number": 0.1, "format": 0.2},  # only one, and down
    ],
)
def test_a_format_that_rises_with_what_is_right_is_no_hacking(rewards):
    assert said(records((WINDOW, {}), (20, {"rewards": rewards}))) == ([], [])


def test_a_reward_that_is_constant_in_each_step_and_differs_between_them_is_no_constant():
    steps = records((20, {"constant_rewards": ["number", "format"]}))
    for place, record in enumerate(steps):
        record["rewards"] = {"number": float(place % 2), "format": 1.0}
    assert said(steps) == ([], [])


def test_penalties_of_a_second_name_and_a_reward_without_room():
    before, after = {"task": 0.96, "overlong_2": -0.5}, {"task": 0.96, "overlong_2": 0.0}
    assert said(records((WINDOW, {"rewards": before}), (20, {"rewards": after}))) == ([], [])
    before, after = {"task": 0.1, "overlong_2": -0.5}, {"task": 0.1, "overlong_2": 0.0}
    told, _ = said(records((WINDOW, {"rewards": before}), (20, {"rewards": after})))
    assert [name for name, _ in told] == ["reward_hacking"]
    alone = [{"rewards": {"format": value}} for value in (0.1, 0.9)]
    assert said(records((WINDOW, alone[0]), (20, alone[1]))) == ([], [])


def test_without_a_reference_or_entropy_nothing_is_said_of_them():
    assert said(records((30, {"kl": None, "entropy": None}))) == ([], [])


def test_a_run_that_goes_on_says_what_it_would_have_said():
    steps = records((WINDOW, {}), (15, {"entropy": 0.1, "kl": 2.0}))
    whole = Alarms()
    expected = [whole.step(record) for record in copy.deepcopy(steps)]
    part = Alarms(copy.deepcopy(steps[:17]))
    assert [part.step(record) for record in copy.deepcopy(steps[17:])] == expected[17:]
