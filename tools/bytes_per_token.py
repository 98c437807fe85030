"""What each token of an update costs on the card and on the host, byte by byte, from the plan's own
trace: no GPU, no weights.

    python tools/bytes_per_token.py [--model FILE] [--card PROFILE] [--tokens 16384 32768 65536]
                                    [--set memory.KEY=VALUE ...]

One prompt of 512 tokens with one completion, in a micro-batch of its own, LoRA r 16. Prints the
peak of the update for each length, the slope between neighbours, and what was alive at the peak:
by module (its layer's number left out) and size, bytes for each token. What does not grow with the
length is one line.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from pathlib import Path

from lowmem_grpo.config import build_config
from lowmem_grpo.memory.card import PlanCard
from lowmem_grpo.memory.plan import Planner
from lowmem_grpo.memory.settle import Search
from lowmem_grpo.profiles import load_profile

CONFIGS = Path(__file__).parents[1] / "tests/memory/configs"
PROMPT = 512
LONG = {
    "gradient_checkpointing": True,
    "activation_offloading": True,
    "offload_overlap": False,
    "mlp_tile_tokens": 1024,
    "embedding_on_host": True,
}


def at_peak(planner: Planner, config, tokens: int):
    """What is alive at the peak of an update of so many tokens: {(module, component): bytes}, the
    same by count, and the host's bytes.
    """
    length = tokens - PROMPT + 1
    config = config.settled(
        {"rollout.max_completion_length": length, "memory.micro_batch_tokens": tokens}, "tool"
    )
    search = Search(planner, config)
    alone = planner.phases.alone(search.config, (((PROMPT, (length,)),),))
    live, held, most, best = {}, 0, 0, {}
    for event in alone.events:
        if event.action == "alloc":
            live[event.id] = event
            held += event.size
        elif event.action == "free":
            held -= live.pop(event.id).size
        if held > most:
            most, best = held, dict(live)
    found: dict[tuple[str, str], list[int]] = defaultdict(list)
    for event in best.values():
        parts = ["N" if part.isdigit() else part for part in event.module.split(".")]
        found[".".join(parts), event.component].append(event.size)
    return most + alone.around_bytes, found, alone.host_bytes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=CONFIGS / "llama-3.1-8b.json")
    parser.add_argument("--card", default="rtx-4090-24gb")
    parser.add_argument("--tokens", type=int, nargs="+", default=[16384, 32768, 65536])
    parser.add_argument("--set", action="append", default=[], metavar="memory.KEY=VALUE")
    options = parser.parse_args()
    memory = dict(LONG)
    for assignment in options.set:
        key, value = assignment.removeprefix("memory.").split("=")
        memory[key] = (
            {"true": True, "false": False}.get(value) if value in ("true", "false") else int(value)
        )
    rollout = {"max_prompt_length": PROMPT, "num_generations": 8}
    layer = {"model": {"name": str(options.model)}, "rollout": rollout, "memory": memory}
    config = build_config([("tool", layer)])
    p = load_profile(options.card)
    card = PlanCard(options.card, p.memory_bytes, p.compute_capability, 0, p.multiprocessors)
    planner = Planner(config, card)
    before = None
    for tokens in options.tokens:
        peak, found, host = at_peak(planner, config, tokens)
        line = f"{tokens:>8,} tokens: {peak:>15,} bytes on the card, {host:>15,} on the host"
        if before:
            step = tokens - before[0]
            line += (
                f"; {(peak - before[1]) / step:,.1f} and {(host - before[3]) / step:,.1f} a token"
            )
        print(line, flush=True)
        if before:
            explain(found, before[2], step)
        before = tokens, peak, found, host


def explain(found, before, step: int) -> None:
    """What grew, a line for each module."""
    rest = 0.0
    for key in sorted(found, key=lambda key: -sum(found[key])):
        grown = (sum(found[key]) - sum(before.get(key, []))) / step
        if abs(grown) < 1:
            rest += grown
            continue
        module, component = key
        count = len(found[key])
        where = module or "(outside of modules)"
        print(f"      {grown:>12,.1f}  {component:<12} {where}, {count} tensors")
    print(f"      {rest:>12,.1f}  everything else")


if __name__ == "__main__":
    main()
