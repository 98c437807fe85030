"""What the answer of a text is: its number, or the parts of it that may be the answer.

The places that count, the first of them that a text has:

    \\boxed{72}                  the last one that is closed
    <answer>72</answer>         the last one; also what comes before a lone </answer>
    #### 72                     the last one, to the end of its line
    The answer is 72.           also "Answer: 72" and others like it, the last one
    72                          a first paragraph that is a bare number
    ... the last number         else the last that stands for itself; of words and formulas
                                all of the text, its last line or its last formula

What is between <think> and </think> does not count, nor a goodbye at the end ("Let me know if you
need 2 more"). `letters.py` reads choices in the same order.
"""

from __future__ import annotations

import functools
import re
from collections import deque
from fractions import Fraction

from lowmem_grpo.tasks.marks import Piece, last_boxed, last_tagged, marked, sayings, spoken
from lowmem_grpo.tasks.numbers import Quantity, parse_number, parse_quantity, quantities
from lowmem_grpo.tasks.spelling import one_spelling

__all__ = ["candidates", "final_answer", "last_number", "read_number"]

_TAIL = 20_000
_WITH_ANOTHER = re.compile(r"[\s$]{0,4}(?:,|/|-|\bor\b|\band\b|\bto\b)[\s$]{0,4}\Z")
_FORMULA = re.compile(
    r"\$\$([^$]{1,2000})\$\$|\$([^$\n]{1,2000})\$|\\\(([^\n]{1,2000}?)\\\)|\\\[(.{1,2000}?)\\\]",
    re.DOTALL,
)
# Where what is said after an answer begins: "Paris, because", "Paris (the capital)".
_ADDED = re.compile(
    r"[,;]\s|\s\(|\s[-\u2013\u2014]\s"
    r"|\s(?:because|since|as|which|where|so|not|for|due|and not|rather)\b"
)
_LONGEST = 1000


def final_answer(answer: str) -> str:
    """A reference answer without its worked solution: what follows its last "####", and of that
    what is in its last \\boxed{} or <answer>, or after "the answer is"; or all.
    """
    answer = answer.rpartition("####")[2].strip()
    inside = last_boxed(answer) or last_tagged(answer)
    if inside and inside.strip():
        return inside.strip()
    said = next(sayings(answer), None)
    return _without_end(said.text) if said else answer


def last_number(text: str) -> Fraction | None:
    """The last number in `text` that stands for itself, or None where there is none."""
    found = deque(quantities(_tail(one_spelling(text))), maxlen=1)
    return found[0].value if found else None


@functools.lru_cache(maxsize=32)
def read_number(text: str) -> tuple[Fraction | None, Piece]:
    """The number that a text gives as its answer, and the part of the text that says so. None where
    that part has no number, or several.
    """
    text = spoken(text)
    piece = marked(text)
    if piece is None:
        return _in_words(text)
    if not piece.last:
        return _single(piece.text), piece
    value, inner = _in_words(piece.text)
    return value, piece if inner.last else inner


@functools.lru_cache(maxsize=32)
def candidates(text: str) -> tuple[Piece, ...]:
    """The parts of a text that may be its answer, where that is a formula or words."""
    text = spoken(text)
    piece = marked(text)
    if piece is not None and not piece.last:
        return (piece,)
    text, place = (piece.text, piece.place) if piece else (text, "the whole text")
    found = [Piece(text, place)]
    said = next(sayings(text), None)
    if said is not None:
        found += [said, Piece(_without_end(said.text), said.place)]
        formula = _FORMULA.search(said.text)
    else:
        found.append(Piece(text.rpartition("\n")[2].strip(), "the last line"))
        formulas = deque(_FORMULA.finditer(_tail(text)), maxlen=1)
        formula = formulas[0] if formulas else None
    if formula:
        place = said.place if said else "the last formula"
        found.append(Piece(formula[formula.lastindex].strip(), place))
    return tuple(each for each in found if 0 < len(each.text) <= _LONGEST)


def _in_words(text: str) -> tuple[Fraction | None, Piece]:
    for piece in sayings(text):
        words = one_spelling(piece.text)
        if any(map(str.isdigit, words)):
            return _first(words), piece
    first = text.partition("\n\n")[0]
    value = parse_number(first) if len(first) <= _LONGEST else None
    if value is not None:
        return value, Piece(first, "the first paragraph")
    found = deque(quantities(tail := _tail(one_spelling(text))), maxlen=1)
    if not found:
        return None, Piece(text, "no number that stands for itself", last=True)
    last = found[0]
    return last.value, Piece(tail[last.start : last.end].strip(), "the last number", last=True)


def _single(text: str) -> Fraction | None:
    """The number that a marked part is, or the only one in it."""
    whole = parse_quantity(text)
    if whole is not None:
        return whole.value
    found = {each.value for each in quantities(_tail(one_spelling(text)))}
    return found.pop() if len(found) == 1 else None


def _first(words: str) -> Fraction | None:
    """The number that follows "the answer is": the first, or the last of an equation."""
    whole = parse_quantity(words)
    if whole is not None:
        return whole.value
    found = list(quantities(words))
    if not found:
        return None
    equals = words.rfind("=")
    after = [each for each in found if each.start > equals]
    if equals >= 0 and after:
        return after[0].value
    first, *others = found
    if others and _are_two(words, first, others[0]):
        return None
    return first.value


def _are_two(words: str, one: Quantity, other: Quantity) -> bool:
    between = words[one.end : other.start]
    return one.value != other.value and _WITH_ANOTHER.fullmatch(between) is not None


def _without_end(text: str) -> str:
    """What is said as the answer without what is added to it, and without its full stop."""
    added = _ADDED.search(text)
    text = text[: added.start()] if added else text
    return text.strip().rstrip(".!* \t").lstrip("* \t")


def _tail(text: str) -> str:
    """The end of a text, from a space on: what is long is not read from its beginning."""
    if len(text) <= _TAIL:
        return text
    gap = re.compile(r"\s").search(text, len(text) - _TAIL)
    return text[gap.end() :] if gap else text
