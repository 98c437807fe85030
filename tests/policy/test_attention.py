"""Shared-prefix attention: every backend against the definition, alone and inside models."""

import inspect
import sys
import types

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from lowmem_grpo.memory.simulate import add_up
from lowmem_grpo.memory.trace import Recorder
from lowmem_grpo.policy.attention import BACKENDS, PackedLayout, _Gather, naive_attention
from lowmem_grpo.policy.tiled_attention import Limits, _tiles, tiled_attention
from lowmem_grpo.rollout.cache import Prefill, WaveCache
from tests.grpo.policies import open_policy, plain_forward
from tests.policy import standins
from tests.tiny import make_tiny_model

CPU = torch.device("cpu")
GROUPS = {
    "unequal completions": ((5, (3, 1, 4)), (2, (2, 2))),
    "equal completions": ((7, (5, 5, 5)),),
    "empty and single": ((3, (0, 1, 0, 2)), (4, (0, 0))),
    "prompt of one": ((1, (3, 3)), (1, (1, 2))),
    "without completions": ((4, ()), (2, (1,)), (3, ())),
    "one token": ((1, ()),),
}
WINDOWS = [None, 1, 2, 4, 100]
HEADS = [(4, 2), (3, 1), (2, 2)]


@pytest.fixture(autouse=True)
def flash_calls(monkeypatch):
    """Both flash libraries are the stand-ins; returns the keyword arguments of every call."""
    calls = []

    def counted(function):
        def call(*args, **kwargs):
            calls.append((function.__name__, kwargs))
            return function(*args, **kwargs)

        return call

    package = types.ModuleType("flash_attn")
    package.flash_attn_varlen_func = counted(standins.flash_attn_varlen_func)
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    try:
        import torch.nn.attention.varlen as varlen
    except ImportError:  # torch before 2.10
        varlen = types.ModuleType("torch.nn.attention.varlen")
        monkeypatch.setitem(sys.modules, "torch.nn.attention.varlen", varlen)
    monkeypatch.setattr(varlen, "varlen_attn", counted(standins.varlen_attn), raising=False)
    return calls


def make_qkv(groups, heads, kv_heads, size=8, dtype=torch.float32):
    """Query, key and value as transformers has them: views [1, heads, T, E] of [1, T, heads E]."""
    generator = torch.Generator().manual_seed(len(groups) + heads)
    tokens = PackedLayout(groups, "sdpa", CPU).tokens
    made = []
    for count in (heads, kv_heads, kv_heads):
        x = torch.randn(1, tokens, count * size, generator=generator).to(dtype)
        made.append(x.view(1, tokens, count, size).transpose(1, 2).requires_grad_())
    return made


def outputs_and_gradients(attend, qkv):
    out = attend(*qkv)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(9)).to(out.dtype)
    return out, *torch.autograd.grad((out * weights).sum(), qkv)


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize(("heads", "kv_heads"), HEADS)
@pytest.mark.parametrize("groups", GROUPS.values(), ids=GROUPS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_backend_computes_the_definition(backend, groups, heads, kv_heads, window, flash_calls):
    qkv = make_qkv(groups, heads, kv_heads)
    layout = PackedLayout(groups, backend, CPU)
    found = outputs_and_gradients(lambda q, k, v: layout.attend(0, q, k, v, 0.4, window), qkv)
    expected = outputs_and_gradients(
        lambda q, k, v: naive_attention(groups, q, k, v, 0.4, window), qkv
    )
    for mine, theirs in zip(found, expected, strict=True):
        assert mine.shape == theirs.shape
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)
    called = {"flash_attn": ["flash_attn_varlen_func"], "torch_varlen": ["varlen_attn"]}
    assert [name for name, _ in flash_calls] == called.get(backend, [])


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("groups", GROUPS.values(), ids=GROUPS)
def test_the_definition_is_one_mask_over_the_packed_tokens(groups, window):
    q, k, v = make_qkv(groups, 2, 2)
    owner, position = [], []  # (group, completion or None for the prompt), place in its own row
    for g, (prompt, completions) in enumerate(groups):
        owner += [(g, None)] * prompt
        position += range(prompt)
        for c, length in enumerate(completions):
            owner += [(g, c)] * length
            position += range(prompt, prompt + length)
    seen = torch.tensor(
        [
            [
                key in (owner[i], (owner[i][0], None))
                and position[j] <= position[i]
                and (window is None or position[j] > position[i] - window)
                for j, key in enumerate(owner)
            ]
            for i in range(len(owner))
        ]
    )
    scores = (q @ k.transpose(2, 3) * 0.4).masked_fill(~seen, -torch.inf)
    expected = (scores.softmax(-1) @ v).transpose(1, 2)
    torch.testing.assert_close(naive_attention(groups, q, k, v, 0.4, window), expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_half_precision_goes_in_and_comes_out(backend):
    groups = GROUPS["unequal completions"]
    qkv = make_qkv(groups, 4, 2, dtype=torch.bfloat16)
    out = PackedLayout(groups, backend, CPU).attend(0, *qkv, 0.4)
    assert out.dtype == torch.bfloat16
    expected = naive_attention(groups, *(x.float() for x in qkv), 0.4)
    torch.testing.assert_close(out.float(), expected, rtol=0.02, atol=0.02)


class _Operations(TorchDispatchMode):
    """The names of the operations that run within."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.seen.add(function._schema.name)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("groups", GROUPS.values(), ids=GROUPS)
def test_gradients_of_gathered_keys_are_added_in_float32_and_in_order(groups, dtype):
    layout = PackedLayout(groups, "torch_varlen", CPU)
    shape = layout.tokens, 3, 5
    gathered = torch.randn(len(layout.key_index), *shape[1:]).to(dtype)
    exact = torch.zeros(shape, dtype=torch.float64)
    exact.index_add_(0, layout.key_index, gathered.double())  # the naive twin
    found, operations = [], _Operations()
    for _ in range(2):
        x = torch.randn(shape).to(dtype).requires_grad_()
        out = _Gather.apply(x, layout)
        torch.testing.assert_close(out, x.detach()[layout.key_index], rtol=0, atol=0)
        with operations:
            found += torch.autograd.grad(out, x, gathered)
    # Rounded once: nothing is nearer in that dtype but where float32 itself had to round.
    torch.testing.assert_close(found[0].double(), exact, rtol=torch.finfo(dtype).eps, atol=1e-6)
    assert torch.equal(*found)
    # Which a card would run by atomics, in that dtype.
    assert not {name for name in operations.seen if "index" in name or "scatter" in name}


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_completion_does_not_see_its_siblings(backend):
    groups = ((4, (3, 3)),)
    q, k, v = make_qkv(groups, 4, 2)
    layout = PackedLayout(groups, backend, CPU)
    before = layout.attend(0, q, k, v, 0.4)
    with torch.no_grad():
        k[:, :, 4:7] += 1.0
        v[:, :, 4:7] += 1.0
    after = layout.attend(0, q, k, v, 0.4)
    changed = (before != after).any(dim=(0, 2, 3))
    assert changed.tolist() == [False] * 4 + [True] * 3 + [False] * 3


# Tiles --------------------------------------------------------------------------------------------

TILED = {  # with what limits make of them: see `test_what_is_in_a_tile`
    **GROUPS,
    "many of each kind": ((11, (6, 6, 6, 2, 13, 0, 1, 1, 1, 9)), (1, (1, 17, 3, 4, 2))),
}
LIMITS = {
    "one tile a length": Limits(joined=0),
    "all joined": Limits(),
    "some joined": Limits(joined=4 * 49),
    "blocks of queries": Limits(queries=4, joined=0),
    "few scores": Limits(scores=150),
    "one query": Limits(scores=1),
}


@pytest.mark.parametrize("window", [None, 1, 3, 7])
@pytest.mark.parametrize("limits", LIMITS.values(), ids=LIMITS)
@pytest.mark.parametrize("groups", TILED.values(), ids=TILED)
def test_tiles_of_any_size_compute_the_definition(groups, limits, window):
    qkv = make_qkv(groups, 4, 2)
    found = outputs_and_gradients(
        lambda q, k, v: tiled_attention(groups, q, k, v, 0.4, window, limits), qkv
    )
    expected = outputs_and_gradients(
        lambda q, k, v: naive_attention(groups, q, k, v, 0.4, window), qkv
    )
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("window", [None, 1, 3, 7])
@pytest.mark.parametrize("limits", LIMITS.values(), ids=LIMITS)
@pytest.mark.parametrize("groups", TILED.values(), ids=TILED)
def test_tiles_have_every_query_once_and_keep_their_limits(groups, limits, window):
    rows = []
    for tile in _tiles(groups, 4, 2, window, limits):
        rows += range(tile.rows.start, tile.rows.stop)
        own = (tile.own.stop - tile.own.start) // tile.count
        queries = tile.count * tile.queries
        assert tile.queries <= limits.queries
        assert 4 * queries * (tile.shared + own) <= limits.scores or queries == 1
        assert not tile.breaks or 4 * own**2 <= limits.joined
        assert window is None or tile.shared + own <= window + tile.queries - 1
    assert rows == list(range(2 * PackedLayout(groups, "tiled", CPU).tokens))


def test_what_is_in_a_tile():
    groups = TILED["many of each kind"][:1]

    def told(limits, window=None):
        tiles = _tiles(groups, 4, 2, window, limits)
        return [(tile.count, tile.queries, *tile.breaks) for tile in tiles if tile.shared]

    alone = [(3, 6), (1, 2), (1, 13), (3, 1), (1, 9)]
    assert told(Limits(joined=0)) == told(Limits(), window=12) == alone
    assert told(Limits(), window=24) == [(3, 6), (1, 15, 2), (3, 1), (1, 9)]
    assert told(Limits(queries=4, joined=0))[:3] == [(1, 3), (1, 3), (1, 3)]


@pytest.mark.parametrize("window", [None, 4])
def test_tiled_gradients_are_those_of_small_differences(window):
    groups, limits = ((3, (4, 1, 2, 2)), (2, (5,))), Limits(queries=3)
    qkv = make_qkv(groups, 4, 2, size=3, dtype=torch.float64)

    def attend(q, k, v):
        return tiled_attention(groups, q, k, v, 0.4, window, limits)

    assert torch.autograd.gradcheck(attend, qkv)


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 2)])
def test_tiled_gives_the_gradients_that_are_wanted(wanted):
    groups = GROUPS["unequal completions"]
    qkv = make_qkv(groups, 4, 2)
    expected = outputs_and_gradients(lambda q, k, v: naive_attention(groups, q, k, v, 0.4), qkv)
    for place, x in enumerate(qkv):
        x.requires_grad_(place in wanted)
    tiled_attention(groups, *qkv, 0.4).backward(
        torch.randn(expected[0].shape, generator=torch.Generator().manual_seed(9))
    )
    for place, x in enumerate(qkv):
        assert (x.grad is not None) == (place in wanted)
        if place in wanted:
            torch.testing.assert_close(x.grad, expected[1 + place], rtol=1e-5, atol=1e-5)


def test_tiled_saves_its_inputs_only():
    groups, saved = ((40, (60, 50)),), []
    qkv = make_qkv(groups, 4, 2, dtype=torch.bfloat16)

    def keep(tensor):
        saved.append(tensor.data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        tiled_attention(groups, *qkv, 0.4).sum()
    assert saved == [x.data_ptr() for x in qkv]


def test_tiled_holds_three_tensors_of_a_tile_at_once():
    groups = ((200, (150, 250, 150)),)
    qkv = make_qkv(groups, 4, 2)

    def peak(scores):
        limits = Limits(scores=scores)
        with Recorder() as recorder:
            outputs_and_gradients(
                lambda q, k, v: tiled_attention(groups, q, k, v, 0.4, limits=limits), qkv
            )
        return add_up(recorder.events).peak_allocated

    small, large = peak(40_000), peak(80_000)  # there are tiles of exactly so many scores
    assert 12 * 40_000 <= large - small < 13 * 40_000
    assert small - 13 * 40_000 < 4 * sum(x.numel() * x.element_size() for x in qkv)


def test_tiled_rounds_as_decoding_does():
    prompt, rows, length, heads, kv_heads, size, scaling = 30, 4, 10, 9, 3, 64, 0.09
    groups = ((prompt, (length,) * rows),)
    qkv = [x.detach() for x in make_qkv(groups, heads, kv_heads, size, torch.bfloat16)]
    found = tiled_attention(groups, *qkv, scaling)[:, prompt:].unflatten(1, (rows, length))
    cache = WaveCache([prompt], [rows], length, CPU)
    layout = PackedLayout(((prompt, ()),), "tiled", CPU)
    Prefill(cache, layout).attend(0, *(x[:, :, :prompt] for x in qkv), scaling)
    for t in range(length):
        decoded = cache.attend(0, *(x[:, :, prompt + t :: length] for x in qkv), scaling)
        cache.advance()
        # Sums of products may be in another order on another machine: that changes a few roundings.
        assert (found[:, :, t] == decoded).float().mean() > 0.95


@pytest.mark.parametrize("backend", BACKENDS)
def test_under_checkpointing_nothing_differs(backend):
    groups = GROUPS["unequal completions"]
    qkv = make_qkv(groups, 4, 2)
    layout = PackedLayout(groups, backend, CPU)

    def attend(q, k, v):
        return layout.attend(0, q, k, v, 0.4).relu()

    expected = outputs_and_gradients(attend, qkv)
    found = outputs_and_gradients(lambda *x: checkpoint(attend, *x, use_reentrant=False), qkv)
    assert all(mine.equal(theirs) for mine, theirs in zip(found, expected, strict=True))
    with torch.no_grad():
        assert attend(*qkv).equal(expected[0])


@pytest.mark.parametrize("device", ["cpu", "meta"])  # fake CUDA tensors: tests/fakecuda
def test_tiled_runs_without_values(device):
    groups = TILED["many of each kind"]
    tokens = PackedLayout(groups, "tiled", CPU).tokens
    with FakeTensorMode():
        qkv = [
            torch.empty(1, tokens, heads, 8, dtype=torch.bfloat16, device=device).transpose(1, 2)
            for heads in (4, 2, 2)
        ]
        out = tiled_attention(groups, *(x.requires_grad_() for x in qkv), 0.4, 7)
        gradients = torch.autograd.grad(out.sum(), qkv)
    assert (out.device.type, out.shape, out.is_contiguous()) == (device, (1, tokens, 4, 8), True)
    for mine, x in zip(gradients, qkv, strict=True):
        assert (mine.shape, mine.dtype, mine.stride()[1:]) == (x.shape, x.dtype, x.stride()[1:])


# The stand-ins themselves -------------------------------------------------------------------------


def test_stand_in_masks_are_those_of_flash_attns_documentation():
    # "if seqlen_q = 2 and seqlen_k = 5": 1 1 1 1 0 / 1 1 1 1 1
    assert standins.mask(2, 5, -1, 0).int().tolist() == [[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]
    # "if seqlen_q = 5 and seqlen_k = 2": 0 0 / 0 0 / 0 0 / 1 0 / 1 1
    assert standins.mask(5, 2, -1, 0).int().tolist() == [[0, 0], [0, 0], [0, 0], [1, 0], [1, 1]]
    assert standins.mask(2, 5, 1, 0).int().tolist() == [[0, 0, 1, 1, 0], [0, 0, 0, 1, 1]]
    assert standins.mask(2, 3, -1, -1).all()


def test_stand_ins_are_ordinary_attention_on_one_square_sequence():
    q, k, v = make_qkv(((6, ()),), 4, 2)
    expected = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, is_causal=True, enable_gqa=True
    )
    cu = torch.tensor([0, 6], dtype=torch.int32)
    arguments = [x[0].transpose(0, 1) for x in (q, k, v)] + [cu, cu, 6, 6]
    found = [
        standins.flash_attn_varlen_func(*arguments, causal=True),
        standins.varlen_attn(*arguments, window_size=(-1, 0), enable_gqa=True),
    ]
    for out in found:
        torch.testing.assert_close(out, expected[0].transpose(0, 1))
    with pytest.raises(ValueError, match="enable_gqa"):
        standins.varlen_attn(*arguments, window_size=(-1, 0))


def test_stand_in_keeps_sequences_apart_and_gives_zero_where_nothing_is_seen():
    q, k, v = (x[0].transpose(0, 1).detach() for x in make_qkv(((5, ()),), 2, 2))
    cu_q = torch.tensor([0, 3, 5], dtype=torch.int32)
    cu_k = torch.tensor([0, 1, 5], dtype=torch.int32)
    out = standins.flash_attn_varlen_func(q, k, v, cu_q, cu_k, 3, 4, causal=True)
    assert (out[:2] == 0).all()  # three queries, one key: only the last query sees it
    torch.testing.assert_close(out[2], v[0])
    alone = torch.tensor([0, 2], dtype=torch.int32), torch.tensor([0, 4], dtype=torch.int32)
    again = standins.flash_attn_varlen_func(q[3:], k[1:], v[1:], *alone, 2, 4, causal=True)
    torch.testing.assert_close(out[3:], again)


def test_stand_in_has_torchs_signature():
    varlen = pytest.importorskip("torch.nn.attention.varlen", reason="torch before 2.10")
    source = inspect.getsource(varlen)  # the function itself is replaced in this module
    for name in inspect.signature(standins.varlen_attn).parameters:
        assert f"    {name}: " in source.split("\ndef varlen_attn(")[1].split(") ->")[0]


# Inside models ------------------------------------------------------------------------------------

FULL, NEAR = (-1, 0), (3, 0)  # flash attention's windows: causal, and causal over four tokens
MIXED = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 4}
MODELS = {  # architecture: what differs from the tiny Llama, and the window of each layer
    "llama": ({}, [FULL, FULL]),  # grouped heads
    "qwen2": ({"use_sliding_window": True, **MIXED}, [NEAR, FULL]),  # biases
    "qwen3": ({"head_dim": 24}, [FULL, FULL]),  # norms of queries and keys; heads of another size
    "mistral": ({"sliding_window": 4}, [NEAR, NEAR]),
    "gemma3_text": ({"head_dim": 16, "query_pre_attn_scalar": 16, **MIXED}, [NEAR, FULL]),
}
PROMPT = [5, 17, 40, 41, 99, 3]
ROWS = [[7, 7, 60, 22, 9], [81], [], [30, 31, 32]]


@pytest.fixture(scope="module", params=MODELS)
def model(request, tmp_path_factory):
    directory = tmp_path_factory.mktemp(request.param)
    return open_policy(make_tiny_model(directory, request.param, **MODELS[request.param][0]))


def packed_logprobs(policy):
    """Log-probs [T, V] of the prompt and the rows, packed behind a group without completions."""
    ids = [11, 12, *PROMPT, *(token for row in ROWS for token in row)]
    start = len(PROMPT)
    positions = [0, 1, *range(start), *(start + i for row in ROWS for i in range(len(row)))]
    layout = policy.layout([(2, ()), (start, tuple(len(row) for row in ROWS))])
    hidden_TD = policy.hidden(torch.tensor(ids), torch.tensor(positions), layout)
    return policy.logits(hidden_TD).log_softmax(-1)


def separate_logprobs(policy):
    """The same by the model's own eager attention, each row alone."""
    found = [plain_forward(policy, [11, 12]), plain_forward(policy, PROMPT)]
    found += [plain_forward(policy, PROMPT + row)[len(PROMPT) :] for row in ROWS]
    return torch.cat(found).log_softmax(-1)


@pytest.mark.parametrize("backend", BACKENDS)
def test_packed_rows_are_separate_rows(model, backend, monkeypatch, flash_calls):
    monkeypatch.setattr(model, "attention", backend)
    expected = separate_logprobs(model)
    found = packed_logprobs(model)
    assert (found - expected).abs().max() < 1e-4
    weights = torch.randn(expected.shape, generator=torch.Generator().manual_seed(2))
    parameters = model.adapter_parameters()
    wanted = torch.autograd.grad((expected * weights).sum(), parameters.values())
    gradients = torch.autograd.grad((found * weights).sum(), parameters.values())
    for name, mine, theirs in zip(parameters, gradients, wanted, strict=True):
        assert (mine - theirs).norm() <= 1e-5 * theirs.norm(), name
    if backend == "torch_varlen":
        windows = MODELS[model.causal_lm.config.model_type][1]
        assert [options["window_size"] for _, options in flash_calls] == windows
