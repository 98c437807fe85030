"""The embedded task `arithmetic[:digits=N,ops=+-*,terms=N]`: plain questions with one number as
their answer.

Operands have exactly `digits` digits (0 to 9 for one digit). The possible problems can be few:
there are a hundred one-digit sums. So one set of operands in five is held out, by a hash of the
operands in sorted order: 3 + 4 and 4 + 3 are on the same side, under every operation, and no seed
changes the side.
"""

from __future__ import annotations

from itertools import product

from lowmem_grpo.errors import TaskError
from lowmem_grpo.tasks.answers import contains_answer, equals_text
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

# Up to this many problems the held-out ones are listed in full; above, draws seldom repeat.
_LISTABLE = 50_000
_MAX_TERMS = 8


class Arithmetic(Task):
    """See the module. Raises `TaskError` for options that are out of range."""

    default_rewards = ("number",)

    def __init__(self, spec_options: str, *, seed: int, options: TaskOptions) -> None:
        chosen = parse_options(spec_options, ("digits", "ops", "terms"), "arithmetic")
        self.name = f"arithmetic:{spec_options}" if spec_options else "arithmetic"
        self._digits = whole_number(chosen, "digits", "arithmetic", default=1, low=1, high=6)
        self._terms = whole_number(chosen, "terms", "arithmetic", default=2, low=2, high=_MAX_TERMS)
        self._ops = chosen.get("ops", "+")
        if set(self._ops) - set("+-*") or len(set(self._ops)) != len(self._ops):
            raise TaskError(
                f"arithmetic: ops={self._ops}: use + - * at most once each, like ops=+-"
            )
        self._seed = seed
        self._system_prompt = options.system_prompt
        self._low = 0 if self._digits == 1 else 10 ** (self._digits - 1)
        self._span = 10**self._digits - self._low

    def train_problem(self, index: int) -> Problem:
        """See `Task`. Drawn with repeats."""
        attempt = 0
        while True:
            operands, ops = self._draw("train", self._seed, index, attempt)
            if not numbers_held_out("arithmetic", operands):
                return self._problem(operands, ops)
            attempt += 1

    def eval_problems(self, count: int) -> list[Problem]:
        """See `Task`. The problems are listed in full where they are few."""
        size = self._span**self._terms * len(self._ops) ** (self._terms - 1)
        return self._listed(count) if size <= _LISTABLE else self._drawn(count)

    def is_correct_strict(self, problem: Problem, text: str) -> bool:
        """The reply ends with the number, written as Python writes it; a full stop may follow."""
        words = text.split()
        return bool(words) and equals_text(words[-1], problem.answer)

    def is_correct_lenient(self, problem: Problem, text: str) -> bool:
        """The last number in the text is the answer."""
        return contains_answer(text, problem.answer)

    def _draw(self, *key: int | str) -> tuple[tuple[int, ...], tuple[str, ...]]:
        # The remainder of a 64-bit hash by at most 10**6 is even to one part in 10**13.
        operands = tuple(
            self._low + stable_hash(*key, "operand", term) % self._span
            for term in range(self._terms)
        )
        ops = tuple(
            self._ops[stable_hash(*key, "op", term) % len(self._ops)]
            for term in range(self._terms - 1)
        )
        return operands, ops

    def _listed(self, count: int) -> list[Problem]:
        numbers = range(self._low, self._low + self._span)
        held = [
            (operands, ops)
            for operands in product(numbers, repeat=self._terms)
            if numbers_held_out("arithmetic", operands)
            for ops in product(self._ops, repeat=self._terms - 1)
        ]
        held.sort(key=lambda pair: stable_hash("order", *pair[0], *pair[1]))
        return [self._problem(*pair) for pair in held[:count]]

    def _drawn(self, count: int) -> list[Problem]:
        found: dict[tuple, Problem] = {}
        position = 0
        # In a space this large a hundred draws for each problem asked for are ample, unless more
        # are asked for than there are; then the list ends short, as `Task` says.
        while len(found) < count and position < 100 * count:
            operands, ops = self._draw("eval", position)
            if numbers_held_out("arithmetic", operands):
                found.setdefault((operands, ops), self._problem(operands, ops))
            position += 1
        return list(found.values())

    def _problem(self, operands: tuple[int, ...], ops: tuple[str, ...]) -> Problem:
        expression = str(operands[0]) + "".join(
            f" {op} {n}" for op, n in zip(ops, operands[1:], strict=True)
        )
        return Problem(
            id=f"arithmetic/{expression.replace(' ', '')}",
            messages=chat(f"{expression} = ? End with the result.", self._system_prompt),
            answer=str(_value(operands, ops)),
            fields={"expression": expression, "operands": list(operands), "ops": list(ops)},
        )


def _value(operands: tuple[int, ...], ops: tuple[str, ...]) -> int:
    """The usual precedence: products first, then from left to right."""
    total, product_so_far = 0, operands[0]
    for op, operand in zip(ops, operands[1:], strict=True):
        if op == "*":
            product_so_far *= operand
        else:
            total += product_so_far
            product_so_far = operand if op == "+" else -operand
    return total + product_so_far
