"""A trace of a few layers, made deep, is the trace of the deep model: event by event."""

import json
from contextlib import nullcontext

import pytest
import torch

from lowmem_grpo.config import build_config
from lowmem_grpo.memory import decoding
from lowmem_grpo.memory import phases as phases_module
from lowmem_grpo.memory.card import PlanCard
from lowmem_grpo.memory.layers import TRACED, alike, base_id, deepened, shortened
from lowmem_grpo.memory.phases import Phases
from lowmem_grpo.memory.shapes import Tiles, Wave
from lowmem_grpo.memory.simulate import simulate
from lowmem_grpo.memory.trace import Recorder
from lowmem_grpo.policy import activations, norm
from lowmem_grpo.policy.skeleton import read_model_config
from tests.memory.test_plan import GIB, MODEL, configured
from tests.tiny import SHAPE

DEPTH = 7
CARD = PlanCard("A card", 8 * GIB, (8, 9), multiprocessors=128)
HOST = PlanCard("A host", 8 * GIB, None)
BATCHES = (((11, (7, 5, 1)), (4, (6, 6))), ((13, (9,)),))


def model_config(tmp_path, kind="llama", **changes):
    fields = {**MODEL, "model_type": kind, "num_hidden_layers": DEPTH, **changes}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    return read_model_config(str(tmp_path))


def told(part):
    """Events with ids in the order of their allocation, gradients that are met first."""
    ids = {id: place for place, id in enumerate(part.gradients)}
    for event in part.events:
        if event.action == "alloc" and event.id not in ids:
            ids[event.id] = len(ids)
    return [event._replace(id=ids[event.id]) for event in part.events]


def parts(
    config, built, card, attention, *, short, offloading=False, checkpointing=True,
    overlapping=False, mlp_tile=0, cache_bits=16, ends=(False, 16), objective=(False, "k3"),
):  # fmt: skip
    """The events of each part of a step."""
    config = config.settled(
        {
            "memory.embedding_on_host": ends[0],
            "model.lm_head_bits": ends[1],
            "grpo.sync_ref_model": objective[0],
            "grpo.kl_estimator": objective[1],
        },
        "test",
    )
    phases = Phases(config, built, card, dtype=torch.bfloat16, attention=attention)
    assert phases._short
    phases._short = short
    found = [phases._ready(config)]
    wave = Wave((5, 3), 2, 2, 4)
    how, tiles = (checkpointing, offloading, overlapping), Tiles(mlp_tile, 8, 999)
    found.append(phases._part(phases._roll_out, "rollout", wave, tiles, cache_bits, None))
    found.append(phases._part(phases._score, BATCHES, how, tiles, False))
    found.append(phases._part(phases._step))
    assert phases._short == short
    return found


@pytest.mark.parametrize(
    ("kind", "card", "attention", "case"),
    [
        ("llama", CARD, "torch_varlen", {}),
        ("llama", CARD, "torch_varlen", {"offloading": True}),
        (
            "qwen3",
            CARD,
            "torch_varlen",
            {
                "offloading": True,
                "overlapping": True,
                "mlp_tile": 10,
                "cache_bits": 8,
                "ends": (True, 8),
            },
        ),
        ("llama", CARD, "torch_varlen", {"checkpointing": False, "mlp_tile": 10}),
        ("llama", CARD, "sdpa", {"checkpointing": False}),
        ("qwen2", CARD, "torch_varlen", {"objective": (True, "exact")}),
        ("qwen3", CARD, "torch_varlen", {"checkpointing": False}),
        pytest.param("llama", HOST, "sdpa", {}, marks=pytest.mark.slow),
        ("llama", HOST, "tiled", {}),
    ],
)
def test_a_short_trace_made_deep_is_the_deep_one(
    tmp_path, monkeypatch, kind, card, attention, case
):
    monkeypatch.setattr(activations, "LEAST_BYTES", 1)
    monkeypatch.setattr(activations, "PAGE_BYTES", 1000)
    config, built = configured(tmp_path), model_config(tmp_path, kind)
    short = parts(config, built, card, attention, short=True, **case)
    whole = parts(config, built, card, attention, short=False, **case)
    for one, other in zip(short, whole, strict=True):
        assert told(one) == told(other)
        assert (one.kept, one.host) == (other.kept, other.host)
        assert len(one.gradients) == len(other.gradients)
    assert (short[2].host > 0) == ("offloading" in case)


def test_one_layer_stands_for_all_at_tokens_on_the_way(tmp_path, monkeypatch):
    config, built = configured(tmp_path), model_config(tmp_path)

    def peaks():
        phases = Phases(config, built, CARD, dtype=torch.bfloat16, attention="torch_varlen")
        phases._ready(config)
        wave = Wave((50, 50), 32, 1500, 1500)
        part = phases._part(phases._roll_out, "rollout", wave, Tiles(0, 8, 999), 16, None)
        usage = simulate(part.events)
        return usage.peak_allocated, usage.peak_reserved, len(part.events)

    allocated, reserved, events = peaks()
    monkeypatch.setattr(decoding, "_few_layers", lambda policy, recorder, few: nullcontext())
    of_all, reserved_of_all, more = peaks()
    assert allocated == of_all
    # Pieces that layers leave to each other may take a segment more: 2 MiB here.
    assert reserved <= reserved_of_all <= 1.01 * reserved
    assert more > 2 * events


@pytest.mark.parametrize("checkpointing", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_four_tiles_stand_for_all(tmp_path, monkeypatch, checkpointing):
    """Of norms and MLPs: the peaks of a step are the same."""
    monkeypatch.setattr(norm, "TILE_ELEMENTS", {"cpu": 256 * 5, "card": 256 * 5})
    config, built = configured(tmp_path), model_config(tmp_path)

    def peaks():
        how = {"short": True, "checkpointing": checkpointing, "mlp_tile": 4}
        found = parts(config, built, CARD, "torch_varlen", **how)
        usages = [simulate(part.events) for part in found[:3]]
        return [(u.peak_allocated, u.peak_reserved) for u in usages], len(found[2].events)

    few, events = peaks()
    monkeypatch.setattr(phases_module, "few_tiles", nullcontext)
    every, more = peaks()
    assert few == every
    assert more > 1.2 * events


def test_layers_that_differ_are_not_taken_to_be_alike(tmp_path):
    assert alike(model_config(tmp_path))
    assert not alike(model_config(tmp_path, num_hidden_layers=TRACED))
    mixed = model_config(
        tmp_path, "qwen2", use_sliding_window=True, sliding_window=8, max_window_layers=4
    )
    assert not alike(mixed)
    short = shortened(model_config(tmp_path, "qwen2"))
    assert short.num_hidden_layers == len(short.layer_types) == TRACED


class Stack(torch.nn.Module):
    """Layers, after one of which (`odd`) something is done that is done after no other."""

    def __init__(self, odd=None):
        super().__init__()
        self.layers = torch.nn.ModuleList(torch.nn.Linear(4, 4) for _ in range(TRACED))
        self.odd = odd

    def forward(self, x):
        for number, layer in enumerate(self.layers):
            x = layer(x) + 1.0 if number == self.odd else layer(x)
        return x


@pytest.mark.parametrize("odd", [1, 2, 3])
def test_a_trace_whose_layers_disagree_is_refused(odd):
    def recorded(model):
        x = torch.zeros(2, 4)
        with Recorder(modules=model) as recorder:
            model(x)
        return recorder

    even = recorded(Stack())
    deep = deepened(even.events, even.layers, DEPTH)
    assert deep is not None
    assert {base_id(event.id) for event in deep} == {event.id for event in even.events}
    numbers = [event.module for event in deep if event.action == "alloc"]
    assert numbers == [f"layers.{n}" for n in range(DEPTH)]

    uneven = recorded(Stack(odd))
    assert deepened(uneven.events, uneven.layers, DEPTH) is None


def test_a_trace_without_layers_is_refused():
    with Recorder() as recorder:
        torch.zeros(3)
    assert deepened(recorder.events, recorder.layers, DEPTH) is None


def test_a_model_of_unlike_layers_is_traced_whole(tmp_path):
    built = model_config(
        tmp_path, "qwen2", use_sliding_window=True, sliding_window=8, max_window_layers=4
    )
    phases = Phases(
        configured(tmp_path), built, CARD, dtype=torch.bfloat16, attention="torch_varlen"
    )
    part = phases._ready(configured(tmp_path))
    layers = {event.module for event in part.events if event.module.endswith("q_proj.base_layer")}
    assert len(layers) == DEPTH


def test_the_shape_of_the_tests_has_enough_layers():
    assert SHAPE["num_hidden_layers"] < TRACED < DEPTH
    assert build_config([]).memory.micro_batch_tokens == "auto"
