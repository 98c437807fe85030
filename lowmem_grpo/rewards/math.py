"""The reward `math`: 1.0 where the completion gives the wanted answer, as `tasks/answers.py` reads
it, or one that math-verify finds mathematically equal; else 0.0.

math-verify is asked of formulas alone: it takes words for products of letters, and a plain number
is compared exactly without it. Decimals are handed to it as fractions, so that 3.141593 is not pi.

math-verify's own time limit is an alarm signal: it works in the main thread only, takes the alarm
away from anyone else, and cannot interrupt one long operation on integers. So it is switched off,
and the comparison runs in a child process (`isolation/worker.py`) that is ended after `LIMIT_S`
seconds; the completion then has no score.
"""

from __future__ import annotations

import functools
import importlib.util
import re
from collections.abc import Callable
from typing import Any

from lowmem_grpo.errors import ConfigError, RewardError
from lowmem_grpo.isolation.worker import Failure, Worker, WorkerSetupError
from lowmem_grpo.rewards.isolated import Values
from lowmem_grpo.tasks.answers import (
    Answer,
    accepted,
    candidates,
    explained,
    is_formula,
    judge,
    kind_of,
    parse_number,
)
from lowmem_grpo.tasks.base import Problem
from lowmem_grpo.tasks.spelling import one_spelling

LIMIT_S = 5.0
_MOST_PARTS = 3
_OPERATION = re.compile(r"[0-9)}]\s{0,3}(?:[-+*\u00d7\u00f7]|\()\s{0,3}[0-9({\\-]")
_DECIMAL = re.compile(r"(?<![\w.,])([0-9]{1,30})?\.([0-9]{1,30})(?![\w.])|\\%")


class MathReward:
    """The reward function. Raises `ConfigError` where math-verify is not installed."""

    name = "math"

    def __init__(self) -> None:
        if importlib.util.find_spec("math_verify") is None:
            raise ConfigError(
                "reward 'math' needs the package math-verify: pip install \"lowmem-grpo[tasks]\""
            )
        self._worker = Worker("lowmem_grpo.rewards.math:make_comparison", {})

    def __call__(self, completions: list[str], answer: list[Answer], **_: Any) -> Values:
        """Raises `RewardError` where math-verify cannot be loaded."""
        try:
            self._worker.start()
        except WorkerSetupError as error:
            raise RewardError(f"reward 'math' could not start: {error}") from error
        return [
            self._one(completion, wanted)
            for completion, wanted in zip(completions, answer, strict=True)
        ]

    def explain(self, completion: str, problem: Problem) -> str:
        """What was read out of a completion and what was wanted, in one line."""
        verdict = judge(completion, problem.answer)
        line = explained(verdict, problem.answer)
        pairs = [] if verdict.right else _to_verify(completion, problem.answer)
        if not pairs:
            return line
        value = self._verified(pairs)
        if isinstance(value, Failure):
            return f"{line}; math-verify: {value.message}"
        return f"{line}; to math-verify {'the same' if value else 'not the same'}"

    def _one(self, completion: str, answer: Answer) -> float | Failure:
        if judge(completion, answer).right:
            return 1.0
        return self._verified(_to_verify(completion, answer))

    def _verified(self, pairs: list[tuple[str, str]]) -> float | Failure:
        found: float | Failure = 0.0
        for part, wanted in pairs:
            value = self._worker.score({"completion": part, "answer": wanted}, LIMIT_S)
            if value == 1.0 or isinstance(value, Failure):
                return value
        return found


def _to_verify(completion: str, answer: Answer) -> list[tuple[str, str]]:
    """The pairs of a part of a completion and an answer that may be equal by mathematics."""
    parts = [each.text for each in candidates(completion)][-_MOST_PARTS:]
    pairs = []
    for wanted in accepted(answer):
        kind = kind_of(wanted)
        for part in dict.fromkeys(reversed(parts)):
            # A number is compared exactly without it, and 3*24 is no answer but the question again.
            formula = is_formula(part) and not (kind == "number" and _is_a_sum(part))
            if (kind == "number" and formula) or (
                kind == "formula" and (formula or parse_number(part) is not None)
            ):
                pairs.append((part, wanted))
    return pairs


def _is_a_sum(text: str) -> bool:
    """Whether a text is arithmetic with numbers that is left to do."""
    return _OPERATION.search(one_spelling(text)) is not None


def make_comparison() -> Callable[[str, str], float]:
    """The child's side: 1.0 where `completion` equals `answer`."""
    from math_verify import parse, verify

    @functools.lru_cache(maxsize=64)
    def read(formula: str) -> list:
        # Bare TeX is only read between dollar signs: without them 1+x^2 is its last number, 2.
        return parse(f"${_exact(formula)}$", parsing_timeout=None)

    def compare(completion: str, answer: str) -> float:
        return float(verify(read(answer), read(completion), timeout_seconds=None))

    return compare


def _exact(formula: str) -> str:
    """A formula with fractions for its decimals, and without what surrounds it and percent signs.

    math-verify rounds where there is a decimal, to six places.
    """
    for mark in ("$", r"\(", r"\)", r"\[", r"\]"):
        formula = formula.replace(mark, " ")
    return _DECIMAL.sub(_fraction, formula.strip().rstrip("."))


def _fraction(match: re.Match[str]) -> str:
    if match[2] is None:
        return ""
    return rf"\frac{{{match[1] or ''}{match[2]}}}{{1{'0' * len(match[2])}}}"
