"""The steps of a completion: its text cut after each separator, and the tokens where they end."""

from collections.abc import Sequence

from lowmem_grpo.rollout.text import Texts

__all__ = ["step_ends", "step_texts"]


def step_texts(text: str, separator: str) -> list[str]:
    """The steps, each with the separator that ends it; at least one, and none that is blank but the
    only one.
    """
    *pieces, last = text.split(separator)
    chunks = [(piece, piece + separator) for piece in pieces] + [(last, last)]
    steps: list[str] = []
    before = ""  # what is blank before the first step
    for piece, chunk in chunks:
        if piece.strip():
            steps.append(before + chunk)
            before = ""
        elif steps:
            steps[-1] += chunk
        else:
            before += chunk
    return steps or [text]


def step_ends(texts: Texts, ids: Sequence[int], text: str, separator: str) -> list[int]:
    """For each step of `text`, how many of the tokens `ids` it takes to get to its end: none where
    it ends within the beginning that the text has from the prompt. The last one's is all of them,
    an end token included.
    """
    ends, done = [], 0
    own = (texts.own(ids, ended) for ended in (False, True))
    beginning = min((len(text) - len(each) for each in own if text.endswith(each)), default=0)
    length = -beginning  # of what the tokens themselves say
    for step in step_texts(text, separator)[:-1]:
        length += len(step)
        low, high = done, len(ids)
        while low < high:  # text grows with tokens
            middle = (low + high) // 2
            if len(texts.own(ids[:middle])) >= length:
                high = middle
            else:
                low = middle + 1
        ends.append(low)
        done = low
    return [*ends, len(ids)]
