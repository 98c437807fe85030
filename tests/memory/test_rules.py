"""The rules for what CUDA allocates out of sight, on fake CPU tensors.

Numbers marked as seen come from a recorded run on a card; the others are the sources' formulas,
worked by hand.
"""

import ast
import functools
import importlib.util
import itertools
from pathlib import Path
from types import SimpleNamespace

import bitsandbytes as bnb
import pytest
import torch
from bitsandbytes.functional import QuantState
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention.varlen import varlen_attn

from lowmem_grpo.memory.gemm_4bit import is_fused
from lowmem_grpo.memory.rules import RULES, CudaRules, StandInAdam8bit
from lowmem_grpo.memory.trace import trace

CUBLAS, CUBLAS_LARGE = 8_519_680, 33_554_432


def card(major, minor, multiprocessors=128):
    return SimpleNamespace(compute_capability=(major, minor), multiprocessors=multiprocessors)


ADA, TURING, HOPPER = card(8, 9), card(7, 5, 40), card(9, 0, 132)


def hidden(step, on=ADA, workspaces=False):
    """Signed bytes that the rules added to one call of `step` on fake tensors."""
    with FakeTensorMode():
        events = trace(step(), 1, rules=CudaRules(on))
    added = [e for e in events if e.component == "workspace"]
    kept = workspaces or (CUBLAS, CUBLAS_LARGE)
    added = [e for e in added if workspaces or e.size not in kept]
    return [e.size if e.action == "alloc" else -e.size for e in added]


def test_the_table_names_operations_that_exist():
    assert len({rule.name for rule in RULES}) == len(RULES)
    for rule in RULES:
        assert rule.known in ("source", "snapshot")
        assert rule.source
        for operation in rule.operations:
            namespace, _, name = operation.partition("::")
            if name:
                assert hasattr(getattr(torch.ops, namespace), name), operation


def test_without_rules_nothing_is_added():
    x = torch.ones(8, 8, requires_grad=True)
    assert all(e.component != "workspace" for e in trace(lambda: (x @ x).sum().backward(), 1))


@pytest.mark.parametrize(
    ("on", "size"),
    [
        (ADA, CUBLAS),
        (TURING, CUBLAS),
        (HOPPER, CUBLAS_LARGE),
        (card(12, 0), CUBLAS_LARGE),
        (card(10, 0), CUBLAS_LARGE),
    ],
)
def test_each_thread_gets_one_cublas_workspace_and_keeps_it(on, size):
    def make():
        x = torch.ones(8, 8, requires_grad=True)

        def step():
            (x @ x).sum().backward()
            (x @ x).sum().backward()

        return step

    assert hidden(make, on, workspaces=True) == [size, size]
    assert hidden(lambda: lambda: torch.ones(3) + 1, on, workspaces=True) == []


def nf4_product(rows, dtype=torch.bfloat16, out=256, inside=512, nested=True):
    """A product with a double-quantised NF4 weight of [out, inside]."""

    def make():
        blocks = out * inside // 64
        second = QuantState(
            torch.empty(-(-blocks // 256)), code=torch.empty(256), blocksize=256,
            dtype=torch.float32,
        )  # fmt: skip
        state = QuantState(
            torch.empty(blocks, dtype=torch.uint8 if nested else torch.float32),
            shape=torch.Size((out, inside)), code=torch.empty(16), blocksize=64, quant_type="nf4",
            dtype=dtype, offset=torch.empty(()) if nested else None,
            state2=second if nested else None,
        )  # fmt: skip
        weight = torch.empty(out * inside // 2, 1, dtype=torch.uint8)
        x = torch.empty(rows, inside, dtype=dtype)
        return lambda: bnb.matmul_4bit(x, weight, state)

    return make


def test_a_4bit_product_of_many_rows_holds_the_weight():
    absmax, weight = 4 * 256 * 512 // 64, 2 * 256 * 512
    held = [absmax, absmax, weight]
    assert hidden(nf4_product(2000)) == [*held, *(-size for size in held)]
    assert hidden(nf4_product(2000, nested=False)) == [weight, -weight]
    assert hidden(nf4_product(2000, torch.float32, nested=False)) == [2 * weight, -2 * weight]


def test_a_4bit_product_of_few_rows_is_fused():
    assert hidden(nf4_product(4), workspaces=True) == []
    assert hidden(nf4_product(4), HOPPER, workspaces=True) == []
    unknown = card(8, 9, None)
    assert hidden(nf4_product(4), unknown) == []
    assert hidden(nf4_product(8), ADA) == []
    assert len(hidden(nf4_product(8), unknown)) == 6  # who does not know must not promise


def bitsandbytes_choice():
    """bitsandbytes' own function, which asks the driver when imported whole: taken by its name."""
    root = Path(importlib.util.find_spec("bitsandbytes").submodule_search_locations[0])
    tree = ast.parse((root / "backends/cuda/ops.py").read_text())
    name = "_gemm_4bit_use_custom_cuda"
    functions = [n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == name]
    if not functions:
        pytest.skip(f"this bitsandbytes has no {name}")
    card_now = {}
    scope = {
        "functools": functools,
        "torch": torch,
        "_GEMM_4BIT_CUSTOM_FLOOR_M": 4,
        "_gpu_dispatch_props": lambda index: card_now["properties"],
    }
    exec(compile(ast.Module(functions, []), "ops.py", "exec"), scope)

    def choice(capability, multiprocessors, dtype, rows, shape):
        card_now["properties"] = multiprocessors, *capability
        return scope[name].__wrapped__(0, dtype, rows, *shape)

    return choice


def test_the_choice_of_the_4bit_product_is_the_installed_bitsandbytes():
    choice = bitsandbytes_choice()
    cards = [
        ((6, 1), 20), ((7, 0), 80), ((7, 5), 40), ((8, 0), 108), ((8, 6), 28), ((8, 6), 84),
        ((8, 7), 16), ((8, 9), 34), ((8, 9), 128), ((9, 0), 132), ((10, 0), 148), ((11, 0), 20),
        ((12, 0), 36), ((12, 0), 84), ((12, 0), 170), ((12, 1), 48),
    ]  # fmt: skip
    wide = [64, 320, 576, 960, 1536, 2048, 2560, 3584, 4096, 5632, 8192, 10240, 12288, 14336, 25600]
    rows = [4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 16, 17, 23, 24, 32, 33, 48, 49, 64, 65, 96, 97, 128]
    rows += [129, 192, 193, 256, 257, 320, 321, 384, 385, 512, 513, 1536]
    dtypes = (torch.float16, torch.bfloat16, torch.float32)
    for (capability, count), dtype in itertools.product(cards, dtypes):
        name = str(dtype).removeprefix("torch.")
        for out, inside, many in itertools.product(wide, wide, rows):
            ours = is_fused(capability, count, name, many, (out, inside), 64)
            theirs = choice(capability, count, dtype, many, (out, inside))
            assert ours == theirs, (capability, count, name, many, out, inside)
    assert not is_fused((8, 9), 128, "float16", 1537, (4096, 4096), 64)
    assert not is_fused((8, 9), 128, "float16", 1, (4096, 4100), 64)


def test_flash_backward_of_ragged_sequences():
    """300 and 212 queries, 8 heads over 2 of 64, 600 keys."""

    def make():
        query = torch.empty(512, 8, 64, dtype=torch.bfloat16, requires_grad=True)
        key, value = (
            torch.empty(600, 2, 64, dtype=torch.bfloat16, requires_grad=True) for _ in range(2)
        )
        ends = torch.empty(3, dtype=torch.int32)

        def step():
            out = varlen_attn(
                query, key, value, ends, ends, 300, 388, window_size=(-1, 0), enable_gqa=True
            )
            out.sum().backward()

        return step

    statistic, accumulator = 4 * 8 * (512 + 256), 4 * (512 + 256) * 8 * 64
    expanded = 2 * 600 * 8 * 64
    taken = [statistic, accumulator, expanded, expanded]
    assert hidden(make) == [*taken, *(-size for size in taken)]


def attention(on, dtype, tokens=1000, keys=None, mask=False, heads=32, size=64):
    def make():
        query = torch.empty(1, heads, tokens, size, dtype=dtype, requires_grad=True)
        key = torch.empty(1, heads, keys or tokens, size, dtype=dtype)
        bias = torch.ones(tokens, keys or tokens, dtype=torch.bool) if mask else None

        def step():
            sdpa = torch.nn.functional.scaled_dot_product_attention
            sdpa(query, key, key, attn_mask=bias, is_causal=not mask).sum().backward()

        return step

    with FakeTensorMode():
        events = trace(make(), 1, rules=CudaRules(on))
    return events, [
        e.size if e.action == "alloc" else -e.size for e in events if e.component == "workspace"
    ]


def test_efficient_attention_in_float32_as_seen():
    events, added = attention(card(8, 0), torch.float32)
    product, rows, workspace = 8_192_000, 128_000, 8_396_800
    assert added == [product, rows, rows, -rows, -product, workspace, -rows, -workspace]
    sizes = [e.size for e in events if e.action == "alloc"]
    assert 131_072 in sizes  # the row statistic, for 1024 rows
    assert max(sizes) < 32 * 1000 * 1000 * 4  # no matrix of scores


def test_which_attention_a_card_runs():
    half = 32 * 1024 * 64 * 4
    _, flash = attention(ADA, torch.float16)
    assert flash[:2] == [4 * 32 * 1024, half]
    _, efficient = attention(TURING, torch.float16)
    assert efficient[:2] == [8_192_000, 8_192_000]  # results and gradients in float32
    events, masked = attention(ADA, torch.float16, tokens=20, keys=30, mask=True)
    assert masked[0] == 20 * 32 * 64 * 4
    sizes = [e.size for e in events if e.action == "alloc"]
    assert 2 * 20 * 30 in sizes
    assert 2 * 20 * 32 in sizes  # rows of a mask are padded to 8 elements


def test_dropout_keeps_a_mask_of_bytes():
    def make():
        x = torch.ones(100, requires_grad=True)
        return lambda: torch.nn.functional.dropout(x, 0.5).sum().backward()

    with FakeTensorMode():
        seen = [e.size for e in trace(make(), 1, rules=CudaRules(ADA)) if e.action == "alloc"]
        bare = [e.size for e in trace(make(), 1) if e.action == "alloc"]
    assert 100 in seen
    assert 100 not in bare


@pytest.mark.parametrize(
    ("rows", "columns", "steps"),
    [
        (64, 4096, []),
        (1, 5000, [8 * 5000, 12 * 5000]),
        (4, 5000, [160_000, 160_000, 80_000, 240_000, -240_000, -80_000, 160_000]),
        (200, 5000, [8_000_000, 12_000_000]),
    ],
)
def test_sort(rows, columns, steps):
    def make():
        x = torch.empty(rows, columns)
        return lambda: x.sort(descending=True)

    found = hidden(make)
    assert found[: len(steps)] == steps
    assert sum(found) == 0


@pytest.mark.parametrize("numel", [4095, 4096, 70_000])
def test_the_state_of_adam_in_8_bits(numel):
    def sizes(optimizer, parameter):
        state = optimizer.state[parameter].items()
        names = ("state1", "state2", "absmax1", "absmax2")
        return {k: (v.dtype, tuple(v.shape)) for k, v in state if k in names}

    parameter = torch.nn.Parameter(torch.zeros(numel))
    real = bnb.optim.AdamW8bit([parameter])
    real.init_state(real.param_groups[0], parameter, 0, 0)
    stand_in = StandInAdam8bit([parameter])
    stand_in.step()
    assert not sizes(stand_in, parameter)  # nothing to learn from yet
    parameter.grad = torch.zeros(numel)
    stand_in.step()
    assert sizes(stand_in, parameter) == sizes(real, parameter)


def test_paged_moments_are_not_in_the_allocator():
    def allocated(paged):
        def make():
            parameter = torch.nn.Parameter(torch.zeros(100_000))
            optimizer = StandInAdam8bit([parameter], paged=paged)

            def step():
                parameter.grad = torch.zeros(100_000)
                optimizer.step()

            return step

        with FakeTensorMode():
            return sum(e.size for e in trace(make(), 1) if e.action == "alloc")

    assert allocated(False) - allocated(True) == 2 * 100_000
