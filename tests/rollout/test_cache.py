"""The wave's cache against attention row by row, while rows and whole problems leave."""

import pytest
import torch

from lowmem_grpo.policy.attention import PackedLayout
from lowmem_grpo.rollout import cache as cache_module
from lowmem_grpo.rollout.cache import Prefill, WaveCache, padded_length
from lowmem_grpo.rollout.stored import Stored, moved_down

HEADS, KV_HEADS, SIZE, SCALING = 6, 2, 8, 0.3


def rounded(x):
    """To 127 steps of a token's largest number either way."""
    step = x.abs().amax(-1, keepdim=True) / 127
    return (x / step).round() * step


class Rows:
    """The same rows, each with a list of its own keys and values: nothing is shared."""

    def __init__(self, lengths, counts, key, value, bits=16):
        self.bits = bits
        key, value = self.held(key), self.held(value)
        self.rows, start = [], 0
        for length, count in zip(lengths, counts, strict=True):
            own = slice(start, start + length)
            self.rows += [(key[0, :, own], value[0, :, own]) for _ in range(count)]
            start += length

    def held(self, x):
        return rounded(x) if self.bits == 8 else x

    def keep(self, going):
        self.rows = [self.rows[i] for i in going]

    def attend(self, query, key, value, window):
        key, value, out = self.held(key), self.held(value), []
        for r, (keys, values) in enumerate(self.rows):
            keys = torch.cat([keys, key[0, :, r : r + 1]], 1)
            values = torch.cat([values, value[0, :, r : r + 1]], 1)
            self.rows[r] = keys, values
            if window is not None:
                keys, values = keys[:, -window:], values[:, -window:]
            for head in range(HEADS):
                shared = head // (HEADS // KV_HEADS)
                weights = (query[0, head, r] @ keys[shared].T * SCALING).softmax(-1)
                out.append(weights @ values[shared])
        return torch.stack(out).view(1, len(self.rows), HEADS, SIZE)


def random(generator, heads, tokens):
    return torch.randn(1, heads, tokens, SIZE, generator=generator)


def qkv(generator, tokens):
    return (
        random(generator, HEADS, tokens),
        random(generator, KV_HEADS, tokens),
        random(generator, KV_HEADS, tokens),
    )


@pytest.mark.parametrize("bits", [16, 8])
@pytest.mark.parametrize("short", [0, 10**9], ids=["copied", "shared"])
@pytest.mark.parametrize("window", [None, 1, 4, 100])
@pytest.mark.parametrize(
    ("lengths", "counts", "leaving"),
    [
        ([5], [3], {}),
        ([1], [1], {}),
        ([5, 2, 7], [2, 2, 2], {}),
        ([3, 1, 8], [1, 4, 2], {}),
        ([3, 6], [3, 3], {0: [0, 2, 3, 4, 5], 3: [0, 1]}),
        ([3, 6, 4, 2], [2, 3, 1, 3], {1: [0, 1, 5, 7], 2: [2, 3], 4: [1]}),
    ],
    ids=str,
)
def test_decoding_against_rows_by_themselves(
    monkeypatch, lengths, counts, leaving, window, bits, short
):
    monkeypatch.setattr(cache_module, "SHORT", short)
    generator = torch.Generator().manual_seed(0)
    cache = WaveCache(lengths, counts, capacity=6, device="cpu", bits=bits)
    layout = PackedLayout(tuple((n, ()) for n in lengths), "sdpa", torch.device("cpu"))
    prefill, twins = Prefill(cache, layout), {}
    for layer in (0, 1):
        query, key, value = qkv(generator, sum(lengths))
        found = prefill.attend(layer, query, key, value, SCALING, window)
        assert torch.equal(found, layout.attend(layer, query, key, value, SCALING, window))
        twins[layer] = Rows(lengths, counts, key, value, bits)
    problems = [i for i, count in enumerate(counts) for _ in range(count)]
    for t in range(6):
        if t in leaving:
            cache.keep(torch.tensor(leaving[t]))
            problems = [problems[i] for i in leaving[t]]
            for twin in twins.values():
                twin.keep(leaving[t])
            # Neither rows nor prompts that nobody needs are held any longer.
            for held, most in ((cache.prompts, len(set(problems))), (cache.own, len(problems))):
                tensors = [t for pair in held.values() for x in pair for t in (x.numbers, x.scales)]
                assert {len(t) for t in tensors if t is not None} == ({most} if held else set())
            assert bool(cache.prompts) == bool(short)  # or in each row
        assert cache.positions().tolist() == [lengths[i] + t for i in problems]
        for layer, twin in twins.items():
            query, key, value = qkv(generator, len(problems))
            found = cache.attend(layer, query, key, value, SCALING, window)
            torch.testing.assert_close(found, twin.attend(query, key, value, window))
        cache.advance()


def test_layers_with_and_without_a_window_take_turns():
    generator = torch.Generator().manual_seed(0)
    cache = WaveCache([4], [2], capacity=5, device="cpu")
    layout = PackedLayout(((4, ()),), "sdpa", torch.device("cpu"))
    twins = {}
    for layer, window in ((0, 3), (1, None)):
        query, key, value = qkv(generator, 4)
        Prefill(cache, layout).attend(layer, query, key, value, SCALING, window)
        twins[layer] = Rows([4], [2], key, value)
    for _ in range(5):
        for layer, window in ((0, 3), (1, None)):
            query, key, value = qkv(generator, 2)
            found = cache.attend(layer, query, key, value, SCALING, window)
            torch.testing.assert_close(found, twins[layer].attend(query, key, value, window))
        cache.advance()


def test_a_prompt_is_held_once():
    cache = WaveCache([10], [16], capacity=39, device="cpu")
    layout = PackedLayout(((10, ()),), "sdpa", torch.device("cpu"))
    Prefill(cache, layout).attend(0, *qkv(torch.Generator().manual_seed(0), 10), SCALING)
    assert sum(x.numbers.numel() for x in cache.prompts[0]) == 2 * KV_HEADS * 10 * SIZE


def test_a_short_prompt_is_copied_on_a_cpu_for_a_quarter_more_at_most():
    short = WaveCache([10, 3], [4, 4], capacity=40, device="cpu")
    assert short.copied == 10
    layout = PackedLayout(((10, ()), (3, ())), "sdpa", torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    Prefill(short, layout).attend(0, *qkv(generator, 13), SCALING)
    assert not short.prompts
    for tokens in range(40):
        short.attend(0, *qkv(generator, 8), SCALING)
        short.advance()
        # As they come, and at the end the prompt's ten and the capacity, no more.
        room = 10 + min(padded_length(tokens + 1), 40)
        assert {x.numbers.numel() for x in short.own[0]} == {8 * KV_HEADS * room * SIZE}


def test_eight_bits_are_half_of_sixteen_and_a_scale_a_token():
    cache = WaveCache([10], [3], capacity=7, device="cpu", bits=8)
    layout = PackedLayout(((10, ()),), "sdpa", torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    Prefill(cache, layout).attend(0, *qkv(generator, 10), SCALING)
    cache.attend(0, *qkv(generator, 3), SCALING)
    for pair, tokens in ((cache.prompts[0], 10), (cache.own[0], 3 * 7)):
        for x in pair:
            assert x.numbers.dtype == torch.int8
            assert x.numbers.numel() == KV_HEADS * tokens * SIZE
            assert x.scales.numel() == KV_HEADS * tokens


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("axis", [-1, -2])
def test_what_is_stored_in_eight_bits_is_off_by_half_a_step_at_most(dtype, axis):
    x = torch.randn(3, 2, 5, 8, generator=torch.Generator().manual_seed(1)) * 4
    x[0, 0, 0], x[1, 1] = 0.0, 1e-5  # nothing, and next to nothing
    x = x.to(dtype)
    found = Stored.of(x, 8, axis).wide()
    assert found.dtype == dtype
    step = x.float().abs().amax(axis, keepdim=True) / 127
    # One rounding to int8, and one of the scale and of the product to the dtype.
    slack = 2 * torch.finfo(dtype).eps * x.float().abs() + torch.finfo(dtype).tiny
    limit = 0.5 * step * (1 + torch.finfo(dtype).eps) + slack
    assert ((found.float() - x.float()).abs() <= limit + 127 * step * torch.finfo(dtype).eps).all()


def test_lengths_are_rounded_up_to_eighths_of_an_octave():
    lengths = [padded_length(tokens) for tokens in range(1, 5000)]
    for tokens, length in enumerate(lengths, 1):
        assert tokens <= length < max(tokens + 16, tokens * 1.125 + 1)
        assert length % 16 == 0
    assert lengths == sorted(lengths)
    for low in (128, 256, 512, 1024, 2048):
        assert len(set(lengths[low : 2 * low])) == 8


def test_rows_move_down_in_place():
    x = torch.arange(24.0).view(6, 4)
    kept = moved_down(x, [0, 2, 5])
    assert kept.untyped_storage().data_ptr() == x.untyped_storage().data_ptr()
    assert kept.tolist() == [[0, 1, 2, 3], [8, 9, 10, 11], [20, 21, 22, 23]]
