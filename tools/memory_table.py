#!/usr/bin/env python3
"""The longest completion that fits, by model and size of card, as a Markdown table: predictions.

    python tools/memory_table.py [--model FILE ...] [--json]

Every number is `plan --solve max_completion_length`: prompts of 512 tokens, G = 8, LoRA r 16 on all
linear layers, AdamW in float32, memory settings on auto, and 600 MiB for a desktop. Where the
model's window ends first, the number is the window less the prompt. Models are configurations
alone. The card of 8 GB is made up (7,780 MiB visible, 24 multiprocessors), the others are profiles.
Takes about ten minutes.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

from lowmem_grpo.config import build_config
from lowmem_grpo.errors import PlanError
from lowmem_grpo.memory.admit import solved
from lowmem_grpo.memory.card import PlanCard
from lowmem_grpo.memory.plan import Planner
from lowmem_grpo.memory.settle import settle
from lowmem_grpo.profiles import load_profile

CONFIGS = Path(__file__).parents[1] / "tests/memory/configs"
MODELS = ("qwen2.5-1.5b", "qwen2.5-7b", "llama-3.1-8b", "qwen3-14b", "qwen2.5-32b")
MIB = 2**20
DESKTOP = 600 * MIB
EIGHT = PlanCard("8 GB", 7780 * MIB, (8, 9), DESKTOP, 24)  # assumed
PROFILES = ("rtx-3060-12gb", "rtx-4060ti-16gb", "rtx-4090-24gb")


def cards() -> list[PlanCard]:
    found = [EIGHT]
    for name in PROFILES:
        p = load_profile(name)
        size = f"{p.card['memory_gib']} GB"
        figures = p.memory_bytes, p.compute_capability, DESKTOP, p.multiprocessors
        found.append(PlanCard(size, *figures))
    return found


def solve(model: Path, card: PlanCard, /, **sections) -> dict:
    """A row of the table; `sections`: settings besides the table's own."""
    own = {
        "model": {"name": str(model)},
        "rollout": {"max_prompt_length": 512, "num_generations": 8},
    }
    config = build_config([("table", own), ("technique", sections)])
    planner = Planner(config, card)
    row = {"model": model.stem, "card": card.name, "max_completion_length": None}
    try:
        config = solved(planner, config, "max_completion_length")
    except PlanError:
        return row
    settled, plan = settle(planner, config)
    window = planner.model_config.max_position_embeddings
    length = settled.rollout.max_completion_length
    return row | {
        "max_completion_length": length,
        "whole_window": length + 512 >= window,
        "peak_reserved_bytes": plan.peak_reserved_bytes,
        "host_bytes": plan.host_bytes,
        **{key: plan.settings[key] for key in settled.chosen},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, action="append", help="a model's config.json")
    parser.add_argument("--json", action="store_true", help="one JSON object a line, as they come")
    options = parser.parse_args()
    models = options.model or [CONFIGS / f"{name}.json" for name in MODELS]
    show(cards(), {model.stem: partial(solve, model) for model in models}, options.json)


def show(columns: list[PlanCard], rows: dict[str, Callable[[PlanCard], dict]], as_json: bool):
    """Solve each row by name for each card and print it, as Markdown or as a JSON object a cell."""
    if not as_json:
        print("| | " + " | ".join(card.name for card in columns) + " |", flush=True)
        print("|---" * (len(columns) + 1) + "|", flush=True)
    for name, of in rows.items():
        found = []
        for card in columns:
            found.append(of(card))
            if as_json:
                print(json.dumps({"row": name, **found[-1]}), flush=True)
        if not as_json:
            print(f"| {name} | " + " | ".join(map(cell, found)) + " |", flush=True)


def cell(row: dict) -> str:
    """The length, and what the host holds."""
    length = row["max_completion_length"]
    if length is None:
        return "none"
    marks = " (window)" * row["whole_window"]
    return f"{length:,}{marks}; {row['host_bytes'] / 2**30:.1f} GiB"


if __name__ == "__main__":
    main()
