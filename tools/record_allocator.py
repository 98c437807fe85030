"""Record what torch's CUDA allocator holds under a random load: `tests/memory/recordings.jsonl.gz`.

    PYTORCH_ALLOC_CONF=expandable_segments:True python tools/record_allocator.py --seed 1 >> FILE

Needs a card of which nobody takes memory meanwhile; a small one (1 GB) runs out of memory now and
then, which is wanted. Prints one line of JSON: the options, the card's bytes (`total`, `free`), and
rows of [action, id, requested bytes, stream, allocated, reserved, whether it ran out of memory].
"""

import argparse
import json
import os
import random

import torch

KINDS = ((1, 4 << 10), (4 << 10, 1 << 20), (1 << 20, 10 << 20), (10 << 20, 40 << 20),
         (30 << 20, 90 << 20), (80 << 20, 200 << 20))  # fmt: skip
WEIGHTS = (3, 3, 4, 3, 2, 1)


def record(seed: int, count: int) -> dict:
    """`count` events on a fresh allocator; raises RuntimeError where it is not fresh."""
    torch.cuda.init()
    free, total = torch.cuda.mem_get_info()
    if torch.cuda.memory_reserved():
        raise RuntimeError("memory is reserved already: run this in a process of its own")
    rng, streams = random.Random(seed), (torch.cuda.default_stream(), torch.cuda.Stream())
    live, rows, sizes = {}, [], []
    for number in range(count):
        draw, row = rng.random(), None
        if draw < 0.02:
            torch.cuda.empty_cache()
            row = ["empty_cache", 0, 0, 0]
        elif draw < 0.55 or not live:
            size = _size(rng, sizes)
            sizes.append(size)
            stream = 0 if rng.random() < 0.85 else 1
            row = ["alloc", number, size, stream]
            with torch.cuda.stream(streams[stream]):
                try:
                    live[number] = torch.empty(size, dtype=torch.uint8, device="cuda")
                except torch.OutOfMemoryError:
                    rows.append([*row, *_held(), 1])
                    continue
        else:
            gone = rng.choice(list(live))
            del live[gone]
            row = ["free", gone, 0, 0]
        rows.append([*row, *_held(), 0])
    conf = os.environ.get("PYTORCH_ALLOC_CONF", "")
    retries = torch.cuda.memory_stats()["num_alloc_retries"]
    version = torch.__version__
    return {"conf": conf, "torch": version, "total": total, "free": free, "retries": retries,
            "rows": rows}  # fmt: skip


def _size(rng: random.Random, sizes: list[int]) -> int:
    """Often one that was asked for before, as in training; often whole MiB."""
    if sizes and rng.random() < 0.4:
        size = rng.choice(sizes)
    else:
        size = rng.randint(*rng.choices(KINDS, WEIGHTS)[0])
    return max(1, size >> 20 << 20) if rng.random() < 0.3 else size


def _held() -> tuple[int, int]:
    return torch.cuda.memory_allocated(), torch.cuda.memory_reserved()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--events", type=int, default=400)
    given = parser.parse_args()
    print(json.dumps(record(given.seed, given.events), separators=(",", ":")))
