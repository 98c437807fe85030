"""The task `reasoning_gym:NAME[:key=value,...]`: any generator of the package reasoning-gym, with
its own scorer.

The package runs in a child process (`worker.py`; what it does there is in `gym_child.py`): several
of its scorers hand the completion to `eval` or to sympy, and several of its generators depend on
Python's hash seed. A completion is scored without the white space around it, and if it has
`<answer>...</answer>`, only the last of these.

Where a generator has fewer different questions than are asked for, `eval_problems` is short; see
`Task`.
"""

from __future__ import annotations

import importlib.util
from typing import Any

from lowmem_grpo.errors import TaskError, UserError
from lowmem_grpo.isolation.worker import Failure, Worker, WorkerFailure, WorkerSetupError
from lowmem_grpo.tasks.answers import contains_answer, last_tagged
from lowmem_grpo.tasks.base import Problem, Task, TaskOptions, chat

_DRAW_LIMIT_S = 120.0
_SCORE_LIMIT_S = 10.0
# So many positions without a question that is new mean that the generator has no more.
_STALL = 600


class ReasoningGym(Task):
    """See the module. Raises `TaskError` for an unknown generator or option, and where the package
    is missing.
    """

    default_rewards = ("task",)

    def __init__(self, spec: str, *, seed: int, options: TaskOptions) -> None:
        generator, _, spec_options = spec.partition(":")
        if not generator:
            raise TaskError(
                "reasoning_gym needs a generator: write reasoning_gym:NAME, like "
                "reasoning_gym:chain_sum"
            )
        if importlib.util.find_spec("reasoning_gym") is None:
            raise TaskError(
                "task reasoning_gym needs the package reasoning-gym: "
                'pip install "lowmem-grpo[tasks]"'
            )
        self.name = f"reasoning_gym:{spec}"
        self._generator = generator
        self._seed = seed
        self._system_prompt = options.system_prompt
        self._eval: dict[str, Problem] = {}  # by question, so that none comes twice
        self._eval_position = self._eval_stalled = 0
        self._worker = Worker(
            "lowmem_grpo.tasks.gym_child:Gym",
            {"name": generator, "spec_options": spec_options},
        )
        try:
            self._worker.start()
        except UserError as error:
            raise TaskError(str(error)) from error
        except WorkerSetupError as error:
            raise TaskError(f"the package reasoning-gym cannot be loaded: {error}") from error

    def train_problem(self, index: int) -> Problem:
        """See `Task`. Raises `TaskError` where the generator fails or has too few different
        questions.
        """
        return self._problem(self._ask({"op": "train", "seed": self._seed, "index": index}))

    def eval_problems(self, count: int) -> list[Problem]:
        """See `Task`."""
        while len(self._eval) < count and self._eval_stalled < _STALL:
            reply = self._ask({"op": "held_out", "position": self._eval_position})
            before = len(self._eval)
            if reply["entry"]:
                self._eval.setdefault(reply["entry"]["question"], self._problem(reply["entry"]))
            step = reply["next"] - self._eval_position
            self._eval_stalled = 0 if len(self._eval) > before else self._eval_stalled + step
            self._eval_position = reply["next"]
        return list(self._eval.values())[:count]

    def score(self, problem: Problem, text: str) -> float | Failure:
        """The package's score, mostly from 0 to 1. Its scorer may take 10 s."""
        tagged = last_tagged(text)
        block, position = problem.fields["gym_address"]
        request = {"op": "score", "block": block, "position": position}
        answer = text if tagged is None else tagged
        return self._worker.score(request | {"text": answer.strip()}, _SCORE_LIMIT_S)

    def is_correct_strict(self, problem: Problem, text: str) -> bool:
        """The package's scorer gives full marks."""
        score = self.score(problem, text)
        return isinstance(score, float) and score >= 1.0

    def is_correct_lenient(self, problem: Problem, text: str) -> bool:
        """As strict, or the package's own answer stands in the text."""
        return contains_answer(text, problem.answer) or self.is_correct_strict(problem, text)

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        try:
            return self._worker.call(request, _DRAW_LIMIT_S)
        except WorkerFailure as error:
            raise TaskError(f"{self.name} gave no problem: {error}") from error

    def _problem(self, entry: dict[str, Any]) -> Problem:
        return Problem(
            id=f"{self._generator}/{entry['block']}/{entry['position']}",
            messages=chat(entry["question"], self._system_prompt),
            answer=entry["answer"] or "",
            fields={
                "question": entry["question"],
                "metadata": entry["metadata"],
                "gym_address": (entry["block"], entry["position"]),
            },
        )
