"""The reward `math`: equality that text does not show, and completions made to hang it."""

from __future__ import annotations

import importlib.util
import threading

import pytest

from lowmem_grpo.rewards import math as module
from lowmem_grpo.tasks.base import Problem

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("math_verify") is None, reason="math-verify is not installed"
)


@pytest.fixture(scope="module")
def reward():
    return module.MathReward()


@pytest.mark.parametrize(
    ("completion", "answer", "value"),
    [
        (r"so it is $\boxed{\frac{1}{2}}$", "0.5", 1.0),
        ("The result is 1/2.", r"\frac12", 1.0),
        (r"$(x+1)^2$", "x^2+2x+1", 1.0),
        ("$x^2+1$", "1+x^2", 1.0),
        ("2", "1+x^2", 0.0),
        ("I get 1,042", "20*52 = 1040, and 2\n#### 1042", 1.0),
        (r"\boxed{41}", "42", 0.0),
        ("Paris.", "Paris", 1.0),
        (r"It is \boxed{Paris}", "Paris", 1.0),
        (r"It is \boxed{\text{Evelyn}}", r"So \boxed{\text{Evelyn}}", 1.0),
        ("London", "Paris", 0.0),
        ("", "42", 0.0),
        ("$\\frac{1}{$ \ud800 \x00", "42", 0.0),
        (r"$\frac{1}{0}$", "42", 0.0),
    ],
)
def test_equality(reward, completion, answer, value):
    assert reward([completion], [answer]) == [value]


def test_a_completion_that_never_ends_costs_its_score_and_no_more(reward, monkeypatch):
    monkeypatch.setattr(module, "LIMIT_S", 0.5)
    # In one operation on integers, which no signal interrupts.
    bomb = "$10^{10^{10}}$"
    failed, right = reward([bomb, "$5$"], ["5", "5"])
    assert (failed.reason, right) == ("timeout", 1.0)


def test_it_works_outside_the_main_thread(reward):
    # math-verify alone raises here: its time limit needs signals.
    results = []
    thread = threading.Thread(target=lambda: results.extend(reward(["$4$", "$5$"], ["4", "4"])))
    thread.start()
    thread.join(60)
    assert results == [1.0, 0.0]


@pytest.mark.parametrize(
    ("answer", "right", "wrong"),
    [
        (r"\sqrt{8}", [r"\boxed{2\sqrt2}", r"so $x = 2\sqrt{2}$"], ["2.828427", "8"]),
        (r"\pi", [r"\boxed{\pi}"], ["3.14159", "3.141593", r"\boxed{\frac{22}{7}}"]),
        ("12", [r"\boxed{\sqrt{144}}"], ["3*4", r"\boxed{3 \times 4}", "12 or 13"]),
        ("0.5", ["1/2"], ["50%"]),
        ("listen", [], ["silent"]),  # to math-verify, products of the same letters
        (["x+1", "5"], ["$1+x$", "5.0"], ["x"]),
    ],
)
def test_equal_by_mathematics_and_not_by_rounding(reward, answer, right, wrong):
    texts = [*right, *wrong]
    assert reward(texts, [answer] * len(texts)) == [1.0] * len(right) + [0.0] * len(wrong)


def test_it_explains_what_it_read(reward):
    problem = Problem("p", (), "x+1")
    assert "read '1+x'" in reward.explain(r"\boxed{1+x}", problem)
    assert "to math-verify the same" in reward.explain(r"\boxed{1+x}", problem)
    assert "wanted 'x+1'; to math-verify not" in reward.explain(r"\boxed{2+x}", problem)
