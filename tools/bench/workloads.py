"""The sizes of what is measured."""

from __future__ import annotations

from typing import Any

# Problems a step, completions each, prompt words of filler, new tokens, whether every second group
# is without signal (all rewards equal, so the advantages are zero), and the weight of the KL term.
# With beta above 0 a row without an advantage still has a gradient, from the KL term, and nothing
# of it may be left out; so the workload about such rows has TRL's default, 0.
WORKLOADS: dict[str, dict[str, Any]] = {
    "short": {
        "problems": 4, "group": 8, "filler": 0, "new_tokens": 24, "flat": False, "beta": 0.04,
    },
    "long_prompt": {
        "problems": 2, "group": 8, "filler": 545, "new_tokens": 32, "flat": False, "beta": 0.04,
    },
    "long_completion": {
        "problems": 2, "group": 8, "filler": 0, "new_tokens": 256, "flat": False, "beta": 0.04,
    },
    "sparse": {
        "problems": 4, "group": 8, "filler": 0, "new_tokens": 24, "flat": True, "beta": 0.0,
    },
}  # fmt: skip

LEARNING = {
    "task": {"name": "arithmetic:digits=1,ops=+"},
    "rollout": {
        "num_generations": 8,
        "problems_per_step": 4,
        "max_prompt_length": 128,
        "max_completion_length": 24,
        "temperature": 1.0,
    },
    "grpo": {"beta": 0.04, "epsilon": 0.2},
}
