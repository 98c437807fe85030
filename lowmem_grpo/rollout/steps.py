"""The steps of a completion: its text cut after each separator, and the tokens where they end."""

from collections.abc import Sequence

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


def step_ends(tokenizer, ids: Sequence[int], text: str, separator: str) -> list[int]:
    """For each step of `text`, which the tokens `ids` decode to, how many tokens it takes to get to
    its end. The last one's is all of them, an end token included.
    """
    ends, length, done = [], 0, 0
    for step in step_texts(text, separator)[:-1]:
        length += len(step)
        low, high = max(done, 1), len(ids)
        while low < high:  # text grows with tokens
            middle = (low + high) // 2
            if len(tokenizer.decode(ids[:middle], skip_special_tokens=True)) >= length:
                high = middle
            else:
                low = middle + 1
        ends.append(low)
        done = low
    return [*ends, len(ids)]
