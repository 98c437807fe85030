"""What the answers of a column are, and the reward that follows from it.

    all numbers        number
    all letters        choice
    any formulas       math, or task where math-verify is not installed
    words, or several  task
    long texts alone   none: no completion can be expected to equal one

Lists of accepted answers count as the one among them that asks most of a reward.
"""

from __future__ import annotations

import importlib.util
from collections import Counter
from collections.abc import Iterable

from lowmem_grpo.tasks.answers import Answer, Kind, accepted, kind_of

__all__ = ["AnswerKinds"]

_ORDER: tuple[Kind, ...] = ("formula", "words", "number", "letter", "prose")
_PLURAL = {"number": "numbers", "letter": "letters", "formula": "formulas", "prose": "long texts"}


def _can_verify() -> bool:
    """Whether math-verify is installed."""
    return importlib.util.find_spec("math_verify") is not None


class AnswerKinds:
    """Counts the kinds of a column's answers. A row of several accepted answers is of the kind that
    asks most of a reward.
    """

    def __init__(self) -> None:
        self._counts: Counter[Kind] = Counter()
        self._several = 0
        self._long = ""

    def add(self, answer: Answer, where: str) -> None:
        """Count the answer of the row at `where`."""
        kinds = {kind_of(each) for each in accepted(answer)}
        kind = next(each for each in _ORDER if each in kinds)
        self._counts[kind] += 1
        self._several += not isinstance(answer, str) and len(answer) > 1
        if kind == "prose":
            self._long = self._long or where

    def default(self) -> tuple[str, ...]:
        """The reward that can read them, or none."""
        kinds = {kind for kind, count in self._counts.items() if count}
        if kinds == {"prose"}:
            return ()
        if kinds == {"number"}:
            return ("number",)
        if kinds == {"letter"}:
            return ("choice",)
        return ("math",) if "formula" in kinds and _can_verify() else ("task",)

    def line(self) -> str:
        """What there is, and how much of it the reward reads."""
        total = self._counts.total()
        counts = ", ".join(f"{n} {_PLURAL.get(k, k)}" for k, n in self._counts.most_common())
        several = f", {self._several} of them lists of accepted ones" if self._several else ""
        found = f"the answers are {counts}{several}"
        reward = self.default()
        if not reward:
            return f"{found}, like {self._long}: no reward by default compares those"
        long = self._counts["prose"]
        share = f"{found}; reward {reward[0]} reads {(total - long) / total:.1%} of them"
        if long:
            share += f", and none that is long, like {self._long}"
        if self._counts["formula"] and reward != ("math",):
            share += (
                "; formulas are compared as they are written, unless math-verify is there: "
                'pip install "lowmem-grpo[tasks]"'
            )
        return share

    @classmethod
    def of(cls, parts: Iterable[AnswerKinds]) -> AnswerKinds:
        """Of several columns together."""
        whole = cls()
        for part in parts:
            whole._counts += part._counts
            whole._several += part._several
            whole._long = whole._long or part._long
        return whole
