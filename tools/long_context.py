"""What keeps a long update small, one by one and all together: on SmolLM2-135M, on the CPU.

    python tools/long_context.py [--tokens 4096] [--rounds 2] [--json FILE]

One group: a prompt of 256 tokens and two completions that fill up the rest, made of random tokens,
float32, LoRA r 16 on all linear layers, adapters moved away from their start. Each technique runs
the update's forward and backward pass (`grpo.update.accumulate`, beta 0) as a run does, and is
compared with the plain pass, which keeps everything:

- the largest relative error of any adapter's gradient (norm of the difference over the norm),
- the peak of real tensors, traced, above what is loaded, and what lies on the host,
- seconds without the tracer, medians of rounds that take turns, and their spread.

"transformers' norms" is the plain pass with the norms that the model came with. On a CPU the host
is the device: what is moved there is in both numbers, and its copies run in line.

The cache is measured in a rollout of 16 tokens for two rows behind a prompt of the whole length,
in 16 and in 8 bits.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from lowmem_grpo.grpo.objective import Objective
from lowmem_grpo.grpo.packing import pack
from lowmem_grpo.grpo.update import Scoring, accumulate
from lowmem_grpo.memory.measure import alive
from lowmem_grpo.memory.simulate import add_up
from lowmem_grpo.memory.trace import Recorder
from lowmem_grpo.policy.base import AdapterSettings
from lowmem_grpo.policy.load import load_policy
from lowmem_grpo.policy.norm import RMSNorm
from lowmem_grpo.rollout.sampler import Request, sample
from lowmem_grpo.rollout.sampling import Sampling
from lowmem_grpo.rollout.types import Group, Rollout
from lowmem_grpo.tasks.base import Problem

MIB = 2**20
PROMPT = 256
RECOMPUTED = {"checkpointing": True}
ON_HOST = {**RECOMPUTED, "offloading": True, "overlapping": True}
TECHNIQUES: dict[str, dict[str, Any]] = {
    "transformers' norms": {"norms": "theirs"},
    "plain": {},
    "layers computed again": RECOMPUTED,
    "their inputs on the host": ON_HOST,
    "MLPs in tiles of 512": {"mlp_tile": 512},
    "one completion at a time": {"max_tokens": 1},
    "all together": {**ON_HOST, "mlp_tile": 512, "max_tokens": 1},
}


class Update:
    """The update of one group of two long completions."""

    def __init__(self, tokens: int):
        self.policy = load_policy(
            "smollm2-135m", device="cpu", dtype=torch.float32, attention="tiled", seed=0,
            tile_tokens=512, tile_vocab=2048, adapters=AdapterSettings(r=16, lora_alpha=32),
        )  # fmt: skip
        generator = torch.Generator().manual_seed(0)
        self.parameters = self.policy.adapter_parameters()
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                if "lora_B" in name:
                    parameter.normal_(std=0.01, generator=generator)
        length = (tokens - PROMPT) // 2 + 1
        vocab = self.policy.head_weight_VD.shape[0]

        def drawn(count):
            return torch.randint(0, vocab, (count,), generator=generator).tolist()

        rollouts = [Rollout(drawn(length), [-9.0] * length, "length", "") for _ in range(2)]
        problem = Problem("made-up", ({"role": "user", "content": "?"},), "")
        self.group = Group(problem, drawn(PROMPT), rollouts, advantages=[1.0, -0.5])

    def __call__(
        self, *, norms="ours", mlp_tile=0, max_tokens=10**9, **how
    ) -> dict[str, torch.Tensor]:
        """The adapters' gradients."""
        self.policy.set_mlp_tile(mlp_tile)
        how = {"checkpointing": False, **how}
        batches = pack([self.group], [0.5, 0.5], max_tokens=max_tokens)
        objective = Objective(epsilon=0.2, epsilon_high=0.2, beta=0.0)
        accumulate(self.policy, batches, Scoring(1.0, ()), objective, **how)
        found = {name: p.grad for name, p in self.parameters.items()}
        self.policy.model.zero_grad(set_to_none=True)
        return found

    def traced(self, **how) -> tuple[int, int]:
        """Peak of the tensors above what is loaded, and bytes of pages on the host."""
        self.policy.buffers.pages.clear()
        with Recorder() as recorder:
            recorder.adopt(alive(self.policy))
            loaded = add_up(recorder.events).final_allocated
            self(**how)
        pages = sum(page.numel() for page in self.policy.buffers.pages)
        return add_up(recorder.events).peak_allocated - loaded, pages

    def swap_norms(self) -> None:
        """Between ours and those of transformers."""
        for name, module in list(self.policy.causal_lm.named_modules()):
            if isinstance(module, RMSNorm):
                theirs = LlamaRMSNorm(module.weight.shape[0], module.variance_epsilon)
                theirs.weight = module.weight
                self.policy.causal_lm.set_submodule(name, theirs)
            elif isinstance(module, LlamaRMSNorm):
                ours = RMSNorm(module.weight, module.variance_epsilon)
                self.policy.causal_lm.set_submodule(name, ours)


def error(found: dict[str, torch.Tensor], plain: dict[str, torch.Tensor]) -> float:
    """The largest relative error of a gradient."""
    return max(((found[n] - g).norm() / g.norm()).item() for n, g in plain.items())


def updates(tokens: int, rounds: int) -> dict[str, Any]:
    """A row of every technique."""
    update = Update(tokens)
    plain = update()
    rows: dict[str, Any] = {}
    for number in range(rounds):
        for name, how in TECHNIQUES.items():
            theirs = how.get("norms") == "theirs"
            if theirs:
                update.swap_norms()
            start = time.perf_counter()
            found = update(**how)
            seconds = time.perf_counter() - start
            row = rows.setdefault(name, {"error": error(found, plain), "seconds": []})
            row["seconds"].append(seconds)
            if not number:
                row["peak_bytes"], row["host_bytes"] = update.traced(**how)
            if theirs:
                update.swap_norms()
            print(f"  {name}: {seconds:.1f} s", file=sys.stderr, flush=True)
    return rows


def rollouts(tokens: int, rounds: int) -> dict[str, Any]:
    """A row of each width of the cache."""
    policy = load_policy(
        "smollm2-135m", device="cpu", dtype=torch.bfloat16, attention="tiled", seed=0,
        tile_tokens=512, tile_vocab=2048, adapters=AdapterSettings(r=16, lora_alpha=32),
    )  # fmt: skip
    random = np.random.default_rng(0)
    prompt = random.integers(0, policy.head_weight_VD.shape[0], tokens).tolist()
    request = Request(prompt, [random.random(16) for _ in range(2)])
    how = Sampling(max_completion_length=16, min_completion_length=16)

    def run() -> None:
        with policy.as_sampler():
            sample(policy, [request], how, end_ids=(0,), batch_size=2)

    rows: dict[str, Any] = {}
    for number in range(rounds):
        for bits in (16, 8):
            policy.cache_bits = bits
            if not number:
                with Recorder(modules=policy.model) as recorder:
                    recorder.adopt(alive(policy))
                    loaded = add_up(recorder.events).final_allocated
                    run()
                usage = add_up(recorder.events)
                rows[f"cache of {bits} bits"] = {
                    "seconds": [],
                    "peak_bytes": usage.peak_allocated - loaded,
                }
            start = time.perf_counter()
            run()
            rows[f"cache of {bits} bits"]["seconds"].append(time.perf_counter() - start)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=4096, help="prompt and completions together")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--json", type=Path, help="where the numbers are written")
    options = parser.parse_args()
    found = {
        "tokens": options.tokens,
        "update": updates(options.tokens, options.rounds),
        "rollout": rollouts(options.tokens, options.rounds),
    }
    print(
        "| technique | gradient's error | peak, MiB | of it host, MiB | s |\n|---|---|---|---|---|"
    )
    for name, row in found["update"].items():
        print(
            f"| {name} | {row['error']:.1e} | {row['peak_bytes'] / MIB:,.1f} | "
            f"{row['host_bytes'] / MIB:,.1f} | {spread(row['seconds'])} |"
        )
    print("\n| rollout | peak, MiB | s |\n|---|---|---|")
    for name, row in found["rollout"].items():
        print(f"| {name} | {row['peak_bytes'] / MIB:,.1f} | {spread(row['seconds'])} |")
    if options.json:
        options.json.write_text(json.dumps(found, indent=1), encoding="utf-8")


def spread(seconds: list[float]) -> str:
    return f"{median(seconds):.1f} ({min(seconds):.1f} .. {max(seconds):.1f})"


if __name__ == "__main__":
    main()
