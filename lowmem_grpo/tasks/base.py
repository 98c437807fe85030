"""What a problem is and what a task offers: the contract between `tasks/` and everything behind it.

A task is read by position. `train_problem(index)` depends on (task seed, index) and on nothing that
happened before, so a resumed run needs no more than its counter. Which problems are held out
depends on their content and never on the seed: a model trained with one seed can be evaluated under
another without meeting a problem that it was trained on.
"""

from __future__ import annotations

import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any

from lowmem_grpo.errors import TaskError, nearest
from lowmem_grpo.isolation.worker import Failure

HELD_OUT_ONE_IN = 5


@dataclass(frozen=True)
class Problem:
    """One question with its answer.

    id: names the problem in logs and errors; the same problem has the same id in every run.
    messages: the prompt as chat messages, each `{"role": str, "content": str}`.
    answer: the reference answer as text, or a list of texts of which any is right; empty where a
        task can score without one.
    fields: every other column that a reward may want, by name; JSON values, since groups are saved.
    """

    id: str
    messages: tuple[dict[str, Any], ...]
    answer: str | list[str]
    fields: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class TaskOptions:
    """Settings that are not part of a task's specification.

    system_prompt: put before every prompt that does not bring a system message of its own.
    few_shot: so many solved training problems stand before every question.
    path: the file of `gsm8k`, or of `records` without a path of its own.
    prompt_column, answer_column: the columns of `records:PATH`; a nested one by a dotted name, like
        reward_model.ground_truth.
    eval_fraction: the part of the rows of `records:PATH` that is held out, at least 0 and below 1.
    eval_path: a file of held-out problems for `records:PATH`; `eval_fraction` is then not used.
    shuffle: records are read in a new order in each epoch, and not in the file's.
    """

    system_prompt: str | None = None
    few_shot: int = 0
    path: str | None = None
    prompt_column: str = "prompt"
    answer_column: str = "answer"
    eval_fraction: float = 0.1
    eval_path: str | None = None
    shuffle: bool = True


class Task(ABC):
    """Where problems come from, and how their answers are checked.

    name: the task as it is shown in logs.
    default_rewards: reward specifications for a user who names none; empty where no reward of ours
        can read the answers.
    """

    name: str
    default_rewards: tuple[str, ...]

    @abstractmethod
    def train_problem(self, index: int) -> Problem:
        """The training problem at `index` (0 or more, without end), a pure function of (task seed,
        index).
        """

    @abstractmethod
    def eval_problems(self, count: int) -> list[Problem]:
        """The first `count` held-out problems, none of them twice and none ever trained on.

        Always the same ones, whatever the seed. Shorter than `count` where the task does not have
        so many.
        """

    @abstractmethod
    def is_correct_strict(self, problem: Problem, text: str) -> bool:
        """Whether the completion `text` is right and in the form that was asked for."""

    @abstractmethod
    def is_correct_lenient(self, problem: Problem, text: str) -> bool:
        """Whether the right answer can be found in the completion `text`, whatever surrounds it."""

    def score(self, problem: Problem, text: str) -> float | Failure:
        """The task's own score of a completion, the reward `task`: 1.0 where it is strictly
        correct, else 0.0. A scorer that runs in a child process may fail.
        """
        return float(self.is_correct_strict(problem, text))

    def reply(self, problem: Problem) -> str:
        """A right completion in the form that is asked for, as a solved example shows it; empty
        where none is known.
        """
        return problem.answer if isinstance(problem.answer, str) else problem.answer[0]

    def explain(self, problem: Problem, text: str) -> str:
        """What was read out of a completion and what was wanted, in one line."""
        score = self.score(problem, text)
        if isinstance(score, Failure):
            return score.message
        return f"{self.name} gives {score:g}, wanted {problem.answer!r:.60}"

    def about_answers(self) -> str:
        """What the answers are and which of them the default reward reads, in one line; empty where
        they are all of one kind by design.
        """
        return ""

    def leaving_out(self, stays: Callable[[Problem], bool]) -> Task:
        """The task with those of its problems alone that `stays` is true of; held-out ones stay
        held out. Raises `TaskError` where none is left to train on.

        Here for tasks that make problems without end: others are made in the place of some.
        """
        from lowmem_grpo.tasks.replacing import Replacing

        return Replacing(self, stays)

    def left_out(self) -> str:
        """How many problems are left out, of how many; empty where none can be."""
        return ""

    def known_answers(self) -> Iterable[tuple[str, str | list[str]]]:
        """(where, answer) of the answers that can be looked at before training: all of them, or a
        first example.
        """
        problem = self.train_problem(0)
        yield problem.id, problem.answer


def held_out(task: Task, count: int) -> list[Problem]:
    """The first `count` held-out problems of a task, at least one. Raises `TaskError` where it has
    none.
    """
    problems = task.eval_problems(count)
    if not problems:
        raise TaskError(
            f"{task.name} holds out no problem to evaluate on, as a file does whose prompts are "
            "all the same or too long: give other ones with --set task.eval_path=FILE, or do "
            "without (--eval-every 0)"
        )
    return problems


def chat(question: str, system_prompt: str | None) -> tuple[dict[str, str], ...]:
    """`question` as the messages of a chat, after the system prompt if there is one."""
    user = {"role": "user", "content": question}
    return (
        ({"role": "system", "content": system_prompt}, user)
        if system_prompt is not None
        else (user,)
    )


def numbers_held_out(task: str, numbers: Iterable[int]) -> bool:
    """Whether problems of a generated task that are made of these numbers are held out, in whatever
    order they stand: one set in `HELD_OUT_ONE_IN` is.
    """
    return stable_hash(f"{task} held out", *sorted(numbers)) % HELD_OUT_ONE_IN == 0


def plain(value: Any) -> Any:
    """`value` with everything in it that JSON does not know turned into text: dates, decimals,
    bytes, numbers that are not finite.
    """
    if value is None or isinstance(value, (str, bool, int)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, bytes):
        return value.decode("utf-8", "backslashreplace")
    if isinstance(value, Decimal):
        return format(value, "f")
    return value.isoformat() if hasattr(value, "isoformat") else str(value)


def stable_hash(*parts: int | str) -> int:
    """A 64-bit hash that is the same in every process, Python version and machine, which `hash()`
    is not.
    """
    # repr keeps the parts apart: ("ab", "c") and ("a", "bc") differ, and so do 1 and "1". Lone
    # surrogates come with JSON escapes and must not stop the hash.
    text = repr(parts).encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big")


def permuted(position: int, size: int, key: int) -> int:
    """Where `position` goes in the permutation of `range(size)` that belongs to `key`.

    A Feistel network of four rounds permutes the smallest square of a power of two that holds
    `size`; a value beyond `size` is sent through again until it falls inside (cycle walking), which
    keeps it a permutation (Black and Rogaway 2002, "Ciphers with arbitrary finite domains", method
    2).
    """
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    while True:
        left, right = position >> half, position & mask
        for round_number in range(4):
            left, right = right, left ^ (stable_hash(key, round_number, right) & mask)
        position = left << half | right
        if position < size:
            return position


def parse_options(text: str, known: Iterable[str], task: str) -> dict[str, str]:
    """`"a=1,b=2"` as a dictionary of texts.

    Raises `TaskError` for an option that is not in `known`, is given twice or has no value.
    """
    known = list(known)
    options: dict[str, str] = {}
    for part in filter(None, (piece.strip() for piece in text.split(","))):
        key, equals, value = (piece.strip() for piece in part.partition("="))
        if key not in known:
            raise TaskError(
                f"task '{task}' has no option '{key}'{nearest(key, known)}; "
                f"it has: {', '.join(known)}"
            )
        if not equals or not value:
            raise TaskError(f"option '{key}' of task '{task}' needs a value: write {key}=VALUE")
        if key in options:
            raise TaskError(f"option '{key}' of task '{task}' is given twice")
        options[key] = value
    return options


def whole_number(
    chosen: dict[str, str], key: str, task: str, *, default: int, low: int, high: int
) -> int:
    """The option `key` of `task` as a number from `low` to `high`. Raises `TaskError`."""
    text = chosen.get(key, str(default))
    if not text.isascii() or not text.isdigit() or not low <= int(text) <= high:
        raise TaskError(f"{task}: {key}={text}: use a whole number from {low} to {high}")
    return int(text)
