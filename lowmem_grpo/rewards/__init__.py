"""Scoring completions. `load_rewards` turns specifications into `Reward`s; `score` applies them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import fields
from math import isfinite
from typing import Any

from lowmem_grpo.errors import ConfigError, TaskError, nearest
from lowmem_grpo.isolation.confine import Limits
from lowmem_grpo.isolation.output import Output
from lowmem_grpo.rewards.answer import AnswerReward
from lowmem_grpo.rewards.base import Reward, RewardFunction, Scores, fields_of, score
from lowmem_grpo.rewards.choice import choice_reward
from lowmem_grpo.rewards.code import CodeReward, read_tests
from lowmem_grpo.rewards.format import format_reward
from lowmem_grpo.rewards.isolated import Values
from lowmem_grpo.rewards.json_schema import json_reward
from lowmem_grpo.rewards.judge import judge_reward
from lowmem_grpo.rewards.length import CosineReward, Ends, overlong_reward, repetition_reward
from lowmem_grpo.rewards.math import MathReward
from lowmem_grpo.rewards.number import number_reward
from lowmem_grpo.rewards.user import open_file
from lowmem_grpo.tasks.base import Problem, Task, parse_options

__all__ = ["Reward", "Scores", "is_model", "load_rewards", "score"]

_FORMS = (
    "number, choice, math, task, format:REGEX, json[:SCHEMA.json], "
    "code[:column=tests,...], overlong:max=L,cache=C, cosine:max=L, repetition:ngram=N, "
    "judge:FILE.toml, model:NAME[,max=TOKENS,...], FILE.py:function"
)


def load_rewards(
    specs: Sequence[str],
    weights: Sequence[float] | None,
    task: Task,
    *,
    timeout: float = 60.0,
    limits: Limits | None = None,
    with_steps: bool = False,
    conversation: int = 1024,
    output: Output | None = None,
) -> list[Reward]:
    """The rewards that `specs` name, or the task's default ones where there are none; weights are 1
    unless given. `timeout`: seconds that a user's function may take for a step's completions, under
    `limits`. `with_steps`: functions are given the steps of completions. `conversation`: tokens of
    the longest prompt and completion, from which a reward model's limits follow. `output`: takes
    what a user's functions print.

    Names in the log are `number`, `math`, `format` and so on, or the function's; a second reward of
    the same name gets `_2`, and so on. Raises `ConfigError` for a reward that is unknown, cannot be
    loaded, does not suit the task's problems or is named twice, and for weights that are not one
    finite number each; `ModelError` for a reward model that cannot be had.
    """
    specs = list(specs) or list(task.default_rewards)
    if not specs:
        raise ConfigError(f"{task.about_answers()}: name a reward with --reward: {_FORMS}")
    weights = [1.0] * len(specs) if weights is None else list(weights)
    if len(weights) != len(specs):
        raise ConfigError(
            f"{len(weights)} reward weights for {len(specs)} rewards ({', '.join(specs)}): "
            "give one for each"
        )
    fields = {*fields_of([task.train_problem(0)], [[]]), *(["steps"] if with_steps else [])}
    files = [spec for spec in specs if _is_own(spec)]
    own = _open_files(files, fields, timeout, limits or Limits(), output)
    names: list[str] = []
    rewards = []
    for i, (spec, weight) in enumerate(zip(specs, weights, strict=True)):
        if spec in specs[:i]:
            raise ConfigError(
                f"reward '{spec}' is given twice: give it once, with the weight that you want"
            )
        if not isfinite(weight):
            raise ConfigError(f"the weight of reward '{spec}' is {weight}: use a finite number")
        if is_model(spec):
            name, function = "model", _model(spec, task, conversation)
        else:
            name, function = _load(spec, task, own)
        names.append(_unused(name, names))
        rewards.append(Reward(names[-1], float(weight), function, here=is_model(spec)))
    return rewards


def is_model(spec: str) -> bool:
    """Whether a specification names a reward model."""
    return spec.partition(":")[0] == "model"


def _load(spec: str, task: Task, own: dict[str, RewardFunction]) -> tuple[str, RewardFunction]:
    kind, colon, rest = spec.partition(":")
    if kind in _KINDS and (kind in _WITH_OPTIONS or not colon):
        return kind, _KINDS[kind](spec, rest, task)
    if spec in own:
        return spec.rpartition(":")[2], own[spec]
    if spec.endswith(".py"):
        raise ConfigError(f"reward '{spec}' names a file but no function: write {spec}:NAME")
    raise ConfigError(
        f"unknown reward '{spec}'{nearest(kind, [*_KINDS, 'model'])}; the rewards are: {_FORMS}"
    )


def _comparing(reward: AnswerReward, answers: str) -> Callable[[str, str, Task], RewardFunction]:
    """What makes `reward` of a specification, for a task all of whose answers it can compare."""

    def load(spec: str, rest: str, task: Task) -> RewardFunction:
        for where, answer in task.known_answers():
            if not reward.reads(answer):
                raise ConfigError(
                    f"reward '{spec}' needs {answers} as answers, and {where} has {answer!r:.60}: "
                    "use the reward math, task or a function of your own"
                )
        return reward

    return load


def _overlong(spec: str, rest: str, task: Task) -> RewardFunction:
    return overlong_reward(*_whole_numbers(spec, rest, ("max", "cache")))


def _repetition(spec: str, rest: str, task: Task) -> RewardFunction:
    return repetition_reward(*_whole_numbers(spec, rest, ("ngram",)))


def _cosine(spec: str, rest: str, task: Task) -> RewardFunction:
    form = "cosine:max=NUMBER[,right0=1,right1=0.5,wrong0=-1,wrong1=-0.5,over=-1]"
    names = [field.name for field in fields(Ends)]
    given = _options(spec, rest, ("max", *names), form)
    if not given.get("max", "").isdecimal():
        raise ConfigError(f"reward '{spec}': write {form}")
    most = int(given.pop("max"))
    try:
        ends = Ends(**{name: float(value) for name, value in given.items()})
    except ValueError as error:
        raise ConfigError(f"reward '{spec}': {error}: write {form}") from error
    if not all(isfinite(getattr(ends, name)) for name in names):
        raise ConfigError(f"reward '{spec}': the values have to be finite")
    return CosineReward(most, ends, _right(task))


def _right(task: Task) -> RewardFunction:
    """What says that a completion is right: a task's default reward where that compares answers,
    else its own score.
    """
    of_answers = ("number", "choice", "math")
    default = next((each for each in task.default_rewards if each in of_answers), "task")
    return _KINDS[default](default, "", task)


def _code(spec: str, rest: str, task: Task) -> RewardFunction:
    form = "code[:column=tests,timeout=5,score=fraction|all]"
    given = _options(spec, rest, ("column", "timeout", "score"), form)
    column, score_of = given.get("column", "tests"), given.get("score", "fraction")
    timeout = given.get("timeout", "5")
    if not timeout.replace(".", "", 1).isdecimal() or not float(timeout):
        raise ConfigError(f"reward '{spec}': timeout={timeout}: give seconds: {form}")
    if score_of not in ("fraction", "all"):
        raise ConfigError(f"reward '{spec}': score={score_of}: {form}")
    there = task.train_problem(0).fields
    if column not in there:
        raise ConfigError(
            f"reward '{spec}' needs a column '{column}'{nearest(column, there)} with the tests; "
            f"the problems have: {', '.join(there)}"
        )
    read_tests(there[column])
    return CodeReward(column, float(timeout), score_of == "all")


def _model(spec: str, task: Task, conversation: int) -> RewardFunction:
    # Here alone: the processes of other rewards import this package, and have no use for torch.
    from lowmem_grpo.rewards.model import ModelReward, parse_spec

    reward = ModelReward(parse_spec(spec, conversation))
    reward.check(task.train_problem(0))
    return reward


_KINDS: dict[str, Callable[[str, str, Task], RewardFunction]] = {
    "number": _comparing(number_reward, "numbers"),
    "choice": _comparing(choice_reward, "letters from A to J"),
    "math": lambda spec, rest, task: MathReward(),
    "task": lambda spec, rest, task: _TaskReward(task),
    "format": lambda spec, rest, task: format_reward(rest),
    "json": lambda spec, rest, task: json_reward(rest),
    "code": _code,
    "overlong": _overlong,
    "cosine": _cosine,
    "repetition": _repetition,
    "judge": lambda spec, rest, task: judge_reward(rest),
}
_WITH_OPTIONS = _KINDS.keys() - {"number", "choice", "math", "task"}


def _is_own(spec: str) -> bool:
    kind, path = spec.partition(":")[0], spec.rpartition(":")[0]
    return kind not in (*_KINDS, "model") and path.endswith(".py")


def _open_files(
    specs: list[str],
    fields: Collection[str],
    timeout: float,
    limits: Limits,
    output: Output | None,
) -> dict[str, RewardFunction]:
    files: dict[str, list[str]] = {}
    for spec in specs:
        files.setdefault(spec.rpartition(":")[0], []).append(spec)
    functions: dict[str, RewardFunction] = {}
    for path, of_file in files.items():
        functions |= open_file(path, of_file, fields, timeout, limits, output)
    return functions


class _TaskReward:
    """The reward `task`: the task's own score."""

    def __init__(self, task: Task) -> None:
        self._task = task

    def __call__(self, completions: list[str], problems: list[Problem], **_: Any) -> Values:
        return [
            self._task.score(problem, text)
            for problem, text in zip(problems, completions, strict=True)
        ]

    def explain(self, completion: str, problem: Problem) -> str:
        """What was read out of a completion and what was wanted, in one line."""
        return self._task.explain(problem, completion)


def _whole_numbers(spec: str, text: str, names: tuple[str, ...]) -> list[int]:
    """The values of `max=256,cache=64`, all of them whole numbers."""
    form = spec.partition(":")[0] + ":" + ",".join(f"{name}=NUMBER" for name in names)
    given = _options(spec, text, names, form)
    if len(given) < len(names) or not all(value.isdecimal() for value in given.values()):
        raise ConfigError(f"reward '{spec}': write {form}")
    return [int(given[name]) for name in names]


def _options(spec: str, text: str, names: tuple[str, ...], form: str) -> dict[str, str]:
    try:
        return parse_options(text, names, spec)
    except TaskError as error:
        raise ConfigError(f"reward '{spec}': write {form}") from error


def _unused(name: str, taken: list[str]) -> str:
    candidate, count = name, 1
    while candidate in taken:
        count += 1
        candidate = f"{name}_{count}"
    return candidate
