"""How step time and peak memory of ours grow with G, B, prompt and completion length.

    python tools/growth.py growth.json [--sweep group ...] [--steps 3]
    python tools/plot_performance.py growth growth.json growth.png

One size grows at a time, on SmolLM2-135M in NF4 with LoRA r 16 on all linear layers, beta 0.04, on
a CPU; completions all have exactly the length that is named, and prompts exactly theirs.

    group        G 4, 8, 16, 32             B 2, prompts of 64 tokens, completions of 32
    problems     B 1, 2, 4, 8               G 8, prompts of 64 tokens, completions of 32
    completion   16, 32, ... 512 tokens     G 8, B 1, prompts of 64 tokens
    prompt       64, 128, ... 1024 tokens   G 8, B 2, completions of 32 tokens

Memory settings stay as they are within a sweep: rollout_batch_size 32 completions, and
micro_batch_tokens 512 trunk tokens, for `prompt` 2048, which holds its longest prompt. What does
not fill a micro-batch takes less, so each point also says how many tokens the largest forward pass
of an update had, and how many tokens a rollout had in flight (of a wave's prompts and completions).

Each point is a process of its own with three steps. On a CPU the product traces tensors in the
first and last step: peaks are exact bytes of tensors, of the first step (whose sizes are those of
any), above the weights and adapters that are loaded; gradients count to the update. Seconds are of
the steps between, which are not traced. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

from bench.child import answer, ask
from bench.meter import PHASES

MIB = 2**20
ROWS = 32  # memory.rollout_batch_size
POINT = {"group": 8, "problems": 2, "prompt": 64, "completion": 32}
SWEEPS: dict[str, dict[str, Any]] = {
    "group": {"values": [4, 8, 16, 32], "budget": 512},
    "problems": {"values": [1, 2, 4, 8], "budget": 512},
    "completion": {"values": [16, 32, 64, 128, 256, 512], "budget": 512, "problems": 1},
    "prompt": {"values": [64, 128, 256, 512, 1024], "budget": 2048},
}
TRACED = ("rollout", "reference", "update")


def measure(request: dict[str, Any]) -> dict[str, Any]:
    """One point: `request` has the sizes, `budget` (trunk tokens of a micro-batch), `rows`
    (completions decoded at once) and `steps`.
    """
    from bench.configs import made_config, prompt_filler
    from bench.ours import run

    with tempfile.TemporaryDirectory() as scratch:
        config = made_config(
            {
                "problems": request["problems"],
                "group": request["group"],
                "filler": prompt_filler(request["prompt"]),
                "new_tokens": request["completion"],
                "flat": False,
                "beta": 0.04,
            },
            request["steps"],
            Path(scratch),
            rollout={"max_prompt_length": request["prompt"]},
            memory={
                "micro_batch_tokens": request["budget"],
                "rollout_batch_size": request["rows"],
            },
        )
        result = run(config)
    first, *timed, _ = result["steps"]
    return {
        **request,
        "tokens_in_flight": _in_flight(request),
        "update_tokens_at_once": first["largest"]["update"],
        "tokens": first["tokens"],
        "loaded_bytes": result["loaded_bytes"],
        "peak_bytes": {name: first["allocated"][name] - result["loaded_bytes"] for name in TRACED},
        "seconds": {
            **{name: median(step["phases"][name] for step in timed) for name in PHASES},
            "step": median(step["seconds"] for step in timed),
        },
    }


def _in_flight(request: dict[str, Any]) -> int:
    """Tokens of the fullest wave: its prompts, once each, and its completions."""
    rows = min(request["group"], request["rows"])
    problems = min(request["problems"], request["rows"] // rows)
    return problems * (request["prompt"] + rows * request["completion"])


def line(point: dict[str, Any], size: str) -> str:
    """A point as a row of the table."""
    memory = "".join(f"{point['peak_bytes'][name] / MIB:>11,.1f}" for name in TRACED)
    return (
        f"{size:>11} {point[size]:>5}{point['tokens_in_flight']:>11,}"
        f"{point['update_tokens_at_once']:>9,}{memory}{point['seconds']['step']:>9.2f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path, nargs="?", help="where the points are written, JSON")
    parser.add_argument("--sweep", action="append", choices=SWEEPS, help="default: all")
    parser.add_argument("--steps", type=int, default=3, help="of a point; two are traced")
    parser.add_argument("--micro-batch-tokens", type=int, help="instead of the sweep's own")
    parser.add_argument("--rollout-batch-size", type=int, default=ROWS)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        answer(measure)
        return
    if options.file is None or not options.file.parent.is_dir():
        parser.error("name a FILE for the points, in a directory that exists")
    if options.steps < 3:
        parser.error("--steps must be at least 3: the first and the last are traced, not timed")
    from bench.machine import describe

    record: dict[str, Any] = {"machine": describe(), "steps": options.steps, "sweeps": {}}
    print(f"{'':>17}{'in flight':>11}{'at once':>9}", end="")
    print("".join(f"{name:>11}" for name in TRACED) + f"{'step':>9}")
    print(f"{'':>17}{'tokens':>11}{'tokens':>9}" + f"{'MiB':>11}" * len(TRACED) + f"{'s':>9}")
    for size in options.sweep or SWEEPS:
        sweep = SWEEPS[size]
        fixed = {**POINT, "problems": sweep.get("problems", POINT["problems"])}
        budget = options.micro_batch_tokens or sweep["budget"]
        held = {"budget": budget, "rows": options.rollout_batch_size, "steps": options.steps}
        points = record["sweeps"][size] = []
        for value in sweep["values"]:
            points.append(ask(__file__, "ours", {**fixed, **held, size: value}))
            options.file.write_text(json.dumps(record, indent=1), encoding="utf-8")
            print(line(points[-1], size), flush=True)
    print(json.dumps(record))


if __name__ == "__main__":
    sys.exit(main())
