"""What is run, as configurations of the product, from which both sides take everything: the
problems and their order, the reward, all sizes and settings.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lowmem_grpo.config import Config, load_config, read_toml
from lowmem_grpo.policy.load import load_tokenizer
from lowmem_grpo.profiles import load_profile
from lowmem_grpo.rollout.groups import prompt_ids
from lowmem_grpo.setup import open_task
from lowmem_grpo.tasks.base import Problem, chat

from .workloads import LEARNING

HERE = Path(__file__).resolve().parent
QUICKSTART = HERE.parent / "quickstart.toml"
MODEL = "smollm2-135m"


def made_config(work: dict[str, Any], steps: int, scratch: Path, **more: dict) -> Config:
    """A run whose completions all have exactly `new_tokens` tokens, on made problems.

    work: as in `WORKLOADS`; `steps` of it need so many distinct problems. `scratch`: an empty
    directory for the problems and the run. `more`: other settings by section.
    """
    rows, held_out = scratch / "rows.jsonl", scratch / "eval.jsonl"
    # The product holds problems out for evaluation: this one, so that it trains on all others.
    held_out.write_text(json.dumps({"prompt": "-", "answer": "-", "flat": False}) + "\n")
    settings = {
        "task": {"name": f"records:{rows}", "eval_path": str(held_out)},
        "rewards": {"functions": [f"{HERE / 'made_reward.py'}:reward"]},
        "rollout": {
            "num_generations": work["group"],
            "problems_per_step": work["problems"],
            "max_prompt_length": 2048,
            "min_completion_length": work["new_tokens"],
            "max_completion_length": work["new_tokens"],
        },
        "grpo": {"beta": work["beta"], "epsilon": 0.2},
        "optimizer": {"learning_rate": 2e-5},
        "run": {"steps": steps, "seed": 0, "output": str(scratch / "run"), "save_every": 0},
    }
    problems = _problems(work, steps)
    # The product trains on the rows in an order of its own, a permutation that depends on their
    # number alone. It is looked up, and undone: every second problem of a step is to be flat.
    _write(rows, [{**problem, "number": i} for i, problem in enumerate(problems)])
    config = _config(settings, more)
    task = open_task(config)
    ordered = [{}] * len(problems)
    for i, problem in enumerate(problems):
        ordered[task.train_problem(i).fields["number"]] = problem
    _write(rows, ordered)
    return config


def prompt_filler(tokens: int) -> int:
    """Words of filler for prompts of exactly so many tokens, the chat template's included.

    Raises ValueError where the bare prompt is longer, or a word is not one token.
    """
    tokenizer = load_tokenizer(MODEL)

    def length(words: int) -> int:
        text = _problems({"filler": words, "problems": 1, "flat": False}, 1)[0]["prompt"]
        return len(prompt_ids(tokenizer, Problem("", chat(text, None), ""), tokens + 1000))

    words = tokens - length(0)
    if words < 0 or length(words) != tokens:
        raise ValueError(f"no made prompt has {tokens} tokens: the shortest has {length(0)}")
    return words


def learning_config(seed: int, steps: int, scratch: Path, **more: dict) -> Config:
    """One-digit sums, with rollouts that may end early. `seed`: of the problems' order, sampling
    and initialisation. The learning rate is the quickstart's, constant here: a schedule would make
    the reward of a step depend on how many more are to follow.
    """
    rate = read_toml(str(QUICKSTART))["optimizer"]["learning_rate"]
    settings = {
        **LEARNING,
        "task": {**LEARNING["task"], "seed": seed},
        "optimizer": {"learning_rate": rate, "lr_scheduler_type": "constant"},
        "run": {"steps": steps, "seed": seed, "output": str(scratch / "run"), "save_every": 0},
    }
    return _config(settings, more)


def _config(settings: dict[str, dict], more: dict[str, dict]) -> Config:
    profile = load_profile("cpu")
    model = {"model": {"name": MODEL, "device": "cpu"}}
    return load_config(
        None,
        profile=(f"profile {profile.name}", profile.settings),
        assignments=[("benchmark", model), ("benchmark", settings), ("benchmark", more)],
    )


def _problems(work: dict[str, Any], steps: int) -> list[dict[str, Any]]:
    """As many problems as the steps take, with prompts of the same length."""
    filler = "word " * work["filler"]
    return [
        {
            "prompt": f"{filler}What is {i // 10 % 10} + {i % 10}? Answer with the number only.",
            "answer": str(i // 10 % 10 + i % 10),
            "flat": i % 2 == 1 and work["flat"],
        }
        for i in range(steps * work["problems"])
    ]


def _write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
