"""The generated task `countdown[:numbers=3-4,max=99,target=100]`: reach a number from others.

A problem has three or four numbers from 1 to `max`; all of them, each once, are to be combined with
+ - * / and parentheses into `target` or less. Problems are made backwards, from a solution whose
steps are whole and positive, so each has one; any other counts as well. The expression is asked for
in <answer></answer>.

One set of numbers in five is held out, by a hash of the numbers in sorted order: no target and no
seed brings it into training.

The task's own score is 1.0 for a right expression, and 0.1 for one in the tags that uses the right
numbers and misses the target: form has its reward where no solution is found yet.
"""

from __future__ import annotations

import re
from collections import Counter
from typing import NamedTuple

from lowmem_grpo.errors import TaskError
from lowmem_grpo.tasks.answers import last_tagged
from lowmem_grpo.tasks.base import (
    Problem,
    Task,
    TaskOptions,
    chat,
    numbers_held_out,
    parse_options,
    stable_hash,
    whole_number,
)
from lowmem_grpo.tasks.expressions import Expression, last_expression, parse_expression

FORM_SCORE = 0.1
_RANGE = re.compile(r"([2-6])(?:-([2-6]))?")
# Draws without a new problem that say that there are no more.
_STALL = 10_000


class _Drawn(NamedTuple):
    numbers: tuple[int, ...]
    target: int
    solution: str


class Countdown(Task):
    """See the module. Raises `TaskError` for options that are out of range."""

    default_rewards = ("task",)

    def __init__(self, spec_options: str, *, seed: int, options: TaskOptions) -> None:
        chosen = parse_options(spec_options, ("numbers", "max", "target"), "countdown")
        self.name = f"countdown:{spec_options}" if spec_options else "countdown"
        span = _RANGE.fullmatch(chosen.get("numbers", "3-4"))
        if span is None or (span[2] or span[1]) < span[1]:
            raise TaskError(
                f"countdown: numbers={chosen['numbers']}: use how many there are, from 2 to 6, "
                "like numbers=3 or numbers=3-4"
            )
        self._fewest, self._most = int(span[1]), int(span[2] or span[1])
        self._max = whole_number(chosen, "max", "countdown", default=99, low=9, high=999)
        # Of large numbers next to none give a small target, and a draw would take its time.
        low = max(10, self._max // 10)
        self._target = whole_number(chosen, "target", "countdown", default=100, low=low, high=9999)
        self._seed = seed
        self._system_prompt = options.system_prompt

    def train_problem(self, index: int) -> Problem:
        """See `Task`. Drawn with repeats."""
        attempt = 0
        while True:
            drawn = self._draw("train", self._seed, index, attempt)
            if drawn and not numbers_held_out("countdown", drawn.numbers):
                return self._problem(drawn)
            attempt += 1

    def eval_problems(self, count: int) -> list[Problem]:
        """See `Task`."""
        found: dict[tuple, Problem] = {}
        position = last = 0
        while len(found) < count and position - last < _STALL:
            drawn = self._draw("eval", position)
            position += 1
            if drawn and numbers_held_out("countdown", drawn.numbers):
                key = (*sorted(drawn.numbers), drawn.target)
                if key not in found:
                    found[key], last = self._problem(drawn), position
        return list(found.values())

    def is_correct_strict(self, problem: Problem, text: str) -> bool:
        """The last <answer></answer> has an expression that uses every number once and is the
        target; "= target" may follow it.
        """
        return _reaches(problem, _tagged(problem, text))

    def is_correct_lenient(self, problem: Problem, text: str) -> bool:
        """As strict, or the last expression in the text is right."""
        return self.is_correct_strict(problem, text) or _reaches(problem, last_expression(text))

    def score(self, problem: Problem, text: str) -> float:
        """1.0 where it is strictly correct, 0.1 where only the target is missed, else 0.0."""
        expression = _tagged(problem, text)
        if _reaches(problem, expression):
            return 1.0
        return FORM_SCORE if _uses_the_numbers(problem, expression) else 0.0

    def reply(self, problem: Problem) -> str:
        """The solution that the problem was made from, in its tags."""
        return f"<answer>{problem.answer}</answer>"

    def _draw(self, *key: int | str) -> _Drawn | None:
        """Numbers and a way to combine them; None where that way leads to no target."""
        count = self._fewest + stable_hash(*key, "count") % (self._most - self._fewest + 1)
        numbers = tuple(1 + stable_hash(*key, "number", i) % self._max for i in range(count))
        terms = [(number, str(number)) for number in numbers]
        for step in range(count - 1):
            choice, place = divmod(stable_hash(*key, "first", step), len(terms))
            first = terms.pop(place)
            second = terms.pop(stable_hash(*key, "second", step) % len(terms))
            joined = _join(*sorted((first, second), reverse=True), choice % 4)
            if joined is None:
                return None
            terms.append(joined)
        ((target, solution),) = terms
        return _Drawn(numbers, target, solution[1:-1]) if target <= self._target else None

    def _problem(self, drawn: _Drawn) -> Problem:
        listed = ", ".join(map(str, drawn.numbers))
        question = (
            f"Make {drawn.target} from the numbers {listed}. Use each of them exactly once, with "
            "+ - * / and parentheses, and give the expression in <answer></answer>, like "
            "<answer>(1 + 2) * 3</answer>."
        )
        return Problem(
            id=f"countdown/{'-'.join(map(str, drawn.numbers))}/{drawn.target}",
            messages=chat(question, self._system_prompt),
            answer=drawn.solution,
            fields={"numbers": list(drawn.numbers), "target": drawn.target},
        )


def _join(larger: tuple[int, str], smaller: tuple[int, str], op: int) -> tuple[int, str] | None:
    """One operation between two terms, in parentheses; None where the result is not a positive
    whole number.
    """
    (a, first), (b, second) = larger, smaller
    if (op == 1 and a == b) or (op == 3 and a % b):
        return None
    value = (a + b, a - b, a * b, a // b)[op]
    return value, f"({first} {'+-*/'[op]} {second})"


def _tagged(problem: Problem, text: str) -> Expression | None:
    tagged = last_tagged(text)
    if tagged is None:
        return None
    left, equals, right = tagged.partition("=")
    if equals and right.strip() != str(problem.fields["target"]):
        return None
    return parse_expression(left)


def _uses_the_numbers(problem: Problem, expression: Expression | None) -> bool:
    wanted = Counter(problem.fields["numbers"])
    return expression is not None and Counter(expression.numbers) == wanted


def _reaches(problem: Problem, expression: Expression | None) -> bool:
    return _uses_the_numbers(problem, expression) and expression.value == problem.fields["target"]
