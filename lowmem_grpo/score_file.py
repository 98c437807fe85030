"""Given completions -> rewards, as training would score them: no model, no torch.

The file has a row for each completion, and the columns that a training file has; a prompt is not
needed. Every reward is called once with all rows, or where rows have a `step`, as rollouts.jsonl of
a run has, once for each step, as training did.

A row without an answer, which training would refuse, has 0 of every reward that compares answers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from itertools import groupby
from typing import Any

from lowmem_grpo.config import Config
from lowmem_grpo.errors import ConfigError, nearest
from lowmem_grpo.isolation.confine import Limits
from lowmem_grpo.isolation.output import Output
from lowmem_grpo.rewards import Reward, is_model, load_rewards
from lowmem_grpo.rewards.base import score
from lowmem_grpo.tasks import Problem, Task, TaskOptions
from lowmem_grpo.tasks.columns import ABSENT, lookup
from lowmem_grpo.tasks.hub import PREFIX, open_hub
from lowmem_grpo.tasks.records import Records
from lowmem_grpo.tasks.tables import Table, open_table

__all__ = ["NO_ANSWER", "Given", "Scored", "open_given_rewards", "read_given", "score_given"]

NO_ANSWER = "no answer to compare"
_NO_PROMPT = "(no prompt)"
_WITHOUT_ANSWERS = ("format", "json", "code", "overlong", "repetition")


@dataclass(frozen=True)
class Given:
    """The rows of a file: completions, the problems that they answer, whether those have an answer,
    and whole rows. `task`: of the rows that have one, or None where no row has. `lines`: what there
    is to say.
    """

    completions: list[str]
    problems: list[Problem]
    answered: list[bool]
    rows: list[dict[str, Any]]
    places: list[str]
    task: Task | None
    lines: list[str]


@dataclass(frozen=True)
class Scored:
    """A completion's values by reward, None where there is none, and why they are what they are."""

    values: dict[str, float | None]
    why: dict[str, str]
    total: float


class _Rows(Table):
    """Rows `numbers` of a table, with a prompt where they have none, and without completions."""

    def __init__(self, table: Table, numbers: Sequence[int], completion: str, prompt: str | None):
        self._table, self._numbers = table, numbers
        self._completion, self._prompt = completion, prompt
        self.columns = [*table.columns, *([prompt] if prompt else [])]
        self.columns.remove(completion)
        self.hint = table.hint

    def __len__(self) -> int:
        return len(self._numbers)

    def row(self, number: int) -> dict[str, Any]:
        row = dict(self._table.row(self._numbers[number]))
        row.pop(self._completion, None)
        return row | ({self._prompt: _NO_PROMPT} if self._prompt else {})

    def where(self, number: int) -> str:
        return self._table.where(self._numbers[number])


def read_given(config: Config, column: str) -> Given:
    """The rows of the file that `config.task` names, with completions in `column`. Raises TaskError
    as the task does, and ConfigError.
    """
    kind, _, path = config.task.name.partition(":")
    path = path or config.task.path or ""
    if kind != "records" or not path or " + " in path:
        raise ConfigError(
            f"score reads completions from a file, and the task is {config.task.name}: give "
            "--task records:FILE"
        )
    table = open_hub(path) if path.startswith(PREFIX) else open_table(path)
    answers, prompt = config.task.answer_column, config.task.prompt_column
    if column not in table.columns:
        raise ConfigError(
            f"{path} has no column '{column}'{nearest(column, table.columns)} with completions; it "
            f"has: {', '.join(table.columns)}. Choose one with --completion-column"
        )
    has_prompt = prompt in table.columns or "task.prompt_column" in config.sources
    rows = [table.row(number) for number in range(len(table))]
    completions = [
        _text(row.get(column), f"{path}, {table.where(i)}") for i, row in enumerate(rows)
    ]
    answered = [not _is_nothing(lookup(row, answers)) for row in rows]
    with_answer = [number for number, is_there in enumerate(answered) if is_there]
    options = TaskOptions(**{f.name: getattr(config.task, f.name) for f in fields(TaskOptions)})
    task, problems = None, {}
    if with_answer:
        task = _task(
            _Rows(table, with_answer, column, None if has_prompt else prompt), path, options
        )
        problems = {n: task.train_problem(i) for i, n in enumerate(with_answer)}
    for number, row in enumerate(rows):
        if number not in problems:
            place = f"{path}/{table.where(number)}"
            problems[number] = Problem(place, ({"role": "user", "content": _NO_PROMPT},), "", row)
    lines = []
    if task is not None and task.default_rewards and not config.rewards.functions:
        lines.append(task.about_answers())
    if missing := len(rows) - len(with_answer):
        lines.append(
            f"{missing} of {len(rows)} rows have no '{answers}': they score 0 where answers are "
            "compared (task.answer_column)"
        )
    lengths = [spec for spec in config.rewards.functions if _counts_tokens(spec)]
    if lengths and not all(isinstance(row.get("tokens"), int) for row in rows):
        lines.append(
            f"{', '.join(lengths)}: lengths are of words, since there is no tokenizer here"
        )
    return Given(
        completions,
        [problems[number] for number in range(len(rows))],
        answered,
        rows,
        [table.where(number) for number in range(len(rows))],
        task,
        lines,
    )


def open_given_rewards(given: Given, config: Config, output: Output) -> list[Reward]:
    """The rewards that training would take for these rows. `output`: takes what functions of the
    user print. Raises ConfigError, also for a reward model: it is not loaded here.
    """
    r = config.rewards
    for spec in filter(is_model, r.functions):
        raise ConfigError(f"score loads no model, and {spec} is a reward model: leave it out")
    task = given.task
    if task is None:
        others = [spec for spec in r.functions if not _compares(spec)]
        if not r.functions or others != r.functions:
            columns = ", ".join(given.rows[0])
            raise ConfigError(
                f"no row has an answer in '{config.task.answer_column}': choose its column with "
                f"--set task.answer_column=NAME (there are: {columns}), or give rewards that need "
                "none, like --reward format:REGEX"
            )
        task = _Unanswered(given.problems)
    limits = Limits(
        memory_bytes=int(r.memory_gib * 2**30), network=r.network, writable=tuple(r.writable)
    )
    return load_rewards(
        r.functions,
        r.weights,
        task,
        timeout=r.timeout,
        limits=limits,
        with_steps=r.step_separator is not None,
        conversation=config.rollout.max_prompt_length + config.rollout.max_completion_length,
        output=output,
    )


def score_given(given: Given, rewards: list[Reward], config: Config) -> list[Scored]:
    """What each row's completion is worth. Raises RewardError where a function of our own cannot
    score an answer.
    """
    specs = config.rewards.functions or (given.task.default_rewards if given.task else ())
    found: list[dict[str, float | None]] = [{} for _ in given.completions]
    why: list[dict[str, str]] = [{} for _ in given.completions]
    for reward, spec in zip(rewards, specs, strict=True):
        for rows in _calls(given, _compares(spec)):
            texts = [given.completions[row] for row in rows]
            problems = [given.problems[row] for row in rows]
            ids = [list(range(_length(given, row))) for row in rows]
            separator = config.rewards.step_separator
            scores = score([reward], texts, problems, ids, separator=separator)
            failures = scores.failures.get(reward.name, {})
            for place, row in enumerate(rows):
                value = scores.by_name[reward.name][place]
                found[row][reward.name] = value
                failure = failures.get(place)
                words = f"failed: {failure.message}" if failure else _why(reward, given, row)
                if words or value == 0.0:
                    why[row][reward.name] = words or _of_zero(spec, given.problems[row])
        for row, values in enumerate(found):
            if reward.name not in values:
                values[reward.name] = 0.0
                why[row][reward.name] = NO_ANSWER
    weights = {reward.name: reward.weight for reward in rewards}
    return [
        Scored(values, reasons, sum(weights[name] * (x or 0.0) for name, x in values.items()))
        for values, reasons in zip(found, why, strict=True)
    ]


def _why(reward: Reward, given: Given, row: int) -> str:
    """What a reward read out of a completion, and why it is worth that, where it can say."""
    explain = getattr(reward.function, "explain", None)
    return explain(given.completions[row], given.problems[row]) if explain else ""


def _of_zero(spec: str, problem: Problem) -> str:
    """Why a reward that explains nothing is 0."""
    kind, _, rest = spec.partition(":")
    words = {
        "format": f"the completion as a whole does not match {rest}",
        "json": "the completion is not JSON as asked for",
        "code": "no test passes",
    }
    return words.get(kind, f"the answer is {problem.answer!r:.60}" if problem.answer else "")


def _length(given: Given, row: int) -> int:
    """Tokens of a completion where the row says how many, as a run's do; else its words."""
    tokens = given.rows[row].get("tokens")
    return tokens if isinstance(tokens, int) else len(given.completions[row].split())


def _calls(given: Given, compares: bool) -> Iterator[list[int]]:
    """The rows of each call of a reward."""
    rows = [row for row, answered in enumerate(given.answered) if answered or not compares]
    for _, found in groupby(rows, key=lambda row: _step(given.rows[row])):
        yield list(found)


def _step(row: dict[str, Any]) -> Any:
    """The step of a row of rollouts.jsonl; None of another row."""
    return row["step"] if row.keys() >= {"step", "problem", "reward"} else None


def _task(rows: _Rows, path: str, options: TaskOptions) -> Task:
    """The task of all rows in the file's order, with none held out."""
    options = replace(options, eval_fraction=0.0, eval_path=None, shuffle=False, few_shot=0)
    return Records(path, seed=0, options=options, table=rows)


class _Unanswered(Task):
    """Problems without answers, for rewards that need none."""

    name, default_rewards = "rows without answers", ()

    def __init__(self, problems: list[Problem]) -> None:
        self._problems = problems

    def train_problem(self, index: int) -> Problem:
        return self._problems[index % len(self._problems)]

    def eval_problems(self, count: int) -> list[Problem]:
        return []

    def is_correct_strict(self, problem: Problem, text: str) -> bool:
        return False

    def is_correct_lenient(self, problem: Problem, text: str) -> bool:
        return False


def _compares(spec: str) -> bool:
    """Whether a reward may look at answers: a function of the user may."""
    return spec.partition(":")[0] not in _WITHOUT_ANSWERS


def _counts_tokens(spec: str) -> bool:
    return spec.partition(":")[0] in ("overlong", "cosine", "repetition")


def _is_nothing(value: Any) -> bool:
    return value is None or value is ABSENT or (isinstance(value, str) and not value.strip())


def _text(value: Any, where: str) -> str:
    """A completion as text: of chat messages, what the assistant says last."""
    if isinstance(value, list) and value and isinstance(value[-1], dict):
        value = value[-1].get("content")
    if not isinstance(value, str):
        raise ConfigError(f"{where} has {value!r:.60} as its completion: a text is expected")
    return value
