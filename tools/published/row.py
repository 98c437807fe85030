"""One line of the table: a number that somebody published, and what is predicted for it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

CONFIGS = Path(__file__).parents[2] / "tests/memory/configs"


@dataclass
class Row:
    """`number`: what the published number most likely is; `unit`: "MiB" or "GiB", of all numbers.

    `predicted` and `published` are None where there is nothing to compare with. `allocated`,
    `reserved` and `device` (lowest, highest) are the prediction in full, `assumed` what the
    publisher does not say and was decided before the prediction was looked at.
    """

    run: str
    number: str
    unit: str
    predicted: float | None = None
    published: float | None = None
    note: str = ""
    allocated: float | None = None
    reserved: float | None = None
    device: tuple[float, float] | None = None
    assumed: str = ""

    @property
    def difference(self) -> float | None:
        """Predicted against published, in percent."""
        if self.predicted is None or self.published is None:
            return None
        return 100 * (self.predicted / self.published - 1)

    def as_dict(self) -> dict:
        return asdict(self) | {"difference": self.difference}
