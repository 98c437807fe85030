"""What a decoded token costs on a CPU: by the sampler's own layers and by the model's modules.

    python tools/decoding.py [--rounds 3] [--dtype bfloat16] [--profile]

Two shapes of the demo model with LoRA r 16 on all linear layers, adapters away from their start: 2
problems x 8 completions of 200 tokens behind prompts of 40, and 4 x 8 of 24 behind prompts of 5.
Both ways take turns, after a first rollout that warms up; a line each, in milliseconds a token (a
rollout's seconds, prefill and draws included, by its tokens). That both draw the same tokens with
the same log-probs is checked on the way. --profile: torch's profiler over a rollout of the first
shape by the own layers, operations by the time they take themselves.
"""

from __future__ import annotations

import argparse
import time

import numpy as np
import torch

from lowmem_grpo.policy.base import AdapterSettings
from lowmem_grpo.policy.load import load_policy
from lowmem_grpo.rollout.sampler import Request, sample
from lowmem_grpo.rollout.sampling import Sampling

SHAPES = {"2 x 8 of 200": (2, 40, 200), "4 x 8 of 24": (4, 5, 24)}
GROUP, END = 8, (0,)


def open_policy(dtype: torch.dtype):
    """The demo model, with adapters that do something."""
    policy = load_policy(
        "smollm2-135m", device="cpu", dtype=dtype, attention="tiled", seed=0, tile_tokens=512,
        tile_vocab=2048, adapters=AdapterSettings(r=16, lora_alpha=32),
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    for name, parameter in policy.adapter_parameters().items():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.01, generator=generator)
    return policy


def roll_out(policy, problems: int, prompt: int, tokens: int) -> tuple[float, list]:
    """(milliseconds a token, what was drawn)."""
    generator, vocab = np.random.default_rng(0), policy.head_weight_VD.shape[0]
    requests = [
        Request(
            generator.integers(0, vocab, prompt).tolist(),
            [generator.random(tokens) for _ in range(GROUP)],
        )
        for _ in range(problems)
    ]
    sampling = Sampling(max_completion_length=tokens, min_completion_length=tokens)
    with policy.as_sampler():
        begun = time.perf_counter()
        groups = sample(policy, requests, sampling, end_ids=END, batch_size=problems * GROUP)
        seconds = time.perf_counter() - begun
    return seconds / tokens * 1000, [(c.ids, c.logprobs) for group in groups for c in group]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--profile", action="store_true")
    options = parser.parse_args()
    policy = open_policy(getattr(torch, options.dtype))
    ways = {"own layers": policy.sampling_layers, "modules": None}
    roll_out(policy, *SHAPES["4 x 8 of 24"])
    for shape, sizes in SHAPES.items():
        found = {name: [] for name in ways}
        for _ in range(options.rounds):
            drawn = []
            for name, layers in ways.items():
                policy.sampling_layers = layers
                milliseconds, rows = roll_out(policy, *sizes)
                found[name].append(milliseconds)
                drawn.append(rows)
            assert drawn[0] == drawn[1], "the two ways drew something else"
        for name, values in found.items():
            print(f"{shape}  {name:<10}", *(f"{value:6.1f}" for value in values), flush=True)
    if options.profile:
        policy.sampling_layers = ways["own layers"]
        with torch.profiler.profile(record_shapes=True) as profile:
            roll_out(policy, *SHAPES["2 x 8 of 200"])
        averages = profile.key_averages(group_by_input_shape=True)
        print(averages.table(sort_by="self_cpu_time_total", row_limit=40))


if __name__ == "__main__":
    main()
