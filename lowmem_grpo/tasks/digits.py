"""The size of a number at a place in a text, as an exact fraction: digits with their marks and what
follows them (3/4, 2 1/2, 2^10, 1.5 \u00d7 10^3, 2 million). `numbers.py` reads its sign and what is
around it.

Digits and exponents are bounded, so that none takes long to compute.
"""

from __future__ import annotations

import re
from decimal import Decimal
from fractions import Fraction
from typing import NamedTuple

__all__ = ["Token", "kind_of", "magnitude", "scaled", "token_is", "tokenize"]

_TOKEN = re.compile(
    r"""(?P<frac>\\(?:[dtcs]?frac|nicefrac)\s{0,3}
            (?:\{(?P<top>[^{}]{0,200})\}|(?P<top1>[0-9]))\s{0,3}
            (?:\{(?P<bottom>[^{}]{0,200})\}|(?P<bottom1>[0-9])))
    |(?P<num>(?:[0-9]+(?:[.,'_][0-9]+)*|\.[0-9]+)(?:[eE][-+]?[0-9]{1,6}(?![\w.]))?)
    |(?P<macro>\\(?:[A-Za-z]+|.))
    |(?P<word>[^\W\d_]+)
    |(?P<newline>\n\s*)
    |(?P<space>[^\S\n]+)
    |(?P<sign>.)""",
    re.VERBOSE | re.DOTALL,
)
_MOST_BITS = 100_000
_MOST_DIGITS = 150_000
_SCALES = {
    "hundred": 100,
    "thousand": 1000,
    "million": 10**6,
    "billion": 10**9,
    "trillion": 10**12,
    "\u4e07": 10**4,
    "\u842c": 10**4,
    "\u4ebf": 10**8,
    "\u5104": 10**8,
}


class Token(NamedTuple):
    """kind: frac (TeX), num (digits with the marks in them), macro (other TeX), word or sign."""

    kind: str
    text: str
    start: int
    end: int
    gap: bool  # space before it
    line: bool  # the first of a line
    match: re.Match[str]


def tokenize(text: str, most: int | None = None) -> list[Token]:
    """The tokens of `text` without its spaces, the first `most` of them."""
    tokens: list[Token] = []
    gap, line = False, True
    for match in _TOKEN.finditer(text):
        kind = match.lastgroup
        if kind in ("top", "top1", "bottom", "bottom1"):
            kind = "frac"
        if kind == "space":
            gap = True
        elif kind == "newline":
            gap = line = True
        else:
            tokens.append(Token(kind, match[0], match.start(), match.end(), gap, line, match))
            gap = line = False
            if len(tokens) == most:
                break
    return tokens


def token_is(tokens: list[Token], i: int, *texts: str) -> bool:
    """Whether there is a token `i`, and it is one of `texts`."""
    return 0 <= i < len(tokens) and tokens[i].text in texts


def kind_of(tokens: list[Token], i: int) -> str:
    """The kind of token `i`, empty where there is none."""
    return tokens[i].kind if 0 <= i < len(tokens) else ""


def magnitude(tokens: list[Token], i: int) -> tuple[Fraction, int, bool] | None:
    """The number without its sign that begins at token `i`, the token after it, and whether it has
    a decimal comma; None where what begins there is no number.
    """
    if tokens[i].kind == "frac":
        value = _tex_fraction(tokens[i])
        return None if value is None else (value, i + 1, False)
    found = _decimal(tokens[i].text)
    if found is None:
        return None
    value, comma = found
    end = i + 1
    if tokens[i].text.isdigit():
        grouped = _grouped_by_spaces(tokens, i)
        if grouped is not None:
            value, end = grouped
        part = _proper_fraction(tokens, end)
        if part is not None:
            return value + part[0], part[1], False
    if token_is(tokens, end, "/") and kind_of(tokens, end + 1) == "num":
        bottom = _decimal(tokens[end + 1].text)
        if not bottom or not bottom[0] or token_is(tokens, end + 2, "/", "^"):
            return None
        return value / bottom[0], end + 2, comma or bottom[1]
    if token_is(tokens, end, "^"):
        return _raised(tokens, value, end)
    times = token_is(tokens, end, "\u00d7", "*", "x") and token_is(tokens, end + 1, "10")
    if times and token_is(tokens, end + 2, "^"):
        power = _raised(tokens, Fraction(10), end + 2)
        return power and (value * power[0], power[1], comma)
    return value, end, comma


def _decimal(text: str) -> tuple[Fraction, bool] | None:
    """Digits with marks between them and perhaps an exponent as (value, whether a comma in it is
    read as a decimal one), or None where they are no one number.
    """
    body, _, exponent = text.lower().partition("e")
    if len(body) > _MOST_DIGITS or abs(int(exponent or "0")) > _MOST_BITS // 4:
        return None
    marks = [sign for sign in body if not sign.isdigit()]
    comma = False
    if marks and not (marks == ["."] and "." in body):
        groups = re.split(r"[.,'_]", body)
        last, others = marks[-1], set(marks[:-1])
        if set(marks) == {last} and _are_thousands(groups):
            body = "".join(groups)
        elif (
            last in ".," and len(others) == 1 and last not in others and _are_thousands(groups[:-1])
        ):
            body = "".join(groups[:-1]) + "." + groups[-1]
        elif marks == [","]:
            body, comma = body.replace(",", "."), True
        else:
            return None
    # Through Decimal: int() refuses texts of more than 4300 digits, and a completion can be one.
    return Fraction(Decimal(f"{body}e{exponent or 0}")), comma


def _are_thousands(groups: list[str]) -> bool:
    """Whether digits are set apart by threes, or as in India by twos and a three at the end."""
    first, *middle, last = groups if len(groups) > 1 else ["", "", ""]
    if not first or len(last) != 3 or first.startswith("0"):
        return False
    sizes = {len(group) for group in middle}
    return (sizes <= {3} and len(first) <= 3) or (sizes == {2} and len(first) <= 2)


def _grouped_by_spaces(tokens: list[Token], i: int) -> tuple[Fraction, int] | None:
    """1 234 567.5 from token `i` on, or None. A run in which a part is no group of three is not
    one.
    """
    texts, end = [tokens[i].text], i + 1
    while kind_of(tokens, end) == "num" and tokens[end].gap and not tokens[end].line:
        if len(tokens[end].text.partition(".")[0]) != 3:
            return None
        texts.append(tokens[end].text)
        end += 1
    whole, _, decimals = texts[-1].partition(".")
    if len(texts) > 1 and token_is(tokens, end, "/"):  # 1 234 1/2, or 3 456/7
        return None
    if len(texts) < 2 or not (decimals or "0").isdigit():
        return None
    groups = [*texts[:-1], whole]
    if not all(map(str.isdigit, groups)) or not _are_thousands(groups):
        return None
    return Fraction(Decimal("".join(groups) + "." + (decimals or "0"))), end


def _proper_fraction(tokens: list[Token], i: int) -> tuple[Fraction, int] | None:
    """A fraction below 1 at token `i`, the second part of a mixed number, and the token after."""
    if kind_of(tokens, i) == "frac" and not tokens[i].line:
        value = _tex_fraction(tokens[i])
        return (value, i + 1) if value is not None and 0 < value < 1 else None
    if not (kind_of(tokens, i) == kind_of(tokens, i + 2) == "num" and token_is(tokens, i + 1, "/")):
        return None
    top, bottom = tokens[i], tokens[i + 2]
    apart = tokens[i + 1].gap or bottom.gap or not top.gap or top.line
    if apart or not (top.text.isdigit() and bottom.text.isdigit()) or token_is(tokens, i + 3, "/"):
        return None
    if max(len(top.text), len(bottom.text)) > 9 or not 0 < int(top.text) < int(bottom.text):
        return None
    return Fraction(int(top.text), int(bottom.text)), i + 3


def _tex_fraction(token: Token) -> Fraction | None:
    top = _signed(token.match["top"] or token.match["top1"] or "")
    bottom = _signed(token.match["bottom"] or token.match["bottom1"] or "")
    return top / bottom if top is not None and bottom else None


def _signed(text: str) -> Fraction | None:
    """The number that is all of a text of digits, marks and a sign."""
    tokens = tokenize(text, 4)
    negative = token_is(tokens, 0, "-")
    found = magnitude(tokens, negative) if kind_of(tokens, negative) == "num" else None
    if found is None or found[1] < len(tokens) or found[2]:
        return None
    return -found[0] if negative else found[0]


def _raised(tokens: list[Token], base: Fraction, i: int) -> tuple[Fraction, int, bool] | None:
    """`base` to the whole power whose "^" is token `i`, if the result is not too large."""
    braced = token_is(tokens, i + 1, "{", "(")
    at = i + 2 if braced else i + 1
    negative = token_is(tokens, at, "-")
    at += negative
    if kind_of(tokens, at) != "num" or not tokens[at].text.isdigit() or len(tokens[at].text) > 6:
        return None
    exponent, end = int(tokens[at].text), at + 1
    if braced:
        if not token_is(tokens, end, "}", ")"):
            return None
        end += 1
    bits = max(base.numerator.bit_length(), base.denominator.bit_length())
    if token_is(tokens, end, "^") or bits * exponent > _MOST_BITS or (negative and not base):
        return None
    return base ** (-exponent if negative else exponent), end, False


def scaled(tokens: list[Token], value: Fraction, end: int) -> tuple[Fraction, int]:
    """`value` times the words "thousand", "million" and so on from token `end` on, and the token
    after them.
    """
    while kind_of(tokens, end) == "word" and tokens[end].text.lower() in _SCALES:
        value, end = value * _SCALES[tokens[end].text.lower()], end + 1
        if value.numerator.bit_length() > _MOST_BITS:
            break
    return value, end
