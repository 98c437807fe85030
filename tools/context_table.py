#!/usr/bin/env python3
"""The longest completion that fits, technique by technique, by size of card: predictions.

    python tools/context_table.py [--model FILE] [--json]

Each row adds one technique to those above it. Every number is `plan --solve max_completion_length`
as in tools/memory_table.py: prompts of 512 tokens, G = 8, LoRA r 16, 600 MiB for a desktop; with it
what the host holds. Takes about fifteen minutes.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

from memory_table import CONFIGS, cards, show, solve

PLAIN = {
    "gradient_checkpointing": True,
    "activation_offloading": False,
    "offload_overlap": False,
    "mlp_tile_tokens": 0,
    "kv_cache_bits": 16,
    "embedding_on_host": False,
}
ROWS = (
    ("layers computed again", {}, {}),
    ("their inputs on the host", {"activation_offloading": True}, {}),
    ("MLPs in tiles of 1,024 tokens", {"mlp_tile_tokens": 1024}, {}),
    ("cache of 8 bits", {"kv_cache_bits": 8}, {}),
    ("embedding on the host", {"embedding_on_host": True}, {}),
    ("head in 8 bits", {}, {"lm_head_bits": 8}),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=CONFIGS / "llama-3.1-8b.json")
    parser.add_argument("--json", action="store_true", help="one JSON object a line, as they come")
    options = parser.parse_args()
    memory, model, rows = dict(PLAIN), {}, {}
    for name, more, of_model in ROWS:
        memory, model = memory | more, model | of_model
        rows[name] = partial(solve, options.model, memory=memory, model=model)
    show(cards()[1:], rows, options.json)  # without the made-up card of 8 GB


if __name__ == "__main__":
    main()
