"""Numbers and answers read out of ugly text."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lowmem_grpo.tasks.answers import (
    contains_answer,
    equals_text,
    final_answer,
    last_boxed,
    last_number,
    last_tagged,
    parse_number,
    same_answer,
)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("The answer is 7.", 7),
        ("3 + 4 = 7", 7),
        ("7-3", None),
        ("7 - 3", None),
        ("7 - 3 = 4", 4),
        ("x=-3", -3),
        ("(\u22122)", -2),
        ("-$5", -5),
        ("$-5", -5),
        (r"\$1,234.50", Fraction(2469, 2)),
        ("it costs $1,000,000.", 1_000_000),
        ("12,34", Fraction(1234, 100)),
        ("0.10", Fraction(1, 10)),
        ("3.14.", Fraction(314, 100)),
        (".5", Fraction(1, 2)),
        ("1/2.", Fraction(1, 2)),
        ("12/05/2020", None),
        ("3/0", None),
        (r"\boxed{-42}", -42),
        ("**-8**", -8),
        ("7\n- 3", 3),
        ("007", 7),
        ("step 1\nstep 2\n\n99\n\n", 99),
    ],
)
def test_last_number(text, number):
    assert last_number(text) == number


@pytest.mark.parametrize("text", ["", "none", "-", "$", ".", "\ud800"])
def test_text_without_a_number(text):
    assert last_number(text) is None
    assert parse_number(text) is None


@pytest.mark.parametrize("text", ["7 apples", "3 4", "--5", "1,2345", "x = 5", "5 - 3"])
def test_more_than_a_number_is_not_one(text):
    assert parse_number(text) is None


def test_decimals_are_exact():
    assert parse_number("0.3") == parse_number("0.30") != parse_number("0.30000000000000001")


def test_a_completion_of_nothing_but_digits_is_read():
    # int() raises ValueError beyond 4300 digits; a small model does write such lines.
    assert last_number("9" * 20_000) == 10**20_000 - 1


@given(st.integers(-(10**12), 10**12))
def test_a_number_survives_the_ways_of_writing_it(n):
    for text in (str(n), f"{n:,}", f"{n}.", f"${n:,}", f"so 5 and then {n:,}.00."):
        assert last_number(text) == n, text
    assert parse_number(f" {n:,}. ") == n


@given(st.text())
def test_any_text_is_readable(text):
    value = last_number(text)
    assert value is None or isinstance(value, Fraction)


def test_final_answer_drops_the_worked_solution():
    assert final_answer("2 #### 3 is wrong\n#### 1,234\n") == "1,234"
    assert final_answer(" 12 ") == "12"


@pytest.mark.parametrize(
    ("text", "boxed"),
    [
        (r"so $\boxed{\frac{1}{2}}$ it is", r"\frac{1}{2}"),
        (r"\boxed{1} or \boxed{ 2 }.", "2"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{x \}}", r"x \}"),
        (r"\boxed{3}, that is \boxed{", "3"),
        (r"{ } } { \fbox{A}", "A"),
        (r"line\\\boxed{9}", "9"),
        (r"$\boxed 34$", "34"),
        (r"\boxes{3} \boxed", None),
    ],
)
def test_the_last_box_that_is_closed(text, boxed):
    assert last_boxed(text) == boxed


def test_final_answer_opens_the_box():
    assert final_answer(r"2 \boxed{5} #### 3, so \boxed{x^{2}}.") == "x^{2}"
    assert final_answer(r"\boxed{5} #### 3") == "3"
    assert final_answer(r"\boxed{}") == r"\boxed{}"  # and not an answer that no text differs from


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("1,042", "1042.0", True),
        (r"\dfrac{1}{2}", r"\frac{1}{2}", True),
        (r"\left( 3, \frac{\pi}{2} \right)", r"(3,\!\tfrac{\pi}{2})", True),
        (r"\text{Evelyn}", "Evelyn", True),
        (r"\leftarrow x", "arrow x", False),
        (r"\frac{2x}{4}", r"\frac{x}{2}", False),
        ("12", "21", False),
    ],
)
def test_the_same_answer_however_it_is_spaced(one, other, same):
    assert same_answer(one, other) is same


def test_equals_text():
    assert equals_text(" 12.\n", "12")
    assert equals_text("12", "12")
    assert not equals_text("12..", "12")
    assert not equals_text("= 12", "12")


def test_contains_answer():
    assert contains_answer("I think it is 1,200.0!", "1200")
    assert not contains_answer("12 or 13", "12")
    assert contains_answer("The capital is\n  new   york city", "New York")
    assert not contains_answer("Parisian", "Paris")
    assert contains_answer("(B) is right", "B")
    assert not contains_answer("a dog", "A")
    assert contains_answer("f(x)? yes: C++", "C++")
    assert not contains_answer("anything", " ")


@pytest.mark.parametrize(
    ("text", "inside"),
    [
        ("<answer>1</answer> no: <answer> 2\n</answer>.", " 2\n"),
        ("<answer>1</answer> <answer>2", "1"),
        ("<answer><answer>3</answer>", "3"),
        ("</answer>4<answer>", None),
        ("5", None),
        ("<answer></answer>", ""),
    ],
)
def test_the_last_answer_in_tags(text, inside):
    assert last_tagged(text) == inside
