"""The task `records:PATH`: problems from a jsonl, CSV or parquet file with a prompt and an answer
column, or from a data set of the Hub (`records:hub:OWNER/NAME`, see `hub.py`).

An answer may be a worked solution that ends in "#### 72" or has its answer in \\boxed{}, and a
list of answers any of which is right. A column inside another one has a dotted name, such as
reward_model.ground_truth. `answer_kinds.py` says which reward the answers get by default.

The whole file is checked when the task is made. Which rows are held out follows from a hash of the
prompt, so rows with the same prompt are on the same side, and a row stays on its side when the file
grows or the seed changes. An epoch is a permutation of the training rows that belongs to (seed,
epoch); it is computed position by position and never stored. With `task.shuffle = false` every
epoch has the order of the file.
"""

from __future__ import annotations

import json
import math
from array import array
from collections.abc import Callable, Iterable
from typing import Any

from lowmem_grpo.errors import TaskError
from lowmem_grpo.isolation.worker import Failure
from lowmem_grpo.tasks.answer_kinds import AnswerKinds
from lowmem_grpo.tasks.answers import (
    Answer,
    Verdict,
    contains_answer,
    equals_answer,
    explained,
    final_answer,
    judge,
)
from lowmem_grpo.tasks.base import Problem, Task, TaskOptions, permuted, plain, stable_hash
from lowmem_grpo.tasks.columns import ABSENT, answer_of, dotted_names, lookup, meant, names_in
from lowmem_grpo.tasks.hub import PREFIX, open_hub
from lowmem_grpo.tasks.messages import after_system, prefilled, read_messages
from lowmem_grpo.tasks.tables import Table, open_table

# Columns with what belongs to a prompt besides its text, as data sets name them.
_SEEN_OR_HEARD = ("image", "images", "video", "videos", "audio", "audios")


class Records(Task):
    """See the module. Raises `TaskError` for a file that cannot be used, naming the row and the
    column.

    num_train, num_eval: how many rows are on either side.
    num_excluded: training rows left out because `eval_path` has the same prompt.
    `table`: its rows in the place of the file's.
    """

    def __init__(
        self, path: str, *, seed: int, options: TaskOptions, table: Table | None = None
    ) -> None:
        path = path or options.path or ""
        if not path:
            raise TaskError(
                "records needs a file: write records:PATH, like records:problems.jsonl or "
                "records:hub:OWNER/NAME"
            )
        if not 0 <= options.eval_fraction < 1:
            raise TaskError(
                f"task.eval_fraction = {options.eval_fraction}: use a number from 0 to below 1"
            )
        self.name = f"records:{path}"
        self._seed = seed
        self._shuffle = options.shuffle
        self._left_out = ""
        source = _Source(path, options, table)
        if options.eval_path:
            self._eval_source = _Source(options.eval_path, options)
            held = set(self._eval_source.hashes)
        else:
            self._eval_source = source
            held = _held_out(source.hashes, options.eval_fraction)
        self._source = source
        # Of held-out rows with the same prompt the first counts; training takes them all.
        first = {h: i for i, h in reversed(list(enumerate(self._eval_source.hashes))) if h in held}
        self._eval_rows = array("Q", sorted(first.values()))
        self._train_rows = array("Q", (i for i, h in enumerate(source.hashes) if h not in held))
        self.num_train, self.num_eval = len(self._train_rows), len(self._eval_rows)
        self.num_excluded = len(source) - self.num_train if options.eval_path else 0
        if not self._train_rows:
            raise TaskError(
                f"{path}: no row is left to train on, {options.eval_path} has every prompt of it"
            )
        sources = dict.fromkeys((source, self._eval_source))
        self._kinds = AnswerKinds.of(each.kinds for each in sources)
        self.default_rewards = self._kinds.default()

    def train_problem(self, index: int) -> Problem:
        """See `Task`. Every training row comes once in an epoch."""
        epoch, position = divmod(index, self.num_train)
        if self._shuffle:
            key = stable_hash("epoch", self._seed, epoch)
            position = permuted(position, self.num_train, key)
        return self._asked(self._source.problem(self._train_rows[position]))

    def eval_problems(self, count: int) -> list[Problem]:
        """See `Task`. In an order of its own, which mixes the file."""
        rows = self._eval_rows
        order = (permuted(i, len(rows), stable_hash("eval")) for i in range(min(count, len(rows))))
        return [self._asked(self._eval_source.problem(rows[place])) for place in order]

    def leaving_out(self, stays: Callable[[Problem], bool]) -> Records:
        """See `Task`: this one. Every row is looked at."""

        def left(source: _Source, rows: array) -> array:
            return array("Q", (i for i in rows if stays(self._asked(source.problem(i)))))

        self._train_rows = left(self._source, self._train_rows)
        self._eval_rows = left(self._eval_source, self._eval_rows)
        train, held = len(self._train_rows), len(self._eval_rows)
        self._left_out = (
            f"{self.num_train - train} of {self.num_train} training problems and "
            f"{self.num_eval - held} of {self.num_eval} held-out ones"
        )
        if not train:
            raise TaskError(
                f"{self.name}: none of its {self.num_train} training problems has a prompt that is "
                "short enough: use a larger --max-prompt-length"
            )
        self.num_train, self.num_eval = train, held
        return self

    def left_out(self) -> str:
        """See `Task`."""
        return self._left_out

    def _asked(self, problem: Problem) -> Problem:
        """A row's problem as it is asked."""
        return problem

    def is_correct_strict(self, problem: Problem, text: str) -> bool:
        """The completion is the answer and nothing more, behind what the prompt has of it; a full
        stop may follow. Where the reference is a worked solution, so may the completion be, with an
        end like it.
        """
        own = text.removeprefix(prefilled(problem.messages))
        return any(_is_strictly(text, own, answer) for answer in _several(problem.answer))

    def is_correct_lenient(self, problem: Problem, text: str) -> bool:
        """The completion gives the answer, as `answers.py` reads it, or has it as words."""
        return contains_answer(text, problem.answer)

    def score(self, problem: Problem, text: str) -> float | Failure:
        """1.0 where the completion gives the answer, as `answers.py` reads it, else 0.0."""
        return float(self._judged(problem, text).right)

    def explain(self, problem: Problem, text: str) -> str:
        """See `Task`."""
        return explained(self._judged(problem, text), problem.answer)

    def _judged(self, problem: Problem, text: str) -> Verdict:
        """Of the text, or of the completion's own part, where that alone is the answer."""
        verdict = judge(text, problem.answer)
        own = text.removeprefix(prefilled(problem.messages))
        return verdict if verdict.right or own == text else judge(own, problem.answer)

    def about_answers(self) -> str:
        """See `Task`."""
        return self._kinds.line()

    def known_answers(self) -> Iterable[tuple[str, Answer]]:
        """See `Task`: of all rows."""
        for source in dict.fromkeys((self._source, self._eval_source)):
            yield from source.answers()


class _Source:
    """One checked file, read as problems. `hashes` has one hash a row, of its prompt; `kinds` are
    those of the answers.
    """

    def __init__(self, path: str, options: TaskOptions, table: Table | None = None) -> None:
        self._path = path
        self._options = options
        if table is None:
            table = open_hub(path) if path.startswith(PREFIX) else open_table(path)
        self._table: Table = table
        for setting in ("prompt_column", "answer_column"):
            self._check_column(setting, getattr(options, setting))
        self.hashes = array("Q")
        self.kinds = AnswerKinds()
        for number in range(len(self)):
            row = self._table.row(number)
            self._check_text_alone(number, row)
            messages = self._messages(number, row)
            self.hashes.append(stable_hash(json.dumps(messages, sort_keys=True)))
            self.kinds.add(self._answer(number, row), self._table.where(number))

    def __len__(self) -> int:
        return len(self._table)

    def problem(self, number: int) -> Problem:
        row = self._table.row(number)
        messages = self._messages(number, row)
        # The answer column keeps its own name too: a reward written for this file may ask for it.
        fields = {
            name: plain(value)
            for name, value in row.items()
            if name not in ("answer", self._options.prompt_column)
        }
        return Problem(
            id=f"{self._path}/{self._table.where(number)}",
            messages=after_system(messages, self._options.system_prompt),
            answer=self._answer(number, row),
            fields=fields,
        )

    def answers(self) -> Iterable[tuple[str, Answer]]:
        for number in range(len(self)):
            where = f"{self._path}, {self._table.where(number)}"
            yield where, self._answer(number, self._table.row(number))

    def _check_column(self, setting: str, column: str) -> None:
        first = self._table.row(0)
        if column not in self._table.columns and lookup(first, column) is ABSENT:
            raise TaskError(
                f"{self._path} has no column '{column}'{meant(column, first)}; it has: "
                f"{names_in(first)}. Choose one with task.{setting}{self._table.hint}"
            )

    def _cell(self, number: int, row: dict[str, Any], column: str) -> Any:
        value = lookup(row, column)
        if value is ABSENT:
            self._fail(number, f"has no '{column}'{meant(column, row)}, only: {names_in(row)}")
        nothing = value is None or value == [] or (isinstance(value, str) and not value.strip())
        if nothing or (isinstance(value, float) and not math.isfinite(value)):
            self._fail(number, f"has {value!r} as its '{column}'")
        return value

    def _check_text_alone(self, number: int, row: dict[str, Any]) -> None:
        for name in _SEEN_OR_HEARD:
            if row.get(name):
                self._fail(
                    number,
                    f"comes with something in '{name}' that no model is shown: text alone is "
                    "trained on; leave the row out, or that column where it does not matter",
                )

    def _messages(self, number: int, row: dict[str, Any]) -> tuple[dict[str, Any], ...]:
        column = self._options.prompt_column
        prompt = self._cell(number, row, column)
        try:
            # Bytes are text where they are: a prompt is not guessed at.
            text = prompt.decode() if isinstance(prompt, bytes) else plain(prompt)
            return read_messages(text)
        except ValueError as error:
            self._fail(number, f"cannot be used: its '{column}': {error}")

    def _answer(self, number: int, row: dict[str, Any]) -> Answer:
        column = self._options.answer_column
        value = self._cell(number, row, column)
        try:
            return answer_of(value)
        except ValueError as error:
            way = "leave the row out, or choose another column with task.answer_column"
            if isinstance(value, dict) and value:
                first = next(dotted_names(value))
                way = f"choose one of them, like task.answer_column={column}.{first}"
            self._fail(number, f"{error} as its '{column}': {way}")

    def _fail(self, number: int, what: str) -> None:
        raise TaskError(f"{self._path}, {self._table.where(number)} {what}")


def _several(answer: Answer) -> list[str]:
    return [answer] if isinstance(answer, str) else answer


def _is_strictly(text: str, own: str, answer: str) -> bool:
    wanted = final_answer(answer)
    return equals_answer(own if wanted == answer.strip() else final_answer(text), wanted)


def _held_out(hashes: Iterable[int], fraction: float) -> set[int]:
    """The hashes on the held-out side: those in the lowest `fraction` of the range of hashes.

    A small file can fall on one side as a whole. Then the lowest hash alone is held out, or the
    highest alone is trained on; a file with one prompt has nothing to hold out.
    """
    different = sorted(set(hashes))
    if fraction == 0 or len(different) == 1:
        return set()
    held = {value for value in different if value < fraction * 2**64}
    return (held or {different[0]}) - {different[-1]}
