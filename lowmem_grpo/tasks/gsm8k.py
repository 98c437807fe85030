"""The task `gsm8k`: school problems in words (Cobbe et al., arXiv 2110.14168), whose worked
solutions end in a line "#### 72".

The rows are the Hub's `openai/gsm8k` (config main; split train to train on, test to evaluate on) or
those of a local file in its form, `task.path`, with `task.eval_path` for the test rows; without the
latter a share of the file is held out, as for `records`. The columns are `question` and `answer`,
unless `task.prompt_column` and `task.answer_column` say otherwise.

Every question is followed by a sentence that asks for the line, and strict holds a completion to
it; `task.system_prompt` comes before that and does not replace it. For another form, the same rows
are `records:hub:openai/gsm8k@main`.
"""

from __future__ import annotations

import re
from dataclasses import replace

from lowmem_grpo.errors import TaskError
from lowmem_grpo.isolation.worker import Failure
from lowmem_grpo.tasks.answers import accepted, equals_answer, parse_number
from lowmem_grpo.tasks.base import Problem, TaskOptions
from lowmem_grpo.tasks.messages import split_prefilled
from lowmem_grpo.tasks.records import Records

_HUB = "hub:openai/gsm8k@main"
_REQUEST = 'Solve it step by step, and end with a line that has "#### " and the number alone.'
_LAST_LINE = re.compile(r"(?:\A|\n)[ \t]*####[ \t]+(\S+)\s*\Z")
# What a calculator was given while the solution was written: <<48/2=24>>.
_CALCULATION = re.compile(r"<<[^<>]*>>")


class Gsm8k(Records):
    """See the module. Raises `TaskError` as `Records` does."""

    def __init__(self, spec_options: str, *, seed: int, options: TaskOptions) -> None:
        if spec_options:
            raise TaskError(
                f"gsm8k has no options, and '{spec_options}' was given: a file is "
                "--task gsm8k --set task.path=FILE"
            )
        path, eval_path = options.path, options.eval_path
        if path is None:
            path, eval_path = f"{_HUB}/train", eval_path or f"{_HUB}/test"
        given, default = options.prompt_column, TaskOptions().prompt_column
        column = "question" if given == default else given
        super().__init__(
            path, seed=seed, options=replace(options, prompt_column=column, eval_path=eval_path)
        )
        self.name = "gsm8k"
        self.default_rewards = ("number",)

    def is_correct_strict(self, problem: Problem, text: str) -> bool:
        """The last line is "#### " and the number, with nothing after it."""
        line = _LAST_LINE.search(text)
        if line is None or parse_number(line[1]) is None:
            return False
        return any(equals_answer(line[1], wanted) for wanted in accepted(problem.answer))

    def score(self, problem: Problem, text: str) -> float | Failure:
        """1.0 where the completion is strictly correct, else 0.0."""
        return float(self.is_correct_strict(problem, text))

    def reply(self, problem: Problem) -> str:
        """The worked solution without its notes for a calculator."""
        return _CALCULATION.sub("", super().reply(problem))

    def _asked(self, problem: Problem) -> Problem:
        (*before, question), _ = split_prefilled(problem.messages)
        asked = {**question, "content": f"{question['content']}\n{_REQUEST}"}
        rest = problem.messages[len(before) + 1 :]
        return replace(problem, messages=(*before, asked, *rest))
