"""The one reader of answers: whether a completion gives the answer that is wanted.

`reading.py` says where in a text its answer stands. The wanted answer decides how it is compared:

    a number     by its value, exactly: 0.1 = 1/10. How it is spelt, its currency, unit and percent
                 sign change nothing: 50% is 50, and not 0.5 (`numbers.py`)
    a letter     A to J, with the letter that the text settles on (`letters.py`)
    a list       1, 2 or {1,2} in any order; (1,2), [1,2] and [1,2) in theirs, with their brackets
    a formula    by its TeX, whatever its spacing, style and kind of fraction
    words        whatever their case, TeX, Markdown, article and punctuation around them

What is equal by mathematics only is not the same here: the reward `math` asks math-verify as well.
A problem may have several accepted answers.
"""

from __future__ import annotations

import re
from fractions import Fraction
from typing import Literal, NamedTuple

from lowmem_grpo.tasks.letters import answer_letter, chosen_letter, read_letter
from lowmem_grpo.tasks.lists import same_list
from lowmem_grpo.tasks.marks import Piece, last_boxed, last_tagged
from lowmem_grpo.tasks.numbers import parse_number, parse_quantity
from lowmem_grpo.tasks.reading import candidates, final_answer, last_number, read_number
from lowmem_grpo.tasks.spelling import one_spelling, tidied, words_of

__all__ = [
    "Answer",
    "Kind",
    "Verdict",
    "accepted",
    "answer_letter",
    "answer_number",
    "candidates",
    "chosen_letter",
    "contains_answer",
    "equals_answer",
    "equals_text",
    "explained",
    "final_answer",
    "is_formula",
    "judge",
    "kind_of",
    "last_boxed",
    "last_number",
    "last_tagged",
    "parse_number",
    "read_number",
    "same_answer",
]

Answer = str | list[str]
"""A reference answer, or several of which any is right."""
Kind = Literal["number", "letter", "formula", "words", "prose"]

_MOST_WORDS, _LONGEST = 30, 300
_SHOWN = 60
_FUNCTION = re.compile(
    r"arc(?:sin|cos|tan)|(?:sin|cos|tan|cot|sec|csc)h?|log|ln|exp|sqrt|max|min|mod|gcd|lcm|pi|deg|"
    r"[dtc]?frac|infty|inf|cup|cap|in|left|right|begin|end|[pbv]?matrix|array|text|cases|or|and",
    re.IGNORECASE,
)
_WORD = re.compile(r"[^\W\d_]{2,}")
_FORMULA_SIGN = re.compile(
    r"\\[A-Za-z]+|[\^_=+*<>\u221a\u03c0\u221e\u222a\u2229\u2264\u2265\u2260\u00b1\u00d7\u00f7]"
    r"|[0-9)\]}]\s{0,3}[A-Za-z(]|[A-Za-z]\s{0,3}[-+/]|/"
)
_DATE = re.compile(r"[0-9]+(?:[-:/.][0-9]+)+")
_LABELLED = re.compile(r"([A-J])[.:]\s")


class Verdict(NamedTuple):
    """Whether a completion is right, and the part of it that was read as its answer."""

    right: bool
    read: Piece


def accepted(answer: Answer) -> list[str]:
    """The answers that are right, without their worked solutions."""
    return [final_answer(each) for each in ([answer] if isinstance(answer, str) else answer)]


def kind_of(answer: str) -> Kind:
    """How a reference answer is compared; "prose" where it is so long that no completion can be
    expected to equal it.
    """
    answer = final_answer(answer)
    if answer_letter(answer) is not None:
        return "letter"
    quantity = parse_quantity(answer)
    if quantity is not None and not quantity.comma:
        return "number"
    if is_formula(answer):
        return "formula"
    long = len(answer) > _LONGEST or len(answer.split()) > _MOST_WORDS
    return "prose" if long else "words"


def answer_number(answer: str) -> Fraction | None:
    """The number that a reference answer gives, or None where it gives none."""
    quantity = parse_quantity(final_answer(answer))
    return None if quantity is None or quantity.comma else quantity.value


def is_formula(text: str) -> bool:
    """Whether a text can be mathematics beyond a plain number: not words, nor a date or a time."""
    if len(text) > 2 * _LONGEST or _DATE.fullmatch(text.strip()):
        return False
    text = one_spelling(text)
    if not all(map(_FUNCTION.fullmatch, _WORD.findall(text))):
        return False
    bare = text.strip(" $.()[]{}")
    single = len(bare) == 1 and bare.isalpha()
    return single or _FORMULA_SIGN.search(text) is not None or "," in text


def judge(completion: str, answer: Answer) -> Verdict:
    """Whether a completion gives one of the accepted answers."""
    verdicts = [_judge_one(completion, wanted) for wanted in accepted(answer)]
    return next((each for each in verdicts if each.right), verdicts[0])


def explained(verdict: Verdict, answer: Answer) -> str:
    """`verdict` in one line: what was read, where, and what was wanted."""
    piece = verdict.read
    found = f"read {_short(piece.text)}, {piece.place}" if piece.text else "nothing to read"
    if verdict.right:
        return found
    return f"{found}; wanted {' or '.join(map(_short, accepted(answer)))}"


def _short(text: str) -> str:
    text = " ".join(text.split())
    return repr(text if len(text) <= _SHOWN else f"{text[:_SHOWN]}...")


def _judge_one(completion: str, wanted: str) -> Verdict:
    kind = kind_of(wanted)
    if kind == "letter":
        letter, piece = read_letter(completion)
        return Verdict(letter == answer_letter(wanted), piece)
    if kind == "number":
        value, piece = read_number(completion)
        return Verdict(value is not None and value == answer_number(wanted), piece)
    found = candidates(completion)
    for piece in found:
        if same_answer(piece.text, wanted):
            return Verdict(True, piece)
    if labelled := _LABELLED.match(wanted):
        letter, piece = read_letter(completion)
        if letter == labelled[1]:
            return Verdict(True, piece)
    return Verdict(False, found[-1] if found else Piece("", "nothing"))


def same_answer(one: str, other: str) -> bool:
    """Whether two final answers are the same number, list, TeX or words. What is equal by
    mathematics only is not the same.
    """
    if words_of(one) == words_of(other) != "":
        return len(words_of(one)) > 1 or tidied(one) == tidied(other)
    first, second = parse_quantity(one), parse_quantity(other)
    if first is not None and second is not None and first.value == second.value:
        return True
    if tidied(one) == tidied(other) != "":
        return True
    return same_list(one, other, same_answer)


def equals_answer(text: str, wanted: str) -> bool:
    """Whether `text` is the answer and nothing more, however a number or TeX in it is spelt; a full
    stop may follow.
    """
    number = parse_number(wanted)
    if equals_text(text, wanted) or (number is not None and number == parse_number(text)):
        return True
    return ("=" in text) == ("=" in wanted) and tidied(text) == tidied(wanted) != ""


def equals_text(text: str, answer: str) -> bool:
    """Whether `text` is `answer` and nothing more, apart from white space around it and one full
    stop.
    """
    text, answer = text.strip(), answer.strip()
    return text == answer or (text.endswith(".") and text[:-1].rstrip() == answer)


def contains_answer(text: str, answer: Answer) -> bool:
    """Whether one of the accepted answers can be found in `text`: read out of it as by `judge`, or
    as whole words anywhere.
    """
    return any(_contains(text, wanted) for wanted in accepted(answer))


def _contains(text: str, wanted: str) -> bool:
    if kind_of(wanted) == "number":
        return read_number(text)[0] == answer_number(wanted)
    if judge(text, wanted).right:
        return True
    text, wanted = " ".join(text.split()), " ".join(wanted.split())
    if not wanted:
        return False
    # A choice such as "A" keeps its case: nearly every English sentence has the word "a" in it.
    flags = re.IGNORECASE if len(wanted) > 1 else 0
    return re.search(rf"(?<!\w){re.escape(wanted)}(?!\w)", text, flags) is not None
