"""Keys and values as a cache holds them: in the compute dtype, or in 8 bits.

In 8 bits each token's keys of a head, and its values, are int8 numbers with one scale in the
compute dtype:

    s = max |x| / 127        x8 = round(x / s)

They are widened when attention asks for them, for one layer at a time.
"""

import torch

__all__ = ["Stored", "moved_down"]


def moved_down(x: torch.Tensor, rows: list[int]) -> torch.Tensor:
    """The first of x, into which `rows` (ascending) have been copied.

    In place: a second cache beside the first would be more than the plan of the longest rollout,
    in which all rows stay to the end.
    """
    for place, row in enumerate(rows):
        if place != row:
            x[place].copy_(x[row])
    return x[: len(rows)]


class Stored:
    """Keys or values of one layer: as they are, or in 8 bits with a scale a token. `axis`: the one
    of the head, which a scale covers.
    """

    def __init__(self, numbers: torch.Tensor, scales: torch.Tensor | None, axis: int):
        self.numbers, self.scales, self.axis = numbers, scales, axis

    @classmethod
    def of(cls, x: torch.Tensor, bits: int, axis: int) -> "Stored":
        """x, stored."""
        return cls(*_rounded(x, axis), axis) if bits == 8 else cls(x, None, axis)

    @classmethod
    def zeros(cls, like: torch.Tensor, shape: tuple[int, ...], bits: int, axis: int) -> "Stored":
        """Zeros of a shape: places that are masked are multiplied all the same."""
        if bits != 8:
            return cls(like.new_zeros(shape), None, axis)
        of_scales = list(shape)
        of_scales[axis] = 1
        return cls(like.new_zeros(shape, dtype=torch.int8), like.new_zeros(of_scales), axis)

    def put(self, place, x: torch.Tensor) -> None:
        """Store x at a `place`, an index of four. A single token's x has no axis of tokens."""
        if self.scales is None:
            self.numbers[place] = x
            return
        axis = self.axis if x.ndim == 4 else -1
        self.numbers[place], scales = _rounded(x, axis)
        of_scales = list(place)
        of_scales[self.axis] = slice(0, 1) if x.ndim == 4 else 0
        self.scales[tuple(of_scales)] = scales if x.ndim == 4 else scales[..., 0]

    def wide(self, part=...) -> torch.Tensor:
        """A part of it in the compute dtype."""
        if self.scales is None:
            return self.numbers[part]
        return self.numbers[part] * self.scales[part]

    def keep(self, rows: list[int]) -> None:
        """Go on with these rows (ascending)."""
        self.numbers = moved_down(self.numbers, rows)
        if self.scales is not None:
            self.scales = moved_down(self.scales, rows)


def _rounded(x: torch.Tensor, axis: int) -> tuple[torch.Tensor, torch.Tensor]:
    """int8 numbers of x and the scales, in the dtype of x."""
    scales = (x.abs().amax(axis, keepdim=True) / 127).clamp_min(torch.finfo(x.dtype).tiny)
    # In float32: a scale that was rounded down would otherwise round 127 up to 128.
    numbers = (x.float() / scales.float()).round_().clamp_(-127, 127)
    return numbers.to(torch.int8), scales
