"""The same steps on fake CUDA, fake CPU and meta tensors give the same events, tag by tag.

So the planner, which needs no GPU, sees what a card's dispatch would have it see. The CUDA side
runs in a program of its own; see tests/fakecuda.
"""

from collections import Counter
from pathlib import Path

import pytest

from lowmem_grpo.memory.allocator import Event
from lowmem_grpo.memory.simulate import simulate
from tests.fakecuda.build import run_with_guard, why_not
from tests.fakecuda.record import record_steps

pytestmark = pytest.mark.skipif(why_not() is not None, reason=why_not() or "")
ROOT = Path(__file__).parents[2]
CASES = pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "recomputed"])
ARCHITECTURES = pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])

EXPLAINED = {
    "silu_backward": "its schema names a composition beside its kernels; a CPU build has no CUDA "
    "kernel, so AutogradCUDA takes the composition (sigmoid, 1 - s, three products, a sum). A CUDA "
    "build has the kernel: one operation, one result",
}


@pytest.fixture(scope="module")
def on_cuda(tmp_path_factory):
    """The events of every case of tests/fakecuda/run_record.py, by name."""
    directory = tmp_path_factory.mktemp("fakecuda")
    lines = run_with_guard(directory, "run_record.py", *EXPLAINED)
    assert [line["error"] for line in lines] == [None] * 7
    return {line["case"]: [Event(*row) for row in line["events"]] for line in lines}


def numbered(events):
    """Ids by order of appearance: what differs then is who is freed, not how many came before."""
    ids = {}
    return [event._replace(id=ids.setdefault(event.id, len(ids))) for event in events]


def without_optimizer(events):
    """Without what the optimizer allocates; that it clears the gradients stays."""
    made = {e.id for e in events if e.action == "alloc" and e.phase == "optimizer"}
    return [event for event in events if event.id not in made]


def without_largest(events):
    """Without one more number of each token, which a CPU's sums of gathered rows allocate, and a
    card's do not: of keys and values, in each layer, micro-batch and step.
    """
    keys = 8 * 39  # in either micro-batch, prompts repeated
    more = set()
    for of_keys, of_tokens, event in zip(events, events[1:], events[2:], strict=False):
        actions = {of_keys.action, of_tokens.action, event.action}
        if actions == {"alloc"} and of_keys.size == keys > of_tokens.size == event.size:
            more.add(event.id)
    assert len(more) == 2 * 2 * 2 * 2
    return [event for event in events if event.id not in more]


def assert_same(found, expected):
    first = next((pair for pair in zip(found, expected, strict=False) if pair[0] != pair[1]), None)
    assert first is None, "\n".join(map(str, first))
    assert len(found) == len(expected)


def assert_close(found, expected):
    """Peaks within 0.1%."""
    found, expected = simulate(found), simulate(expected)
    assert found.peak_allocated == pytest.approx(expected.peak_allocated, rel=1e-3)
    assert found.peak_reserved == pytest.approx(expected.peak_reserved, rel=1e-3)


@CASES
@ARCHITECTURES
def test_fake_cpu_tensors_give_the_events_of_cuda(on_cuda, architecture, checkpointing):
    cuda = numbered(on_cuda[f"{architecture} {checkpointing}"])
    assert {e.phase for e in cuda} == {"load", "reference", "update", "optimizer"}
    assert "checkpoints" in {e.component for e in cuda} or not checkpointing
    cpu = record_steps(architecture, "cpu", checkpointing=checkpointing)
    cpu = numbered(without_largest(cpu))
    assert_same(cpu, cuda)
    assert_close(cpu, cuda)


@CASES
@ARCHITECTURES
def test_meta_tensors_give_the_events_of_cuda(on_cuda, architecture, checkpointing):
    cuda = numbered(without_optimizer(on_cuda[f"{architecture} {checkpointing}"]))
    meta = numbered(record_steps(architecture, "meta", checkpointing=checkpointing))
    assert_same(meta, cuda)
    assert_close(meta, cuda)


def test_what_a_cpu_build_splits_is_explained(on_cuda):
    """Without kernels for the operations explained, they and nothing else make the difference."""
    whole, split = on_cuda["llama False"], on_cuda["split"]
    assert_close(split, whole)
    tags = [Counter(event._replace(id=0) for event in events) for events in (whole, split)]
    assert not tags[0] - tags[1]
    extra = tags[1] - tags[0]
    assert {e.module.rpartition(".")[2] for e in extra} == {"act_fn"}
    layers, batches, steps = 2, 2, 2
    parts = 5  # sigmoid, 1 - s, x (1 - s), 1 + that, g s; their product is the result
    assert extra.total() == 2 * parts * layers * batches * steps
