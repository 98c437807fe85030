"""The table of published peaks: its rows, and the steps that it traces."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tools.published import counted, losses
from tools.published.autocast import CudaAutocast
from tools.published.qlora import Step, trace_step
from tools.published.row import Row
from tools.published.runs import RUNS
from tools.published.table import as_text
from tools.published.tinyllama import validate_tinyllama

ROOT = Path(__file__).parents[2]
CARD = SimpleNamespace(compute_capability=(8, 0), multiprocessors=108)
TINY = {
    "model_type": "llama",
    "vocab_size": 512,
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
}


def tiny_step(path, tokens, **options) -> Step:
    (path / "tiny.json").write_text(json.dumps(TINY | options.pop("fields", {})))
    loss = options.pop("loss", losses.full_logits)
    return Step(str(path / "tiny"), tokens, 8, loss, CARD, **options)


def peak(path, tokens, **options) -> int:
    """The most bytes that live at once, as requested."""
    live = most = 0
    for event in trace_step(tiny_step(path, tokens, **options)):
        live += event.size if event.action == "alloc" else -event.size
        most = max(most, live)
    return most


def test_tinyllama_is_what_the_card_reported():
    rows, events = validate_tinyllama(None)
    assert [round(row.predicted, 1) for row in rows] == [1052.0, 5632.5, 6192.0, 2190.7]
    assert all(abs(row.difference) < 1 for row in rows)
    assert events


def test_every_published_peak_has_a_row():
    names = [run.name for run in RUNS] + [row.run for row in counted.counted_rows()]
    for part in ("1 x 4K", "1 x 8K", "1 x 16K", "1 x 32K", "1 x 64K", "Ministral-8B", "Apertus-8B"):
        assert any(part in name for name in names), part
    for part in ("AFM-4.5B", "torchtune", "TRL", "gpt-oss-20B", "Qwen3-VL-8B"):
        assert any(part in name for name in names), part
    assert all(run.assumed for run in RUNS)


def test_what_is_counted_by_hand():
    assert counted.kv_cache(1, 20 * 1024) == 2.5  # the row of Unsloth's table
    assert counted.kv_cache(8, 20 * 1024) == 20.0
    for row in counted.counted_rows():
        if row.number == "device, at least":
            assert row.predicted < row.published


def test_the_table_shows_differences_and_numbers_its_notes():
    rows = [Row("a", "reserved", "GiB", 1.1, 1.0, "x"), Row("b", "peak", "GiB", note="x")]
    first, second = as_text(rows).splitlines()[1:3]
    assert first.split() == ["a", "reserved", "GiB", "1.10", "1.00", "+10.0%", "1"]
    assert second.split() == ["b", "peak", "GiB", "1"]


def test_loading_allocates_the_layers_one_by_one(tmp_path):
    events = trace_step(tiny_step(tmp_path, 128))
    ended = {event.id for event in events if event.action == "free"}
    kept = [e for e in events if e.action == "alloc" and e.phase == "load" and e.id not in ended]
    size, layers = TINY["hidden_size"], TINY["num_hidden_layers"]
    embeddings = 2 * 2 * TINY["vocab_size"] * size
    norms = 2 * size * (2 * layers + 1)
    rotary = 2 * 4 * size // TINY["num_attention_heads"] // 2
    adapters = 4 * counted.adapter_elements(TINY, 8)
    expected = counted.nf4_bytes(TINY) + embeddings + norms + rotary + adapters
    assert sum(event.size for event in kept) == expected


@pytest.mark.parametrize(
    ("loss", "reentrant"),
    [(losses.full_logits, False), (losses.chunked, False), (losses.cut, True)],
)
def test_the_peak_grows_linearly_with_tokens(tmp_path, loss, reentrant):
    one_layer = {"num_hidden_layers": 1}
    how = {"loss": loss, "reentrant": reentrant, "dropout": 0.05, "fields": one_layer}
    short, middle, long = (peak(tmp_path, 4096 * n, **how) for n in (1, 2, 3))
    assert long - middle == middle - short > 0


def test_a_layer_more_keeps_one_hidden_state_more(tmp_path):
    def added(tokens):
        one, two = ({"num_hidden_layers": n} for n in (1, 2))
        return peak(tmp_path, tokens, fields=two) - peak(tmp_path, tokens, fields=one)

    assert added(8192) - added(4096) == 4096 * TINY["hidden_size"] * 2


def test_autocast_is_cudas():
    half, full = torch.ones(2, 2, dtype=torch.bfloat16), torch.ones(2, 2)
    with CudaAutocast():
        assert torch.nn.functional.linear(full, full).dtype == torch.bfloat16
        assert {half.pow(2).dtype, torch.square(half).dtype, half.rsqrt().dtype} == {torch.float32}
        assert torch.nn.functional.silu(half).dtype == (half * half).dtype == torch.bfloat16


@pytest.mark.slow
def test_the_whole_table():
    command = [sys.executable, "tools/validate_memory.py", "--json"]
    out = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    rows = {row["run"]: row for row in json.loads(out)}
    for run in RUNS:
        row = rows[run.name]
        assert row["allocated"] <= row["reserved"] < row["device"][0]
        assert abs(row["difference"]) < 13, run.name
