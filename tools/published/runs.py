"""The published peaks: each expressed as a step, with what had to be assumed.

Every assumption was written down before the prediction was looked at, but for Axolotl's allocator
settings and its emptied cache, which were read in its source afterwards (they moved Ministral from
-1.4 to -2.7%, Apertus from -0.4 to -2.1%, AFM from -8.3 to -8.5%). None is adjusted: what does not
match stays.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace

from lowmem_grpo.memory.allocator import MIB, AllocatorSettings
from lowmem_grpo.memory.simulate import simulate

from . import losses
from .qlora import Step, trace_step
from .row import Row

GIB = 1024 * MIB
CONTEXT = (300 * MIB, 600 * MIB)  # what a process holds outside the allocator
A100 = SimpleNamespace(compute_capability=(8, 0), multiprocessors=108)
RTX_4090 = SimpleNamespace(compute_capability=(8, 9), multiprocessors=128)
ALLOCATED, RESERVED, DEVICE = "allocated", "reserved", "device use"


@dataclass(frozen=True)
class Run:
    """A step whose peak somebody published, in GiB. `number`: what it most likely is."""

    name: str
    step: Step
    published: float
    number: str
    assumed: str
    note: str = ""
    allocator: AllocatorSettings | None = None


LLAMA_FACTORY = (
    "LLaMA-Factory's defaults of 2024, read in its source: adapters on all linear layers, dropout "
    "0, float32 adapters, checkpointing without reentrance. Not checked: 16-bit autocast, the loss "
    "of transformers at that time (float32 logits of all tokens, and a shifted copy), AdamW "
    "foreach, an A100; a GB is nvidia-smi's, 2^30 bytes; context 300 to 600 MiB, its middle "
    "predicted"
)
WHOLE_GB = (
    "published in whole GB: if they were rounded up, all four lie within the range of the context; "
    "if to the nearest, 4K is at least 0.35 GiB too low and 16K 0.1"
)
AXOLOTL = (
    "read in Axolotl's source and documents: embedding and head in bf16, dropout 0.05, expandable "
    "segments, 16 roundup divisions, cache emptied after loading; such numbers are "
    "device_mem_reserved. Not checked: one row of 2 x 2048 tokens with documents of about 256, "
    "float32 adapters under autocast, PEFT's layers (its own LoRA kernels want dropout 0), "
    "checkpointing with reentrance, cut cross entropy in the dtype of the head; an A100 (Hopper's "
    "workspaces: 48 MiB more)"
)
TORCHTUNE = (
    "read in torchtune's source: all linear layers, rank 8, adapters in bf16, fused AdamW, logits "
    "in bf16 in 8 parts, the loss compiled. Not checked: NF4 laid out as bitsandbytes does; layers "
    "not compiled. Its table says peak memory: taken as reserved"
)
NOT_COMPILED = (
    "too high: uncompiled layers leave 0.6 GiB free in pieces of 112 MiB, which are too short for "
    "the parts of the logits (125 MiB). If the number is the allocated peak, the prediction is "
    "7.65 (+3.4%)"
)
PUBLIC_FINE_TUNE = "sizes from the config of a public fine-tune"


def _llama_factory(tokens: int, published: float) -> Run:
    step = Step("llama-2-7b", tokens, 8, losses.full_logits, A100)
    name = f"LLaMA-Factory: Llama-2-7B r 8, 1 x {tokens // 1024}K"
    return Run(name, step, published, DEVICE, LLAMA_FACTORY, WHOLE_GB)


def _axolotl(config: str, name: str, published: float, note: str) -> Run:
    step = Step(
        config, 4096, 32, losses.cut, A100, documents=16, dropout=0.05, optimizer="8bit",
        reentrant=True, empties=True,
    )  # fmt: skip
    name = f"Axolotl: {name} r 32, 2 x 2048"
    allocator = AllocatorSettings(expandable_segments=True, roundup_power2_divisions=16)
    return Run(name, step, published, RESERVED, AXOLOTL, note, allocator)


RUNS = (
    _llama_factory(4096, 9),
    _llama_factory(8192, 12),
    _llama_factory(16384, 19),
    _llama_factory(32768, 32),
    _axolotl("ministral-8b", "Ministral-8B", 8.76, ""),
    _axolotl(
        "apertus-8b", "Apertus-8B", 8.7,
        f"{PUBLIC_FINE_TUNE}; the activation is the CUDA package that the recipe recommends",
    ),
    _axolotl(
        "afm-4.5b", "AFM-4.5B", 7.8,
        f"{PUBLIC_FINE_TUNE}; its squared ReLU runs in float32 under autocast, and so do the "
        "hidden states after it. Why it is too low is not known: at the peak five float32 tensors "
        "of 288 MiB live in the last MLP, and two more would make up for it",
    ),
    Run(
        "torchtune: Llama-3.1-8B r 8, 2 x 2048",
        Step(
            "llama-3.1-8b", 4096, 8, losses.chunked, RTX_4090, documents=2, peft=False,
            optimizer="fused",
        ),
        7.4,
        RESERVED,
        TORCHTUNE,
        NOT_COMPILED,
    ),
)  # fmt: skip


def predict(run: Run) -> Row:
    """Trace and simulate one run."""
    usage = simulate(trace_step(run.step), run.allocator)
    low, high = ((usage.peak_reserved + context) / GIB for context in CONTEXT)
    numbers = {
        ALLOCATED: usage.peak_allocated / GIB,
        RESERVED: usage.peak_reserved / GIB,
        DEVICE: (low + high) / 2,
    }
    return Row(
        run.name,
        run.number,
        "GiB",
        numbers[run.number],
        run.published,
        run.note,
        numbers[ALLOCATED],
        numbers[RESERVED],
        (low, high),
        run.assumed,
    )
