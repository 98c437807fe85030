"""How an answer is read out of text: numbers, what a worked solution ends in ("#### 72", or
\\boxed{72}), and answers that stand inside a sentence.

Numbers are exact (`Fraction`): "0.1" equals "0.10" and "1/10", and no rounding decides a reward. A
number may have a sign directly before it, a dollar sign, thousands separators and decimals, or be a
fraction of two whole numbers (1/2). Percent signs, units and powers of ten are not read: "50%" is
50 and "1e5" ends in 5.
"""

from __future__ import annotations

import re
from collections import deque
from decimal import Decimal
from fractions import Fraction

_GROUPED = r"[0-9]{1,3}(?:,[0-9]{3})+(?!,?[0-9])(?:\.[0-9]+)?"
_RATIO = r"(?<![/.])[0-9]+/0*[1-9][0-9]*(?!/|[0-9]|\.[0-9])"  # not 12/05/2020, not 3/0
_PLAIN = r"[0-9]+(?:\.[0-9]+)?|(?<![0-9])\.[0-9]+"
_NUMBER = re.compile(f"{_GROUPED}|{_RATIO}|{_PLAIN}")
_WHOLE = re.compile(rf"(?:[-+\u2212]?\\?\$?|\\?\$[-\u2212])(?:{_GROUPED}|{_RATIO}|{_PLAIN})\.?")
# A minus belongs to the number unless what stands before it makes it a subtraction or a hyphen:
# "7-3" ends in 3, "x = -3" in -3. U+2212 is the minus of typeset mathematics. The look-behind
# needs one character more than the sign's own three.
_MINUS = re.compile(r"(?<![0-9A-Za-z)\]}.])[-\u2212](?:\\?\$)?\Z")
_MINUS_REACH = 4
# What opens and closes in TeX. Any other backslash takes the next character with it: \{ is a sign.
_BRACES = re.compile(
    r"(?P<box>\\(?:boxed|fbox)\s*\{)|\\boxed\s+(?P<bare>[^\s{}$\\]+)|(?P<open>\{)|(?P<close>\})|\\.",
    re.DOTALL,
)
_WORDS_IN_TEX = re.compile(r"\\(?:text|textbf|mathrm|mbox)\s*\{([^{}]*)\}")
_SPACING_IN_TEX = re.compile(r"\\(?:left|right)(?![A-Za-z])|\\[!,;: ]|[\s$]")


def last_number(text: str) -> Fraction | None:
    """The last number in `text`, or None where there is none."""
    matches = deque(_NUMBER.finditer(text), maxlen=1)
    if not matches:
        return None
    match = matches.pop()
    top, _, bottom = match.group().replace(",", "").partition("/")
    # Through Decimal: int() refuses texts of more than 4300 digits, and a completion can be one.
    value = Fraction(Decimal(top)) / Fraction(Decimal(bottom or "1"))
    start = match.start()
    return -value if _MINUS.search(text[max(0, start - _MINUS_REACH) : start]) else value


def parse_number(text: str) -> Fraction | None:
    """The number that `text` as a whole is (a full stop may end it), or None where it is anything
    else.
    """
    text = text.strip()
    return last_number(text) if _WHOLE.fullmatch(text) else None


def last_boxed(text: str) -> str | None:
    """What is in the last \\boxed{} or \\fbox{} of `text` that is closed, or None."""
    found, opened = None, []
    for match in _BRACES.finditer(text):
        if match["box"] or match["open"]:
            opened.append(match.end() if match["box"] else None)
        elif match["bare"]:
            found = match["bare"]
        elif match["close"] and opened:
            start = opened.pop()
            found = found if start is None else text[start : match.start()].strip()
    return found


def last_tagged(text: str) -> str | None:
    """What is in the last <answer>...</answer> of `text`, or None."""
    before, end, _ = text.rpartition("</answer>")
    _, start, inside = before.rpartition("<answer>")
    return inside if end and start else None


def final_answer(answer: str) -> str:
    """A reference answer without its worked solution: what follows the last "####", and of that
    what is in its last \\boxed{}; or all.
    """
    answer = answer.rpartition("####")[2].strip()
    return last_boxed(answer) or answer


def same_answer(one: str, other: str) -> bool:
    """Whether two final answers are the same number, or the same TeX but for spaces, \\text and the
    kind of fraction. What is equal by mathematics only is not the same.
    """
    number = parse_number(one)
    if number is not None and number == parse_number(other):
        return True
    return _tidied(one) == _tidied(other)


def _tidied(tex: str) -> str:
    tex = _WORDS_IN_TEX.sub(r"\1", tex).replace(r"\dfrac", r"\frac").replace(r"\tfrac", r"\frac")
    return _SPACING_IN_TEX.sub("", tex).rstrip(".")


def equals_text(text: str, answer: str) -> bool:
    """Whether `text` is `answer` and nothing more, apart from white space around it and one full
    stop.
    """
    text, answer = text.strip(), answer.strip()
    return text == answer or (text.endswith(".") and text[:-1].rstrip() == answer)


def contains_answer(text: str, answer: str) -> bool:
    """Whether `answer` can be found in `text`: as its last number if it is a number, else as whole
    words.
    """
    number = parse_number(answer)
    if number is not None:
        return last_number(text) == number
    text, answer = " ".join(text.split()), " ".join(answer.split())
    if not answer:
        return False
    # A choice such as "A" keeps its case: nearly every English sentence has the word "a" in it.
    flags = re.IGNORECASE if len(answer) > 1 else 0
    return re.search(rf"(?<!\w){re.escape(answer)}(?!\w)", text, flags) is not None
