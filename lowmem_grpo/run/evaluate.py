"""Evaluation on held-out problems, strict and lenient, with 95% intervals: pass@1, greedy or over
several completions of a problem, and of several also pass@k and maj@k.

Strict asks for the form that the task asks for; lenient takes any last number. Most of what a short
run gains is form, so both are always reported.

pass@k is the chance that one of k completions is right, estimated without bias from n of which c
are (Chen et al., arXiv 2107.03374, eq. 1): 1 - C(n - c, k) / C(n, k). maj@n asks whether the answer
that most of the n give is right (arXiv 2203.11171), whatever its form; an answer is the last number
of a completion, or its text: where answers are neither, it says little. Completions of the same
problem are drawn with the same uniform numbers each time, so two evaluations differ by their
policies alone.

The interval is Wilson's score interval (1927), which stays inside [0, 1]. Several completions of a
problem are no problems of their own: it is that of so many problems, and rather too wide.
"""

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from lowmem_grpo.rollout.groups import end_token_ids, prompt_ids
from lowmem_grpo.rollout.sampler import Request, sample
from lowmem_grpo.rollout.sampling import Sampling, uniforms
from lowmem_grpo.rollout.text import Texts
from lowmem_grpo.tasks.answers import read_number
from lowmem_grpo.tasks.base import Problem, Task, held_out

__all__ = ["Evaluation", "evaluate", "pass_at", "wilson_interval"]

EVALUATION = 1 << 62
"""The step whose uniform numbers an evaluation draws with: no run gets there."""


@dataclass(frozen=True)
class Evaluation:
    """Correct completions of `num_generations` for each of `problems`, and every completion, those
    of a problem side by side: (problem, text, strict, lenient).
    """

    problems: int
    strict: int
    lenient: int
    truncated: int
    completions: list[tuple[Problem, str, bool, bool]]
    num_generations: int = 1

    def summary(self) -> dict[str, Any]:
        """Accuracies (of several completions: pass@1) with their intervals, as JSON values."""
        return {
            "problems": self.problems,
            "num_generations": self.num_generations,
            **{
                f"{name}_{key}": value
                for name, correct in (("strict", self.strict), ("lenient", self.lenient))
                for key, value in (
                    ("accuracy", correct / self.problems / self.num_generations),
                    ("interval", list(self._interval(correct))),
                    *((f"pass_at_{k}", share) for k, share in self._passes(name).items()),
                )
            },
            **{f"lenient_maj_at_{n}": share for n, share in self._majority().items()},
            "truncated_fraction": self.truncated / self.problems / self.num_generations,
        }

    def line(self) -> str:
        """The summary for a person."""
        parts = []
        for name, correct in (("strict", self.strict), ("lenient", self.lenient)):
            total = self.problems * self.num_generations
            low, high = self._interval(correct)
            part = f"{name} {correct / total:.1%} ({correct}/{total}, 95%: {low:.0%} to {high:.0%})"
            more = [f"pass@{k} {share:.1%}" for k, share in self._passes(name).items()]
            parts.append(" ".join([part, *more]))
        parts += [f"maj@{n} {share:.1%}" for n, share in self._majority().items()]
        return ", ".join(parts)

    def _interval(self, correct: int) -> tuple[float, float]:
        return wilson_interval(correct / self.num_generations, self.problems)

    def _by_problem(self, name: str) -> list[list[tuple[str, bool]]]:
        """(text, whether it is correct) of each completion of each problem."""
        at, n = {"strict": 2, "lenient": 3}[name], self.num_generations
        judged = [(each[1], each[at]) for each in self.completions]
        return [judged[i : i + n] for i in range(0, len(judged), n)]

    def _passes(self, name: str) -> dict[int, float]:
        """pass@k for the powers of two from 2 on, and for all completions."""
        n = self.num_generations
        counts = [sum(correct for _, correct in each) for each in self._by_problem(name)]
        return {
            k: sum(pass_at(k, n, count) for count in counts) / self.problems
            for k in sorted({n, *(1 << i for i in range(1, n.bit_length()))} - {1})
        }

    def _majority(self) -> dict[int, float]:
        if self.num_generations == 1:
            return {}
        right = sum(_elected(each) for each in self._by_problem("lenient"))
        return {self.num_generations: right / self.problems}


def evaluate(
    policy,
    task: Task,
    *,
    num_problems: int,
    num_generations: int,
    sampling: Sampling,
    seed: int,
    max_prompt_length: int,
    batch_size: int,
    chat_template_kwargs: dict[str, Any] | None = None,
    adapters: bool = True,
    texts: Texts | None = None,
    advance: Callable[[int], None] = lambda tokens: None,
) -> Evaluation:
    """Completions of the task's held-out problems, judged by the task; by the policy, or without
    `adapters` by its base. Raises TaskError where the task has none.
    """
    problems = held_out(task, num_problems)
    length = sampling.max_completion_length
    requests = [
        Request(
            prompt_ids(policy.tokenizer, problem, max_prompt_length, chat_template_kwargs),
            [uniforms(seed, EVALUATION, place, i, length) for i in range(num_generations)],
        )
        for place, problem in enumerate(problems)
    ]
    with policy.as_sampler() if adapters else policy.as_reference():
        found = sample(
            policy,
            requests,
            sampling,
            end_ids=end_token_ids(policy),
            batch_size=batch_size,
            advance=advance,
        )
    texts = texts or Texts(policy.tokenizer, template=chat_template_kwargs)
    judged = []
    for problem, completions in zip(problems, found, strict=True):
        beginning = texts.prefill(problem)
        for completion in completions:
            text = beginning + texts.own(completion.ids, completion.ended)
            strict = task.is_correct_strict(problem, text)
            judged.append((problem, text, strict, task.is_correct_lenient(problem, text)))
    return Evaluation(
        problems=len(problems),
        strict=sum(strict for _, _, strict, _ in judged),
        lenient=sum(lenient for _, _, _, lenient in judged),
        truncated=sum(not completion.ended for each in found for completion in each),
        completions=judged,
        num_generations=num_generations,
    )


def pass_at(k: int, count: int, correct: int) -> float:
    """The unbiased estimate of pass@k from `count` completions, of which some are correct."""
    return 1.0 - math.comb(count - correct, k) / math.comb(count, k)


def _elected(judged: list[tuple[str, bool]]) -> bool:
    """Whether the answer that most give, of equally many the first, is right."""
    numbers = [read_number(text)[0] for text, _ in judged]
    votes = [
        text.strip() if number is None else number
        for number, (text, _) in zip(numbers, judged, strict=True)
    ]
    winner = Counter(votes).most_common(1)[0][0]
    return judged[votes.index(winner)][1]


def wilson_interval(correct: float, total: int, z: float = 1.959964) -> tuple[float, float]:
    """The 95% score interval of a proportion."""
    share, spread = correct / total, z * z / total
    centre = (share + spread / 2) / (1 + spread)
    half = z / (1 + spread) * math.sqrt(share * (1 - share) / total + spread / (4 * total))
    # The share itself always belongs; at 0 and 1 rounding would leave it out.
    return max(0.0, min(share, centre - half)), min(1.0, max(share, centre + half))
