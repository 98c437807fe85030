"""Walking rows in tiles.

In a trace without values (`memory/phases.py`) a few tiles stand for all: the others would allocate
and free the same once more, after those have given it back, and a long sequence has hundreds in
every layer.
"""

import contextlib
from collections.abc import Iterator

__all__ = ["few_tiles", "tiles"]

_few = False


def tiles(rows: int, size: int) -> list[slice]:
    """Slices of at most `size` rows that cover them, in order; within `few_tiles` the first two and
    the last two of them.
    """
    starts = list(range(0, rows, size))
    if _few and len(starts) > 4:
        starts = starts[:2] + starts[-2:]
    return [slice(start, min(start + size, rows)) for start in starts]


@contextlib.contextmanager
def few_tiles() -> Iterator[None]:
    """For tensors without values only: what is computed within is not whole."""
    global _few
    before, _few = _few, True
    try:
        yield
    finally:
        _few = before
