"""The letter of a choice, A to J, that a text settles on.

The places that count, the first of them that has one: \\boxed{}; <answer>; after "####"; after "the
answer is" or "Answer:" (the last that names a letter); "option B is correct"; a text that is a
letter, or a letter and its option ("B. Paris"); the last letter in parentheses; a letter at the end
after "is", "option" and the like.

Two letters together ("A and B") are no choice. A letter within a sentence is none either ("A good
guess", "vitamin C"), nor one that is denied ("not B").
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterator

from lowmem_grpo.tasks.marks import Piece, marked, sayings, spoken
from lowmem_grpo.tasks.spelling import one_spelling

__all__ = ["answer_letter", "chosen_letter", "read_letter"]

_ONE = "(?P<letter>[A-J])"
_ENDS = r"(?![A-Za-z0-9'\u2019_])"
_OPTION = r"(?:(?:option|choice|letter|answer|number)\s{0,3}:?\s{0,3})"
_REASON = r"(?:because|since|as|for|due|which|that|with|where|is|would|not|and|or|but|\(|-)"
# In what is marked as the answer. A bare letter needs a sign of its end: "A" and "I" are words.
_MARKED = re.compile(
    rf"\(\s{{0,2}}{_ONE}\s{{0,2}}\)"
    rf"|(?i:{_OPTION})[\s\"'(*]{{0,4}}(?P<option>[A-J]){_ENDS}"
    rf"|(?<![A-Za-z0-9'.\\])(?P<bare>[A-J])(?=[\"'*$}}]{{0,4}}(?:[.,;:?!)\]]|\s*\n|\s*\Z"
    rf"|\s{{1,3}}{_REASON}))"
)
_WITH_ANOTHER = re.compile(
    r"[)\"'*$.\s]{0,4}(?:,|/|&|\+|\band\b|\bor\b|\u548c|\u6216|\u3001)[\s\"'*$]{0,4}"
    r"(?:(?i:and|or|both|maybe|perhaps|possibly|option|choice)\s{1,3}){0,2}\(?[A-J](?![A-Za-z0-9'])"
    r"(?!\)?\s{1,3}(?:is|was|are|cannot|can't|isn't|would|has)\b)",
)
_DENIED = re.compile(
    r"(?:\bnot|n't|\bneither|\bnor|\bthan|\bexcept|\bno)\s{1,3}(?:be\s{1,3})?"
    rf"(?i:{_OPTION})?[(\s\"'*]{{0,4}}\Z"
)
_CORRECT = re.compile(
    rf"\b(?i:option|choice|answer|letter)\s{{1,3}}\(?{_ONE}\)?{_ENDS}[\"'*]{{0,3}}"
    r"\s{1,3}(?:is|must be|would be)\s{1,3}(?:the\s{1,3})?(?:correct|right|best|true|answer)\b"
    rf"|(?<![A-Za-z0-9])\(?(?P<bare>[A-J])\)?{_ENDS}\s{{1,3}}is\s{{1,3}}(?:the\s{{1,3}})?"
    r"(?:correct|right|best)\b"
)
# A line that begins with its letter: "B", "(B) Paris", "B. Paris", "B: Paris".
_OPENS = re.compile(
    rf"(?m:^)[ \t\"'>*-]{{0,6}}\(?{_ONE}(?:\)|[.:](?=\s|\*|$)|[\"'*$]{{0,3}}[ \t]*(?=\n|\Z))"
)
_IN_PARENTHESES = re.compile(rf"\(\s?{_ONE}\s?\)")
_AT_THE_END = re.compile(
    r"(?i:\bis|'s|\bbe|\bso,?|\bthus,?|\bhence,?|\btherefore,?|\boption|\bchoice|\bchoose|\bpick|\bselect|\bletter|\bwith|\bfor|[:=])"
    rf"[\s\"'*$(]{{1,4}}{_ONE}[)\"'*$.!\s]{{0,6}}\Z"
)
_REFERENCE = re.compile(
    rf"\(\s?{_ONE}\s?\)(?:\s.*)?|{_ONE.replace('letter', 'bare')}"
    r"(?:[.:]|\)(?:\s.*)?)?",
    re.DOTALL,
)
_LONGEST = 20_000


def answer_letter(answer: str) -> str | None:
    """The letter that a reference answer is, perhaps with its option ("(B) Paris", "B) Paris"), or
    None where it is anything else.
    """
    match = _REFERENCE.fullmatch(_spelled(answer).strip(" \t\n$"))
    return match["letter"] or match["bare"] if match else None


def chosen_letter(text: str) -> str | None:
    """The letter that a text settles on, or None."""
    return read_letter(text)[0]


def read_letter(text: str) -> tuple[str | None, Piece]:
    """The letter that a text settles on, or None, and the part of the text that says so."""
    text = spoken(text)
    piece = marked(text)
    if piece is None:
        return _in_words(text)
    if not piece.last:
        return _in_piece(piece.text), piece
    letter, inner = _in_words(piece.text)
    return letter, piece if inner.last else inner


def _in_words(text: str) -> tuple[str | None, Piece]:
    for piece in sayings(text):
        words = _spelled(piece.text)
        if _MARKED.search(words) or re.match(r"[\"'*$(]{0,4}[A-J]\b", words):
            letter = _in_piece(piece.text)
            if letter or _WITH_ANOTHER.search(words):
                return letter, piece
    return _unmarked(_spelled(text[-_LONGEST:]))


def _in_piece(text: str) -> str | None:
    """The letter that what is marked as the answer names first, if it names no second beside it."""
    words = _spelled(text).strip(" \t\n$\"'*")
    found = next(_letters(_MARKED, words), None)
    if found is None or _WITH_ANOTHER.match(words, found[1]):
        return None
    return found[0]


def _unmarked(text: str) -> tuple[str | None, Piece]:
    found = deque(_letters(_CORRECT, text), maxlen=1)
    if found:
        return found[0][0], Piece(found[0][0], "said to be correct")
    opened = list(_letters(_OPENS, text))
    if len({letter for letter, _ in opened}) == 1 and not _WITH_ANOTHER.match(text, opened[0][1]):
        inside = {letter for letter, _ in _letters(_IN_PARENTHESES, text)}
        if inside <= {opened[0][0]}:
            return opened[0][0], Piece(opened[0][0], "at the beginning of a line")
    inside = deque(_letters(_IN_PARENTHESES, text), maxlen=2)
    if inside:
        other = _WITH_ANOTHER.match(text, inside[0][1]) if len(inside) > 1 else None
        both = other is not None and other.end() >= inside[1][1]
        letter = None if both else inside[-1][0]
        return letter, Piece(letter or text, "the last in parentheses", last=True)
    end = _AT_THE_END.search(text, max(0, len(text) - 40))
    if end and not _DENIED.search(text[max(0, end.start("letter") - 30) : end.start("letter")]):
        return end["letter"], Piece(end["letter"], "at the end", last=True)
    return None, Piece(text, "nothing that names a letter", last=True)


def _letters(pattern: re.Pattern[str], text: str) -> Iterator[tuple[str, int]]:
    """The letters that a pattern finds and that are not denied, and the place after each."""
    for match in pattern.finditer(text):
        groups = {name: match.start(name) for name, found in match.groupdict().items() if found}
        ((name, start),) = groups.items()
        if not _DENIED.search(text[max(0, start - 30) : start]):
            yield match[name], start + 1


def _spelled(text: str) -> str:
    return one_spelling(text).replace("{", "").replace("}", "")
