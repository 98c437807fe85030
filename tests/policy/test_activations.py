"""Layer inputs on the host: the same gradients, and nothing else is moved."""

import pytest
import torch

from lowmem_grpo.policy import activations
from lowmem_grpo.policy.activations import HostBuffers, kept_on_host
from lowmem_grpo.policy.base import AdapterSettings
from lowmem_grpo.policy.load import load_policy


class Counted(HostBuffers):
    """Remembers what was put and taken."""

    def __init__(self):
        self.put_, self.taken = [], []

    def put(self, x):
        self.put_.append(tuple(x.shape))
        return super().put(x)

    def take(self, kept):
        found = super().take(kept)
        self.taken.append(tuple(found.shape))
        return found


@pytest.fixture(scope="module")
def policy(tiny_model_dir):
    return load_policy(
        str(tiny_model_dir), device="cpu", dtype=torch.float32, attention="sdpa", seed=0,
        tile_tokens=7, tile_vocab=50, adapters=AdapterSettings(r=4, lora_alpha=8),
    )  # fmt: skip


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


def test_gradients_do_not_change(policy, monkeypatch):
    monkeypatch.setattr(activations, "LEAST_BYTES", 1)
    for parameter in policy.adapter_parameters().values():
        torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(3))
    plain = gradients(policy)
    policy.buffers = Counted()
    moved = gradients(policy, checkpointing=True, offloading=True)
    layers = policy.causal_lm.config.num_hidden_layers
    inputs = [shape for shape in policy.buffers.put_ if shape == (1, 15, 64)]
    assert len(inputs) >= layers
    assert sorted(policy.buffers.put_) == sorted(policy.buffers.taken)
    assert moved.keys() == plain.keys()
    for name, gradient in plain.items():
        assert torch.allclose(moved[name], gradient, rtol=1e-5, atol=1e-7), name
    again = gradients(policy, checkpointing=True)
    assert all(torch.equal(again[name], moved[name]) for name in moved)  # to the bit


def test_without_offloading_nothing_is_moved(policy, monkeypatch):
    monkeypatch.setattr(activations, "LEAST_BYTES", 1)
    policy.buffers = Counted()
    gradients(policy, checkpointing=True)
    assert policy.buffers.put_ == []


def test_small_tensors_and_parameters_stay():
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
