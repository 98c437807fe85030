"""Layer inputs on the host: the same gradients, nothing else is moved, and no copy overtakes what
it depends on.
"""

import contextlib
import weakref

import pytest
import torch

from lowmem_grpo.policy import activations
from lowmem_grpo.policy.activations import HostBuffers, kept_on_host
from lowmem_grpo.policy.base import AdapterSettings
from lowmem_grpo.policy.load import load_policy


class Counted(HostBuffers):
    """Remembers what was put and taken."""

    def __init__(self, side=None):
        super().__init__(side)
        self.put_, self.taken = [], []

    def put(self, x):
        self.put_.append(tuple(x.shape))
        return super().put(x)

    def take(self, kept):
        found = super().take(kept)
        self.taken.append(tuple(found.shape))
        return found


class LateStream:
    """A stream in the sense of CUDA's programming guide, at its slowest: what is asked of it
    happens when somebody waits for it, and no earlier. Copies happen in the order in which they
    were asked for; who does not wait finds what was there before.
    """

    def __init__(self):
        self.asked, self.done, self.most = [], 0, 0

    def run(self, copy):
        self.asked.append(copy)
        self.most = max(self.most, len(self.asked) - self.done)
        return len(self.asked)

    def wait(self, number):
        while self.done < number:
            self.asked[self.done]()
            self.asked[self.done] = None  # and with it what it holds
            self.done += 1


@pytest.fixture(scope="module")
def policy(tiny_model_dir):
    return load_policy(
        str(tiny_model_dir), device="cpu", dtype=torch.float32, attention="sdpa", seed=0,
        tile_tokens=7, tile_vocab=50, adapters=AdapterSettings(r=4, lora_alpha=8),
    )  # fmt: skip


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Every tensor is large enough to be moved, and none fits a page."""
    monkeypatch.setattr(activations, "LEAST_BYTES", 1)
    monkeypatch.setattr(activations, "PAGE_BYTES", 1000)


def gradients(policy, **how):
    """Of a loss over two packed groups."""
    groups = [(5, (3, 1)), (2, (4,))]
    tokens = sum(prompt + sum(lengths) for prompt, lengths in groups)
    ids = torch.arange(tokens) * 7 % policy.head_weight_VD.shape[0]
    positions = torch.cat(
        [
            torch.arange(5),
            torch.arange(5, 8),
            torch.arange(5, 6),
            torch.arange(2),
            torch.arange(2, 6),
        ]
    )
    with policy.as_trainable(**how):
        hidden = policy.hidden(ids, positions, policy.layout(groups))
        logprobs, _ = policy.score(hidden, ids)
        (logprobs * torch.linspace(-1, 1, tokens)).sum().backward()
    found = {name: p.grad for name, p in policy.adapter_parameters().items()}
    policy.model.zero_grad(set_to_none=True)
    return found


@pytest.mark.parametrize("overlapping", [False, True])
def test_gradients_do_not_change(policy, overlapping):
    for parameter in policy.adapter_parameters().values():
        torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(3))
    plain = gradients(policy)
    late = LateStream()
    policy.buffers = Counted(late)
    moved = gradients(policy, checkpointing=True, offloading=True, overlapping=overlapping)
    layers = policy.causal_lm.config.num_hidden_layers
    inputs = [shape for shape in policy.buffers.put_ if shape == (1, 15, 64)]
    assert len(inputs) >= layers
    assert sorted(policy.buffers.put_) == sorted(policy.buffers.taken)
    assert moved.keys() == plain.keys()
    for name, gradient in plain.items():
        assert torch.allclose(moved[name], gradient, rtol=1e-5, atol=1e-7), name
    again = gradients(policy, checkpointing=True)
    assert all(torch.equal(again[name], moved[name]) for name in moved)  # to the bit
    assert bool(late.asked) is overlapping
    pages = len(policy.buffers.pages)
    size = sum(4 * torch.Size(shape).numel() for shape in policy.buffers.put_)
    assert pages == -(-size // 1000)
    # A second pass, of other shapes or not, uses the same pages.
    once_more = gradients(policy, checkpointing=True, offloading=True, overlapping=overlapping)
    assert all(torch.equal(once_more[name], moved[name]) for name in moved)
    assert len(policy.buffers.pages) == pages


def test_no_layer_input_stays_on_the_device(policy):
    """The first one, the embedding's output, asks for no gradient by itself."""
    made = []

    def remember(module, args, output):
        x = output[0] if isinstance(output, tuple) else output
        made.append(weakref.ref(x.untyped_storage()))

    watched = [policy.trunk.embed_tokens, *policy.trunk.layers]
    hooks = [module.register_forward_hook(remember) for module in watched]
    ids = torch.arange(12)
    policy.buffers = HostBuffers()
    try:
        with policy.as_trainable(checkpointing=True, offloading=True):
            hidden = policy.hidden(ids, ids, policy.layout([(5, (7,))]))
            assert [storage() for storage in made] == [None] * 3
            hidden.sum().backward()
    finally:
        for hook in hooks:
            hook.remove()
    policy.model.zero_grad(set_to_none=True)


def test_checkpointing_leaves_no_hooks_behind(policy):
    before = len(policy.trunk.embed_tokens._forward_hooks)
    for _ in range(3):
        gradients(policy, checkpointing=True)
    assert len(policy.trunk.embed_tokens._forward_hooks) == before


def test_without_offloading_nothing_is_moved(policy):
    policy.buffers = Counted()
    gradients(policy, checkpointing=True)
    assert policy.buffers.put_ == []


def test_small_tensors_and_parameters_stay(monkeypatch):
    monkeypatch.undo()
    buffers = Counted()
    weight = torch.nn.Parameter(torch.ones(1024, 512), requires_grad=False)
    x = torch.ones(1024, 1024, requires_grad=True)
    with kept_on_host(buffers):
        (x @ weight).sum().backward()
        (torch.ones(8, requires_grad=True).square()).sum().backward()
    assert buffers.put_ == []
    with kept_on_host(buffers):
        out = (x * 3.0).square().sum()
    assert buffers.put_ == [(1024, 1024)]
    out.backward()
    assert torch.equal(x.grad[0, :2], torch.full((2,), 18.0 + 512.0))


def test_one_tensor_leaves_and_one_arrives_at_a_time():
    late = LateStream()
    buffers = HostBuffers(late)
    buffers.begin(overlap=True)
    tensors = [torch.full((n, 7), float(n), dtype=torch.bfloat16) for n in range(1, 9)]
    kept = [buffers.put(x.clone()) for x in tensors]
    buffers.let_go()
    assert late.done == len(tensors)  # all have left when the forward pass is over
    for place in reversed(range(len(tensors))):
        assert torch.equal(buffers.take(kept[place]), tensors[place])
    assert late.most == 1
    assert late.done == len(late.asked) == 2 * len(tensors)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_only_a_cards_tensors_get_a_stream(monkeypatch, device):
    """On a machine with a card, too, a plan and a run on the CPU leave it alone."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "Stream", None)  # asking for one would fail
    buffers = HostBuffers()
    monkeypatch.setattr(buffers, "copy", lambda *x, **how: None)
    buffers.begin(overlap=True)
    kept = [buffers.put(torch.ones(4, 3, device=device)) for _ in range(3)]
    buffers.let_go()
    assert buffers.take(kept[2]).device.type == device


def test_another_order_than_backwards_is_right_too():
    buffers = HostBuffers(LateStream())
    buffers.begin(overlap=True)
    tensors = [torch.full((3, 5), float(n)) for n in range(4)]
    kept = [buffers.put(x.clone()) for x in tensors]
    buffers.let_go()
    for place in (1, 3, 3, 0, 2):
        assert torch.equal(buffers.take(kept[place]), tensors[place])
    buffers.begin(overlap=False)  # a backward pass that was given up leaves nothing behind
    assert torch.equal(buffers.take(buffers.put(tensors[2])), tensors[2])


def test_an_attempt_that_ran_out_of_memory_leaves_nothing_on_the_device(policy, monkeypatch):
    """Its backward pass had fetched a layer's input ahead of time, and a copy was under way."""
    late = LateStream()
    monkeypatch.setattr(policy, "buffers", HostBuffers(late))
    policy.buffers.begin(overlap=True)
    kept = [policy.buffers.put(torch.ones(8)) for _ in range(3)]
    policy.buffers.take(kept[2])
    ((fetched, _),) = policy.buffers._arriving.values()
    fetched = weakref.ref(fetched)
    policy.release()
    assert fetched() is None
    assert late.done == len(late.asked)  # nothing writes any more to what was given back


def test_pages_are_pinned_for_the_card_that_uses_them(monkeypatch):
    current, made, empty = ["cuda:0"], [], torch.empty

    @contextlib.contextmanager
    def device(of):
        current.append(str(of))
        yield
        current.pop()

    def recorded(*shape, pin_memory=False, **how):
        made.append((current[-1], pin_memory))
        return empty(*shape, **how)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(torch, "empty", recorded)
    for name in ("cuda:1", "cpu"):
        HostBuffers().new_page(torch.device(name))
    assert made == [("cuda:1", True), ("cuda:0", False)]
