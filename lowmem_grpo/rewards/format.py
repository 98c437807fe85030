"""The reward `format:REGEX`: 1.0 where the regular expression matches the whole completion, else
0.0.

White space around the completion does not count, and `.` matches line ends too. The expression runs
in a child process: one that backtracks without end, such as `(a+)+b`, costs a score.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from lowmem_grpo.errors import ConfigError
from lowmem_grpo.isolation.worker import Worker
from lowmem_grpo.rewards.base import RewardFunction
from lowmem_grpo.rewards.isolated import Isolated, answering

LIMIT_S = 5.0
"""For all completions of a step."""


def format_reward(pattern: str) -> RewardFunction:
    """The reward function of `pattern`. Raises `ConfigError` where it is empty or no regular
    expression.
    """
    if not pattern:
        raise ConfigError(
            r"reward 'format' needs a regular expression: write format:REGEX, like format:-?\d+"
        )
    try:
        re.compile(pattern, re.DOTALL)
    except re.error as error:
        raise ConfigError(
            f"reward 'format:{pattern}': not a regular expression: {error.msg} "
            f"at position {error.pos}"
        ) from error

    worker = Worker("lowmem_grpo.rewards.format:make_matching", {"pattern": pattern})
    return Isolated(worker, LIMIT_S, apart=True)


def make_matching(pattern: str) -> Callable[..., list | str]:
    """The child's side."""
    compiled = re.compile(pattern, re.DOTALL)

    def matches(completions: list[str], **_: Any) -> list[float]:
        return [float(compiled.fullmatch(text.strip()) is not None) for text in completions]

    return answering(matches)
