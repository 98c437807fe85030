"""Arithmetic that a model wrote, computed exactly and without `eval`: whole numbers, + - * /, a
minus before a term, and parentheses. Nothing else is read, and nothing longer than 200 characters,
so no power, name or call is ever reached.
"""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass
from fractions import Fraction

_LONGEST = 200
_TAIL = 2000
_CHARACTERS = re.compile(r"[0-9+\-*/() ]+")
# From a digit, sign or parenthesis to a digit or parenthesis, on one line.
_RUN = re.compile(r"[-(]?[0-9(][0-9+\-*/() ]*[0-9)]")
_WRITTEN = str.maketrans({"\u00d7": "*", "\u22c5": "*", "\u00f7": "/", "\u2212": "-"})
_TEX = ((r"\times", "*"), (r"\cdot", "*"), (r"\div", "/"), (r"\left", ""), (r"\right", ""))
_OPERATIONS = (ast.Add, ast.Sub, ast.Mult, ast.Div)


@dataclass(frozen=True)
class Expression:
    """value: exact. numbers: the whole numbers that stand in it, from left to right."""

    value: Fraction
    numbers: tuple[int, ...]


def parse_expression(text: str) -> Expression | None:
    """What `text` computes, or None where it is anything but an expression, or divides by zero."""
    text = " ".join(text.split())
    if len(text) > _LONGEST or not _CHARACTERS.fullmatch(text):
        return None
    numbers: list[int] = []
    try:
        value = _value(ast.parse(text, mode="eval").body, numbers)
    except (SyntaxError, ZeroDivisionError, MemoryError, RecursionError):
        return None
    return None if value is None else Expression(value, tuple(numbers))


def last_expression(text: str) -> Expression | None:
    """The last expression in `text` with an operation in it, whatever surrounds it (an equation
    counts with its left side), or None. Multiplication and division may be written as in print or
    TeX. Only the last 2000 characters are read.
    """
    text = text[-_TAIL:].translate(_WRITTEN)  # the search takes the square of what it reads
    for written, sign in _TEX:
        text = text.replace(written, sign)
    for run in reversed(_RUN.findall(text)):
        # A run takes the parentheses of the sentence with it: "(so 3 + 4)" ends in "3 + 4)".
        expression = parse_expression(run) or parse_expression(_balanced(run))
        if expression is not None and len(expression.numbers) > 1:
            return expression
    return None


def _value(node: ast.expr, numbers: list[int]) -> Fraction | None:
    if isinstance(node, ast.Constant) and type(node.value) is int:
        numbers.append(node.value)
        return Fraction(node.value)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        value = _value(node.operand, numbers)
        return None if value is None else -value
    if not isinstance(node, ast.BinOp) or not isinstance(node.op, _OPERATIONS):
        return None
    left, right = _value(node.left, numbers), _value(node.right, numbers)
    if left is None or right is None:
        return None
    if isinstance(node.op, ast.Add):
        return left + right
    if isinstance(node.op, ast.Sub):
        return left - right
    return left * right if isinstance(node.op, ast.Mult) else left / right


def _balanced(text: str) -> str:
    surplus = text.count("(") - text.count(")")
    if surplus > 0:
        return text.replace("(", "", surplus)
    while surplus < 0 and text.endswith(")"):
        text, surplus = text[:-1].rstrip(), surplus + 1
    return text
