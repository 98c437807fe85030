"""Numbers in text, however they are spelt, as exact fractions: "0.1" equals "0.10" and "1/10", and
no rounding decides a reward.

A number may have a sign ("-", "\u2212", "minus") and a currency before it; thousands set apart by
commas, spaces, apostrophes, underscores or points (1,234,567; 12,34,567; 1 234; 1.234,50);
decimals; be a fraction (3/4, \\frac34, a mixed number like 2 1/2), a power (2^10), or have an
exponent (1e5, 1.5 \u00d7 10^3); and have a percent sign, a unit, or "thousand", "million" and so
on after it. Percent and units change nothing: 50% is 50, and not 0.5.

A part of a larger thing is no number: of a sum (2-5), a product with a letter or a root (2x,
2\\sqrt{3}), a date, a time, a version, a tuple, a name (H2O), a label ("Step 4"), nor what is
preceded by "not".

Both a number's digits and its exponent are bounded, so that none takes long to compute.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from fractions import Fraction
from typing import NamedTuple

from lowmem_grpo.tasks.digits import Token, kind_of, magnitude, scaled, token_is, tokenize
from lowmem_grpo.tasks.spelling import one_spelling

__all__ = ["Quantity", "parse_number", "parse_quantity", "quantities"]

_CURRENCY = frozenset("$\u20ac\u00a3\u00a5\u20b9\u20bd\u20a9")
_CODE = re.compile("USD|EUR|GBP|INR|CNY|RMB|JPY|US|Rs|RM|HK|AU|CA|A|C")
_NEGATIVE = frozenset(("minus", "negative", "\u8d1f", "\u8ca0"))
_OPERATORS = frozenset("+-*/^\u00d7\u00f7\u00b1")
_BINARY_WORDS = frozenset(("plus", "minus", "times", "divided", "x"))
_RELATIONS = frozenset("\u2264\u2265\u2260<>")
_UNIT_LETTERS = frozenset("mgshlLKCFVWJNAMHTPB\u03bc\u03a9")
_LABEL = re.compile(
    "(?:step|question|problem|equation|eq|example|figure|table|section|chapter|method|case|part)s?",
    re.IGNORECASE,
)
_NO_UNIT = re.compile(
    "and|or|to|plus|minus|times|over|of|by|from|if|when|where|not|but|is|are|was|[ap]m|=",
    re.IGNORECASE,
)
_LEAD = re.compile(
    "about|approximately|approx|roughly|around|exactly|only|just|nearly|almost|is|equals|the|answer",
    re.IGNORECASE,
)
_MOST_UNITS = 4
_MOST_TOKENS = 120  # of a text that is one number
_LONGEST_LEAD = 40
_NEGATED = re.compile(
    r"(?:\bnot|n't|\bno longer|\u4e0d\u662f)\s*(?:equal to\s*)?[$({\s]{0,4}\Z", re.IGNORECASE
)


class Quantity(NamedTuple):
    """A number in a text: its value and place. `comma`: it has a comma that is read as a decimal
    one and could part two numbers (1,5).
    """

    value: Fraction
    start: int
    end: int
    comma: bool = False


def parse_number(text: str) -> Fraction | None:
    """The number that `text` as a whole is, or None where it is anything else, or has a unit or a
    name ("x = 5"); a full stop may end it.
    """
    found = _whole(text)
    return found[0].value if found and not found[0].comma and not found[1] else None


def parse_quantity(text: str) -> Quantity | None:
    """The number that `text` as a whole is, with or without a unit, or None. "x = 5", "= 5" and
    "about 5" are 5.
    """
    found = _whole(text)
    return found[0] if found else None


def quantities(text: str) -> Iterator[Quantity]:
    """The numbers in `text` that stand for themselves, from left to right. Places are those of
    `one_spelling(text)`, which `text` should be.
    """
    tokens = tokenize(text)
    i = 0
    while i < len(tokens):
        if tokens[i].kind not in ("num", "frac"):
            i += 1
            continue
        found = magnitude(tokens, i)
        if found is None:
            i = _after_chain(tokens, i)
            continue
        value, end, comma = found
        first, negative = _signs_before(tokens, i)
        if _stands_alone(text, tokens, first, i, end):
            value, end = scaled(tokens, value, end)
            yield Quantity(
                -value if negative else value, tokens[first].start, tokens[end - 1].end, comma
            )
        i = end


def _signs_before(tokens: list[Token], i: int) -> tuple[int, bool]:
    """The first token of the number at token `i`, its sign and currency counted in, and whether it
    is negative.
    """
    first, negative, signed = i, False, False
    while first > 0 and not tokens[first].line:
        before = tokens[first - 1]
        if before.text in _CURRENCY or (before.kind == "word" and _CODE.fullmatch(before.text)):
            first -= 1
        elif not signed and (before.text in ("-", "+") or before.text.lower() in _NEGATIVE):
            # A space parts a sign from its number where nothing else makes it one: "- 5" in a list.
            free = before.text in ("-", "+") and tokens[first].gap and before.line
            if free or _is_operand(tokens, first - 2, before):
                break
            first, signed = first - 1, True
            negative = before.text != "+"
        else:
            break
    return first, negative


def _is_operand(tokens: list[Token], i: int, sign: Token) -> bool:
    """Whether token `i` makes `sign` after it a subtraction or a hyphen."""
    if i < 0 or sign.line:
        return False
    token = tokens[i]
    if token.kind in ("num", "frac") or token.text in (")", "]", "}", "%"):
        return True
    if token.kind != "word":
        return False
    letter = len(token.text) == 1 and token.text.isascii() and token.text not in ("a", "A", "I")
    return letter or (token.text.isascii() and not sign.gap)


def _stands_alone(text: str, tokens: list[Token], first: int, i: int, end: int) -> bool:
    """Whether the number of tokens `first` to `end`, whose digits begin at `i`, is no part of a
    larger thing.
    """
    return (
        _free_before(text, tokens, first, end)
        and _free_after(tokens, i, end)
        and not _in_tuple(tokens, first, end)
    )


def _free_before(text: str, tokens: list[Token], first: int, end: int) -> bool:
    start = tokens[first]
    if first == 0:
        return not _is_list_mark(tokens, first, end)
    before = tokens[first - 1]
    if start.line:
        return not _is_list_mark(tokens, first, end)
    if before.text in _RELATIONS:
        return not (start.gap and before.gap)  # x > 5, but <b>5 and -> 5
    if before.text in ("^", "_", "\u00b1") or (
        before.text == "{" and token_is(tokens, first - 2, "^", "_", "}")
    ):
        return False
    if before.kind == "macro":
        return False
    if before.kind == "word" and before.text.isascii():
        if not start.gap:
            return False
        if _LABEL.fullmatch(before.text):
            return False
        if before.text.lower() in _BINARY_WORDS and kind_of(tokens, first - 2) in ("num", "frac"):
            return False
    if before.text == "{" and kind_of(tokens, first - 2) == "macro":
        return False
    if before.text == "(" and first > 1:
        factor = tokens[first - 2]
        if factor.text in _OPERATORS or (factor.kind in ("num", "frac") and not before.gap):
            return False  # -(1/2), 2(3)
    if before.text in _OPERATORS:
        hyphen = before.text == "-" and not before.gap and kind_of(tokens, first - 2) == "word"
        many = hyphen and len(tokens[first - 2].text) > 1  # GPT-4
        bullet = before.line and before.text in "-*+"
        if not (many or bullet):
            return False
    joined = before.text in (":", ".", ",") and not start.gap and not before.gap
    if joined and kind_of(tokens, first - 2) == "num":
        return False
    return not _NEGATED.search(text[max(0, start.start - 24) : start.start])


def _free_after(tokens: list[Token], i: int, end: int) -> bool:
    if end >= len(tokens) or tokens[end].line:
        return True
    after = tokens[end]
    if after.text == "%":
        return not (token_is(tokens, end + 1, "of") and kind_of(tokens, end + 2) == "num")
    if after.kind == "macro" or after.text in ("\u03c0", "\u221a", "^", "_"):
        return False
    if after.kind == "frac":
        return False
    if after.kind == "word" and not _CODE.fullmatch(after.text):
        single = len(after.text) == 1 and after.text not in _UNIT_LETTERS
        known = after.text in ("x", "y", "z") or not after.gap
        if single and known and after.text.isalpha() and not _is_cjk(after.text):
            return False
        if after.text.lower() in _BINARY_WORDS | {"of"} and kind_of(tokens, end + 1) == "num":
            return False
    if after.text == "(" and not after.gap and kind_of(tokens, end + 1) == "num":
        return False
    if after.text in _OPERATORS:
        return not _begins_operand(tokens, end + 1, after)
    if after.text == ":" and not after.gap and kind_of(tokens, end + 1) == "num":
        return tokens[end + 1].gap
    return True


def _begins_operand(tokens: list[Token], i: int, operator: Token) -> bool:
    if i >= len(tokens) or tokens[i].line:
        return False
    token = tokens[i]
    if token.kind in ("num", "frac") or token.text in ("(", "{", "$", "\u03c0"):
        return True
    if token.kind == "macro":
        return True
    letter = token.kind == "word" and len(token.text) == 1 and token.text.isascii()
    return letter and token.text not in ("a", "A", "I")


def _after_chain(tokens: list[Token], i: int) -> int:
    """The token after digits, points and slashes that are together no number: dates, lists."""
    i += 1
    while token_is(tokens, i, "/", "^") and kind_of(tokens, i + 1) in ("num", "frac"):
        i += 2
    return i


def _is_list_mark(tokens: list[Token], first: int, end: int) -> bool:
    """Whether a number that begins a line counts what stands there: "2. Then add"."""
    if end >= len(tokens) or tokens[first].kind != "num" or len(tokens[first].text) > 2:
        return False
    mark = tokens[end]
    rest = end + 1 < len(tokens) and tokens[end + 1].gap and not tokens[end + 1].line
    return mark.text in (".", ")") and not mark.gap and rest


def _in_tuple(tokens: list[Token], first: int, end: int) -> bool:
    opened = first > 0 and tokens[first - 1].text in ("(", "[", "{")
    if opened and token_is(tokens, end, ",") and kind_of(tokens, end + 1) in ("num", "frac"):
        return True
    closed = token_is(tokens, end, ")", "]", "}")
    return (
        closed
        and token_is(tokens, first - 1, ",")
        and kind_of(tokens, first - 2) in ("num", "frac")
    )


def _is_cjk(letter: str) -> bool:
    return "\u3040" <= letter <= "\u9fff" or "\uac00" <= letter <= "\ud7a3"


def _whole(text: str) -> tuple[Quantity, bool] | None:
    """The number that all of `text` is, and whether it has a unit or something before it."""
    text = one_spelling(text)
    tokens = tokenize(text.strip(" \t\n\"'"), _MOST_TOKENS)
    if len(tokens) == _MOST_TOKENS:
        return None
    if len(tokens) > 1 and tokens[-1].text == ".":
        tokens.pop()
    i = lead = _after_lead(tokens)
    closers: list[str] = []
    negative = signed = False
    while i < len(tokens):
        token = tokens[i]
        if token.text in ("(", "{", "["):
            closers.append({"(": ")", "{": "}", "[": "]"}[token.text])
        elif not signed and (token.text in ("-", "+") or token.text.lower() in _NEGATIVE):
            signed, negative = True, token.text != "+"
        elif not (
            token.text in _CURRENCY or (token.kind == "word" and _CODE.fullmatch(token.text))
        ):
            break
        i += 1
    if kind_of(tokens, i) not in ("num", "frac"):
        return None
    found = magnitude(tokens, i)
    if found is None or "]" in closers or (found[2] and closers):  # a tuple, an interval
        return None
    value, end, comma = found
    value, end = scaled(tokens, value, end)
    unit = lead > 0
    while end < len(tokens):
        if closers and tokens[end].text == closers[-1]:
            closers.pop()
            end += 1
            if token_is(tokens, end, "^", "/") or (kind_of(tokens, end) in ("num", "frac")):
                return None
        elif tokens[end].text in _CURRENCY or tokens[end].text == "%":
            end += 1
        else:
            if closers or not _is_unit(tokens[end:]):
                return None
            unit, end = True, len(tokens)
    if closers:
        return None
    return Quantity(-value if negative else value, 0, len(text), comma), unit


def _after_lead(tokens: list[Token]) -> int:
    """The token after "x =", "f(2) =", "3 + 4 =", "about" and the like. An equation with an unknown
    in a sum (x + y = 5) is none of them.
    """
    lead = 0
    names = sums = False
    for i, token in enumerate(tokens[:_LONGEST_LEAD]):
        if token.text in _RELATIONS or token.text == ",":
            return 0
        if token.text in ("=", "\u2248", "\u21d2"):
            if names and sums:
                return 0
            lead = i + 1
        names = names or token.kind in ("word", "macro")
        sums = sums or token.text in _OPERATORS
    while kind_of(tokens, lead) == "word" and _LEAD.fullmatch(tokens[lead].text):
        lead += 1
    return lead


def _is_unit(tokens: list[Token]) -> bool:
    """Whether tokens after a number are its unit: a few words and their powers, and no name such as
    "Downing Street".
    """
    words = names = i = 0
    while i < len(tokens):
        token = tokens[i]
        if token.kind == "word":
            words += 1
            names += token.text.istitle() and len(token.text) > 1
            single = len(token.text) == 1 and token.text not in _UNIT_LETTERS
            variable = single and not _is_cjk(token.text)
            if words > _MOST_UNITS or names > 1 or variable or _NO_UNIT.fullmatch(token.text):
                return False
        elif token.text == "^" and words:
            i += 1
            while token_is(tokens, i, "{", "-", "}") or kind_of(tokens, i) == "num":
                i += 1
            continue
        elif not (
            token.text == "\u00b0"
            or (token.text in ("/", "-", "\u00d7", ".") and words)
            or (token.text == "-" and not token.gap)
        ):
            return False
        i += 1
    return True
