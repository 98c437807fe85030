"""Expressions out of completions: exact, and nothing else is computed."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lowmem_grpo.tasks.expressions import Expression, last_expression, parse_expression


@pytest.mark.parametrize(
    ("text", "value", "numbers"),
    [
        ("7", 7, (7,)),
        (" (1 + 2)\n * 3 ", 9, (1, 2, 3)),
        ("2 - -3", 5, (2, 3)),
        ("1/3 + 1/3", Fraction(2, 3), (1, 3, 1, 3)),
        ("2 + 3 * 4 - 10 / 5", 12, (2, 3, 4, 10, 5)),
    ],
)
def test_what_is_computed(text, value, numbers):
    assert parse_expression(text) == Expression(Fraction(value), numbers)


@pytest.mark.parametrize(
    "text",
    [
        "", "(", "1 +", "9**9**9", "7 // 2", "1.5 + 2", "0x10", "1_0", "007", "+3", "~3", "3(4)",
        "exit()", "__import__('os')", "x + 1", "1, 2", "1 = 1", "1/0", "2/(3-3)", "\u0663",
        "(" * 99 + "1" + ")" * 99 + "+1", "-" * 199 + "1" * 2,
    ],
)  # fmt: skip
def test_what_is_not(text):
    assert parse_expression(text) is None


@given(st.text("0123456789+-*/() ", max_size=250))
def test_no_text_breaks_it(text):
    for found in (parse_expression(text), last_expression(text)):
        assert found is None or isinstance(found.value, Fraction)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("First 3 + 4 = 7, then (3 + 4) * 2 = 14. Done!", 14),
        ("(so it is 3 + 4)", 7),
        ("**((3 + 4) * 2", 14),
        (r"\[ 3 \times (8 \div 2) \]", 12),
        ("6 \u00d7 4 \u2212 2", 22),
        ("- 3 + 4\n- 5", 7),
        ("numbers 3, 4 and 5; the answer is 12.", None),
        ("", None),
    ],
)
def test_the_last_expression_of_a_text(text, value):
    found = last_expression(text)
    assert (found and found.value) == value
