"""Where a text says what its answer is: \\boxed{}, <answer> tags, "####", "the answer is".

`marked` finds the mark that counts. Every pattern is bounded, so that a text of any kind is read in
time in proportion to its length.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterator
from typing import NamedTuple

__all__ = ["Piece", "last_boxed", "last_tagged", "marked", "sayings", "spoken"]

# What opens and closes in TeX. Any other backslash takes the next character with it: \{ is a sign.
_BRACES = re.compile(
    r"(?P<box>\\(?:boxed|fbox)\s{0,9}\{)|\\boxed\s{1,9}(?P<bare>[^\s{}$\\]+)"
    r"|(?P<open>\{)|(?P<close>\})|\\.",
    re.DOTALL,
)
_HASHES = re.compile(r"####[ \t]*([^\n]*)")
_HEADING = re.compile(
    r"(?:step|part|case|section|explanation|solution|problem|question|reasoning|note)s?\b",
    re.IGNORECASE,
)
# "The answer to the question would be: ", but not "answer choices are".
_SAYS_SO = re.compile(
    r"""(?<![^\W_])(?:
        (?:answer|answers|antwort|l\u00f6sung|respuesta|resposta|r\u00e9ponse|risposta|\u043e\u0442\u0432\u0435\u0442)\b
        (?:\s{1,3}(?:to|for|of|in|that|which|we|you|i)\b[^.\n:=?!]{0,60}?)?
        (?:\s{0,3}\([^()\n]{0,30}\))?
        [\s*_`"']{0,6}
        (?:\b(?:is|are|was|would\s+be|should\s+be|must\s+be|will\s+be|equals|lautet|ist|es|est|\u00e9|\u00e8)\b
           \s{0,3}:?|:|=|-{1,2}>)
      | (?:correct|right|best)\s{1,3}(?:option|choice|letter|one)\s{1,3}(?:is|would\s+be)\b\s{0,3}:?
      )
      | (?:\u7b54\u6848|\u7b54\u3048|\u89e3\u7b54|\uc815\ub2f5|\ub2f5)\s{0,3}
        (?:\u5e94\u8be5|\u61c9\u8a72)?(?:\u9009|\u9078)?(?:\u662f|\u4e3a|\u70ba|\u306f|\uc740|:|\uff1a|=)\s{0,3}:?
    """,
    re.IGNORECASE | re.VERBOSE,
)
_AFTER = re.compile(
    r"(?:[\s:*_`=]|(?:therefore|thus|then|indeed|definitely|clearly|simply|just|exactly)\b[\s,:]"
    r"){0,24}",
    re.IGNORECASE,
)
_SENTENCE = re.compile(r"[^\n]{0,1000}?(?:[.!?](?=[\s*)\"']|\Z)|\u3002|\n|\Z)")
_LONGEST_PIECE = 1000
_MOST_SAYINGS = 20
# Not a part of the answer: what assistants say at the end.
_GOODBYE = re.compile(
    r"(?:\A|\n|(?<=[.!?)*]) )[ \t*]*(?:please let me|let me know|feel free|i hope"
    r"|hope (?:this|that)|if you (?:have|need|want|would|'d)|is there anything|would you like"
    r"|do you (?:want|need))"
    r"[^\n]*\s*\Z",
    re.IGNORECASE,
)
_GOODBYE_REACH = 500


class Piece(NamedTuple):
    """A part of a text that gives its answer, and the place that it has, in words. `last`: without
    a mark around it, so that the last answer in it counts, and not the first.
    """

    text: str
    place: str
    last: bool = False


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


def spoken(text: str) -> str:
    """`text` after its last </think> and without a goodbye at its end; all of it where that leaves
    nothing.
    """
    text = text.rpartition("</think>")[2].strip() or text.strip()
    for _ in range(2):
        goodbye = _GOODBYE.search(text, max(0, len(text) - _GOODBYE_REACH))
        if goodbye is None or not text[: goodbye.start()].strip():
            break
        text = text[: goodbye.start()].rstrip()
    return text


def marked(text: str) -> Piece | None:
    """What the mark in `text` that counts has in it: the last \\boxed{}; else the last
    <answer>...</answer>, or what comes before a lone </answer>; else what follows the last "####"
    on its line. None where there is no mark, or nothing in it.
    """
    boxed = last_boxed(text) if "box" in text else None
    if boxed:
        return Piece(boxed, "in \\boxed{}")
    inside, end, _ = text.rpartition("</answer>")
    inside = inside.rpartition("<answer>")[2]
    if end and inside.strip():
        return Piece(inside.strip(), "in <answer>", last=True)
    lines = [match[1].strip(" \t*#") for match in _HASHES.finditer(text)]
    lines = [line for line in lines if line and not _HEADING.match(line)]
    return Piece(lines[-1], "after ####") if lines else None


def sayings(text: str) -> Iterator[Piece]:
    """What follows "the answer is", "Answer:" and the like up to the end of the sentence, the last
    first.
    """
    for match in reversed(deque(_SAYS_SO.finditer(text), maxlen=_MOST_SAYINGS)):
        start = _AFTER.match(text, match.end()).end()
        piece = _SENTENCE.match(text, start)
        words = (piece[0] if piece else text[start : start + _LONGEST_PIECE]).strip()
        if words:
            yield Piece(words, f"after {' '.join(match[0].split())!r}")
