"""GRPO beside TRL's, on the same machine, for the same work: seconds, tokens, memory, learning.

    python tools/bench_vs_trl.py --workload all --rounds 3 --steps 4
    python tools/bench_vs_trl.py --until-reward 0.9 --seeds 0
    python tools/bench_vs_trl.py --curves curves.json --until-reward 0.9

Both train SmolLM2-135M in NF4 with LoRA r 16 on all linear layers, on the same problems in the same
order, with the same rewards, G, B, lengths, loss, beta and optimizer settings, in processes of
their own that take turns (A B A B ...). Absolute times on a shared machine mean little; ratios
within one call do. TRL runs in its best CPU settings (tools/bench/trl_side.py). The last line is
one JSON object.

WORKLOADS (--workload, may be repeated). All completions have exactly the same number of tokens
(minimum equals maximum length), so the work is equal. Seconds are by phase, "update" with the
optimizer's step; tokens are those computed by the model's layers, padding included, counted by a
hook on the first of them; memory is the resident memory of the process, sampled every 20 ms, above
what it was when the model had been loaded. Of `--steps N` both leave out the first, which warms
caches up. On a CPU the product traces the memory of the first and of the last step of a run, which
makes them slower, so ours runs N + 1 steps and leaves out the last one too. The peak memory is that
of all steps, traced ones included.

`sparse` has half of its groups without an advantage. With beta above 0 they still get a gradient,
from the KL term, and nothing may be left out; its beta is therefore 0 on both sides, which is TRL's
default, and 0.04 for the other workloads. --beta overrides.

LEARNING (--until-reward, --curves). One-digit sums with rollouts that may end early, the same
hyperparameters on both sides, each on its own samples. Seconds are from the beginning of the first
step, with everything that happens between steps, ours with its traced first and last ones, and
without loading. The running mean is over 5 steps. Without --curves a run stops once it is there.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

from bench.child import answer, ask
from bench.report import SIDES, compare, peak_gib, table, time_line, time_to_reward
from bench.workloads import WORKLOADS

NAMES = {"ours": "ours", "trl": "TRL"}
STEPS = {"workload": 3, "until": 40, "curves": 30}


def child(side: str, request: dict[str, Any]) -> dict[str, Any]:
    """One process of one side."""
    from bench.configs import learning_config, made_config

    if side == "ours":
        from bench.ours import run
    else:
        from bench.trl_side import run
    steps = request["steps"]
    with tempfile.TemporaryDirectory() as scratch:
        if "seed" in request:
            rate = {"learning_rate": request["learning_rate"]} if request["learning_rate"] else {}
            config = learning_config(request["seed"], steps, Path(scratch), optimizer=rate)
            return run(config, request["until"])
        work = WORKLOADS[request["workload"]]
        work = work if request["beta"] is None else {**work, "beta": request["beta"]}
        result = run(made_config(work, steps + (side == "ours"), Path(scratch)))
        return {**result, "counted": list(range(1, steps))}


def measure_workload(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """All rounds of one workload."""
    work = WORKLOADS[name]
    beta = work["beta"] if options.beta is None else options.beta
    print(
        f"{name}: {work['problems']} problems x {work['group']} completions of {work['new_tokens']}"
        f" tokens, beta {beta:g}; rounds of {options.steps} steps",
        flush=True,
    )
    request = {"workload": name, "steps": options.steps, "beta": options.beta}
    rounds = []
    for number in range(options.rounds):
        pair = {side: ask(__file__, side, request) for side in SIDES}
        rounds.append(pair)
        print(f"  round {number + 1}: {_round_line(pair)}", flush=True)
    compared = compare(rounds)
    print(table(compared) + "\n", flush=True)
    return {"beta": beta, "steps": options.steps, **compared, "rounds": rounds}


def _round_line(pair: dict[str, dict[str, Any]]) -> str:
    seconds = {
        side: median(pair[side]["steps"][i]["seconds"] for i in pair[side]["counted"])
        for side in SIDES
    }
    memory = {side: peak_gib(pair[side]) for side in SIDES}
    sides = [f"{NAMES[side]} {seconds[side]:.2f} s, {memory[side]:.2f} GiB" for side in SIDES]
    return "; ".join(sides) + f"; ratio {seconds['trl'] / seconds['ours']:.2f} in time"


def measure_learning(options: argparse.Namespace) -> dict[str, Any]:
    """A run of each side for each seed; written to the file of --curves after each of them."""
    from bench.machine import describe

    until = None if options.curves else options.until_reward
    request = {"steps": options.steps, "until": until, "learning_rate": options.learning_rate}
    record = {"machine": describe(), "steps": options.steps, "runs": []}
    for seed in options.seeds:
        for side in SIDES:
            result = ask(__file__, side, {**request, "seed": seed})
            steps = result["steps"]
            record["runs"].append(
                {
                    "side": side,
                    "seed": seed,
                    "startup_seconds": result["startup_seconds"],
                    **{k: [step[k] for step in steps] for k in ("reward", "ended", "peak_bytes")},
                }
            )
            if options.curves:
                options.curves.write_text(json.dumps(record, indent=1), encoding="utf-8")
            print(
                f"seed {seed}, {NAMES[side]}: {len(steps)} steps, reward "
                f"{steps[0]['reward']:.2f} -> {steps[-1]['reward']:.2f}, "
                f"{steps[-1]['ended'] / 60:.2f} minutes",
                flush=True,
            )
    if options.until_reward is not None:
        record["until_reward"] = options.until_reward
        record["reached"] = time_to_reward(record["runs"], options.until_reward)
        print(f"until a running mean reward of {options.until_reward:g}:")
        for row in record["reached"]:
            print(f"  {time_line(row)}", flush=True)
    return record


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--workload", action="append", choices=[*WORKLOADS, "all"], help="default: short"
    )
    parser.add_argument("--rounds", type=int, default=2, help="processes of each side")
    parser.add_argument(
        "--steps", type=int, help="of each process: 3 (the first is not counted), when learning "
        "at most 40, with --curves 30"
    )  # fmt: skip
    parser.add_argument("--beta", type=float, help="instead of the workload's own")
    parser.add_argument("--until-reward", type=float, metavar="REWARD", help="time to reward")
    parser.add_argument("--curves", type=Path, metavar="FILE.json", help="reward of each step")
    parser.add_argument(
        "--seeds", type=int, nargs="+", help="when learning: 0; with --curves 0 1 2"
    )
    parser.add_argument("--learning-rate", type=float, help="when learning: the quickstart's")
    parser.add_argument("--child", choices=SIDES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        return options
    learning = options.curves is not None or options.until_reward is not None
    if learning and (options.workload or options.beta is not None):
        parser.error("--workload and --beta measure work, not learning: run it once for each")
    if not learning and (options.seeds or options.learning_rate):
        parser.error("--seeds and --learning-rate need --until-reward REWARD or --curves FILE.json")
    options.learning = learning
    kind = "curves" if options.curves else "until" if learning else "workload"
    options.steps = STEPS[kind] if options.steps is None else options.steps
    options.seeds = options.seeds or ([0, 1, 2] if options.curves else [0])
    chosen = options.workload or ["short"]
    options.workload = list(WORKLOADS) if "all" in chosen else list(dict.fromkeys(chosen))
    if options.steps < 2:
        parser.error("--steps must be at least 2: the first is not counted")
    if options.rounds < 1:
        parser.error("--rounds must be at least 1")
    if options.curves and not options.curves.parent.is_dir():
        parser.error(f"--curves {options.curves}: there is no such directory, make it first")
    if importlib.util.find_spec("trl") is None:
        parser.error("TRL is missing: pip install 'lowmem-grpo[bench]' (Python 3.11 or newer)")
    return options


def main() -> None:
    options = parse()
    if options.child:
        answer(lambda request: child(options.child, request))
        return
    if options.learning:
        print(json.dumps(measure_learning(options)))
        return
    from bench.machine import describe

    workloads = {name: measure_workload(name, options) for name in options.workload}
    print(json.dumps({"machine": describe(), "workloads": workloads}))


if __name__ == "__main__":
    sys.exit(main())
