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
    """Keys or values of one layer, as they are or in 8 bits with a scale a token: of four axes, of
    which `axis` (the last or the one before) is the head's, which a scale covers, and the other of
    the two the tokens'.
    """

    def __init__(self, numbers: torch.Tensor, scales: torch.Tensor | None, axis: int):
        self.numbers, self.scales, self.axis = numbers, scales, axis
        self.tokens_axis = -3 - axis

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

    @property
    def room(self) -> int:
        """Tokens."""
        return self.numbers.shape[self.tokens_axis]

    def grow(self, room: int) -> None:
        """Make room for so many tokens; the new ones are zeros."""
        self.numbers = self._grown(self.numbers, room)
        if self.scales is not None:
            self.scales = self._grown(self.scales, room)

    def put(self, place, x: torch.Tensor) -> None:
        """Store x of four axes at `place`, an index of them."""
        if self.scales is None:
            self.numbers[place] = x
            return
        self.numbers[place], scales = _rounded(x, self.axis)
        of_scales = list(place)
        of_scales[self.axis] = slice(0, 1)
        self.scales[tuple(of_scales)] = scales

    def put_token(self, x: torch.Tensor, here: int | torch.Tensor) -> None:
        """Store a token of each row, x of three axes, at one place, or at each row's (int64)."""
        numbers, scales = (x, None) if self.scales is None else _rounded(x, -1)
        if isinstance(here, int):
            self.numbers.select(self.tokens_axis, here).copy_(numbers)
            if scales is not None:
                self.scales.select(self.tokens_axis, here).copy_(scales)
            return
        of_rows = torch.arange(len(here), device=here.device)
        # Rows first: an index of one axis (and not of all between two) keeps the others' order.
        self.numbers.movedim(self.tokens_axis, 1)[of_rows, here] = numbers
        if scales is not None:
            self.scales.movedim(self.tokens_axis, 1)[of_rows, here] = scales

    def wide(self, tokens: int | None = None) -> torch.Tensor:
        """The first tokens, or all, in the compute dtype."""
        tokens = self.room if tokens is None else tokens
        numbers = self.numbers.narrow(self.tokens_axis, 0, tokens)
        if self.scales is None:
            return numbers
        return numbers * self.scales.narrow(self.tokens_axis, 0, tokens)

    def keep(self, rows: list[int]) -> None:
        """Go on with these rows (ascending)."""
        self.numbers = moved_down(self.numbers, rows)
        if self.scales is not None:
            self.scales = moved_down(self.scales, rows)

    def _grown(self, x: torch.Tensor, room: int) -> torch.Tensor:
        shape = list(x.shape)
        shape[self.tokens_axis] = room
        larger = x.new_zeros(shape)
        larger.narrow(self.tokens_axis, 0, x.shape[self.tokens_axis]).copy_(x)
        return larger


def _rounded(x: torch.Tensor, axis: int) -> tuple[torch.Tensor, torch.Tensor]:
    """int8 numbers of x and the scales, in the dtype of x."""
    scales = (x.abs().amax(axis, keepdim=True) / 127).clamp_min(torch.finfo(x.dtype).tiny)
    # In float32: a scale that was rounded down would otherwise round 127 up to 128.
    numbers = (x.float() / scales.float()).round_().clamp_(-127, 127)
    return numbers.to(torch.int8), scales
