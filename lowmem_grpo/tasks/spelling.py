"""One spelling for the many of the same character, sign and TeX: the first step of reading an
answer.

`one_spelling` is for numbers, letters and words alike. It takes time in proportion to the text.
"""

from __future__ import annotations

import re
import unicodedata

__all__ = ["one_spelling", "words_of"]

_MINUS = "\u2010\u2011\u2012\u2013\u2014\u2212\ufe58\ufe63\uff0d"
_SPACES = (
    "\u00a0\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a\u202f\u205f\u3000"
)
_INVISIBLE = "\u00ad\u200b\u200c\u200d\u200e\u200f\u2060\u2061\u2062\u2063\u2064\ufe0e\ufe0f\ufeff"
_CHARACTERS = str.maketrans(
    {
        **{chr(code): chr(code - 0xFEE0) for code in range(0xFF01, 0xFF5F)},  # full width
        **dict.fromkeys(_MINUS, "-"),
        **dict.fromkeys(_SPACES, " "),
        **dict.fromkeys(_INVISIBLE, ""),
        **dict.fromkeys("\u2018\u2019\u02bc\u2032\u00b4", "'"),
        **dict.fromkeys("\u201c\u201d\u201e\u00ab\u00bb\u300c\u300d\u300e\u300f", '"'),
        **dict.fromkeys("\u2044\u2215", "/"),
        **dict.fromkeys("\u00b7\u22c5\u2219\u2217\u2715\u2a2f", "\u00d7"),
        "\r": "\n",
        "\u2028": "\n",
        "\u2029": "\n",
        "\u066b": ".",
        "\u066c": ",",
        "\u2236": ":",
        "\uffe5": "\u00a5",
        "\u00ba": "\u00b0",
        "\u2245": "\u2248",
        "\u3002": ".\n",  # ends a sentence without a space after it
        "\u3001": ", ",
    }
)
_OTHER_DIGIT = re.compile(r"(?![0-9])\d")
_FRACTIONS = "\u00bc\u00bd\u00be\u2150-\u215e"
_FRACTION = re.compile(f"[{_FRACTIONS}]")
_RAISED = {
    **dict(
        zip(
            "\u2070\u00b9\u00b2\u00b3\u2074\u2075\u2076\u2077\u2078\u2079",
            "0123456789",
            strict=True,
        )
    ),
    "\u207b": "-",
}
_RAISED_RUN = re.compile(f"[{''.join(_RAISED)}]+")

_WRAPPER = re.compile(
    r"\\(?:text(?:bf|it|rm|tt|sf|sc|up|normal)?|math(?:rm|bf|it|sf|tt|bb|cal|normal)|mbox|hbox|emph"
    r"|bm|boldsymbol|operatorname\*?|underline|boxed|fbox)\s*\{([^{}]*)\}"
)
_NESTED = 4
_NOTHING = re.compile(
    r"\\!|\\(?:left|right|[bB]igg?[lr]?|displaystyle|textstyle|limits|bf|rm|it|boxed|fbox)(?![A-Za-z])"
)
_SPACE = re.compile(
    r"\\[,;:> ()\[\]]|~|\\(?:q?quad|thinspace|medspace|thickspace|enspace|hfill)(?![A-Za-z])"
)
_DEGREE = re.compile(r"\^\s?\{?\s?\\circ\s?\}?|\\degree(?![A-Za-z])")
_SIGNS = {
    "cdot": "\u00d7",
    "times": "\u00d7",
    "ast": "\u00d7",
    "div": "\u00f7",
    "over": "/",
    "approx": "\u2248",
    "simeq": "\u2248",
    "implies": "\u21d2",
    "Rightarrow": "\u21d2",
    "rightarrow": "\u21d2",
    "to": "\u21d2",
    "pounds": "\u00a3",
    "euro": "\u20ac",
    "pi": "\u03c0",
    "ge": "\u2265",
    "geq": "\u2265",
    "le": "\u2264",
    "leq": "\u2264",
    "ne": "\u2260",
    "neq": "\u2260",
    "pm": "\u00b1",
    "infty": "\u221e",
}
_SIGN = re.compile(rf"\\({'|'.join(_SIGNS)})(?![A-Za-z])")
_ESCAPED = re.compile(r"\\([%$#&_])")
_POWER = re.compile(r"(?<=[0-9])\*\*(?=-?[0-9])")
_BOLD = re.compile(r"\*\*|__|`")


def one_spelling(text: str) -> str:
    """`text` with decimal digits, signs and spaces in ASCII where that has them, powers and vulgar
    fractions in TeX, and without the TeX and Markdown of how it looks.

    Braces, brackets, dollar signs and all other TeX stay.
    """
    if not text.isascii():
        text = _FRACTION.sub(_vulgar, text.translate(_CHARACTERS))
        text = _OTHER_DIGIT.sub(lambda digit: str(unicodedata.decimal(digit[0])), text)
        text = _RAISED_RUN.sub(_raised, text)
    if "\\" in text or "~" in text:
        text = _ESCAPED.sub(r"\1", text.replace("\\\\", "\\").replace("{,}", ","))
        for _ in range(_NESTED):
            text, count = _WRAPPER.subn(r"\1", text)
            if not count:
                break
        text = _SPACE.sub(" ", _NOTHING.sub("", text))
        text = _SIGN.sub(lambda sign: _SIGNS[sign[1]], _DEGREE.sub("\u00b0", text))
    else:
        text = text.replace("{,}", ",")
    return _BOLD.sub("", _POWER.sub("^", text))


def _vulgar(sign: re.Match[str]) -> str:
    top, _, bottom = unicodedata.normalize("NFKC", sign[0]).partition("\u2044")
    return rf"\frac{{{top}}}{{{bottom}}}"


def _raised(run: re.Match[str]) -> str:
    return "^{" + "".join(_RAISED[sign] for sign in run[0]) + "}"


_ARTICLE = re.compile(r"(?:the|an|a)\s+(?=\S)")
_AROUND = " \t\n\"'$*_.,;:!?`"
_OUTER = re.compile(r"\A(?:\(([^(){}\[\],]*)\)|\{([^(){}\[\],]*)\}|\[([^(){}\[\],]*)\])\Z")


def words_of(text: str) -> str:
    """`text` as words to compare: without regard to case, TeX and Markdown around it, accents that
    are written as characters of their own, spaces, an article before it and punctuation around it.
    """
    text = unicodedata.normalize("NFKC", one_spelling(text)).casefold()
    text = " ".join(text.split()).strip(_AROUND)
    outer = _OUTER.match(text)
    if outer:
        text = outer[outer.lastindex].strip(_AROUND)
    return _ARTICLE.sub("", text, count=1) if _ARTICLE.match(text) else text


_SHORT_FRACTION = re.compile(
    r"\\[dtc]?frac\s*(?:\{([^{}]*)\}|([0-9A-Za-z]))\s*(?:\{([^{}]*)\}|([0-9A-Za-z]))"
)
_SHORT_ROOT = re.compile(r"\\sqrt\s*([0-9A-Za-z\u03c0])")
_ONE_IN_BRACES = re.compile(r"([\^_])\{([0-9A-Za-z\u03c0])\}")
_NAMED = re.compile(r"\A[A-Za-z]\w{0,9}(?:\([A-Za-z0-9]\))?=(?=[^=]+\Z)")


def tidied(tex: str) -> str:
    """TeX without what changes its look alone: spaces, dollar signs, styles, braces around one
    sign, a name before it ("x = "), a degree sign and a full stop.
    """
    text = "".join(one_spelling(tex).split()).replace("$", "")
    text = (
        _SHORT_FRACTION.sub(
            lambda found: rf"\frac{{{found[1] or found[2]}}}{{{found[3] or found[4]}}}", text
        )
        .replace(r"\dfrac", r"\frac")
        .replace(r"\tfrac", r"\frac")
    )
    text = _ONE_IN_BRACES.sub(r"\1\2", _SHORT_ROOT.sub(r"\\sqrt{\1}", text))
    return _NAMED.sub("", text.replace("\u00b0", "").rstrip("."))
