"""Sampling computes what training does, with fewer and larger products."""

import pytest
import torch
from bitsandbytes.functional import has_avx512bf16

from lowmem_grpo.policy import shared_input
from lowmem_grpo.policy.lora import LoraLinear4bit
from tests.grpo.policies import move_adapters, open_policy
from tests.tiny import make_tiny_model

IDS = torch.tensor([4, 80, 33, 12, 60, 61, 90, 62])
POSITIONS = torch.tensor([0, 1, 2, 3, 4, 5, 4, 5])
GROUPS = [(4, (2, 2))]
TOGETHER = [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]]


def hidden(policy):
    return policy.hidden(IDS, POSITIONS, policy.layout(GROUPS))


def sampled(policy):
    with policy.as_sampler():
        return hidden(policy)


def trained(policy):
    with policy.as_trainable():
        return hidden(policy).detach()


def difference(found, expected):
    return ((found - expected).norm() / expected.norm()).item()


@pytest.fixture(scope="module", params=["llama", "qwen2", "qwen3"])
def kind(request, tmp_path_factory):
    """A model directory; Qwen2 has biases."""
    return make_tiny_model(tmp_path_factory.mktemp("model") / "tiny", request.param)


def test_layers_that_are_given_the_same_tensor_are_found(kind):
    policy = open_policy(kind)
    names = {module: name for name, module in policy.model.named_modules()}
    groups = [[names[layer].rpartition(".")[2] for layer in s.layers] for s in policy._shared]
    assert groups == TOGETHER * 2


def test_the_sampler_computes_what_the_trainer_does(kind):
    policy = open_policy(kind)
    expected = trained(policy)
    assert difference(sampled(policy), expected) < 1e-5
    with policy.as_reference():
        assert difference(hidden(policy), expected) > 1e-2  # the adapters do something


def test_adapters_that_have_changed_are_sampled_from(policy):
    before = sampled(policy)
    move_adapters(policy, 0.2, seed=9)
    after = sampled(policy)
    assert difference(after, before) > 1e-2
    assert difference(after, trained(policy)) < 1e-5


def test_the_reference_and_the_trainer_do_not_take_the_sampler_s_way(policy, monkeypatch):
    def refuse(self, x):
        raise AssertionError("sampling")

    sampled(policy)
    monkeypatch.setattr(shared_input.SharedInput, "products", refuse)
    trained(policy)
    with policy.as_reference():
        hidden(policy)
    with pytest.raises(AssertionError, match="sampling"):
        sampled(policy)
    trained(policy)  # also after a rollout that failed


def test_any_order_of_calls_gives_each_layer_its_own_output(policy):
    query, key, value = policy._shared[0].layers
    x, other = torch.randn(2, 1, 3, query.in_features, generator=torch.Generator().manual_seed(0))
    with policy.as_trainable():
        expected = {
            (layer, name): layer(tensor).detach()
            for layer in (query, key, value)
            for name, tensor in (("x", x), ("other", other))
        }
    tensors = {"x": x, "other": other}
    calls = [(value, "x"), (query, "x"), (query, "other"), (query, "x"), (query, "x"), (key, "x")]
    with policy.as_sampler():
        for layer, name in calls:
            torch.testing.assert_close(layer(tensors[name]), expected[layer, name])


def test_no_tensor_of_a_rollout_outlives_it(policy):
    sampled(policy)
    for shared in policy._shared:
        assert shared._x is None
        assert not shared._results
        assert shared._a_rK is None
        assert not shared._b


def test_many_rows_take_the_trainer_s_way(policy, monkeypatch):
    monkeypatch.setattr(shared_input, "MOST_ROWS", len(IDS) - 1)
    monkeypatch.setattr(shared_input.SharedInput, "products", None)  # not callable
    sampled(policy)
    monkeypatch.setattr(shared_input, "MOST_ROWS", len(IDS))
    with pytest.raises(TypeError):
        sampled(policy)


def test_bfloat16_samples_by_the_inference_kernel_where_there_is_one(kind):
    policy = open_policy(kind, dtype=torch.bfloat16)
    packed = {
        layer: layer.base_layer.weight.data.clone()
        for layer in policy.model.modules()
        if isinstance(layer, LoraLinear4bit)
    }
    expected = trained(policy)
    found = sampled(policy)
    assert all((s.inference is not None) == has_avx512bf16() for s in policy._shared)
    assert difference(found.float(), expected.float()) < 3e-2
    # The weights that are trained with are not those that the kernel has put into its order.
    assert all(torch.equal(layer.base_layer.weight.data, w) for layer, w in packed.items())
    torch.testing.assert_close(trained(policy), expected, rtol=0, atol=0)


def test_rows_of_blocks_that_cross_them_have_no_inference_kernel(tmp_path):
    directory = make_tiny_model(tmp_path / "odd", "llama", intermediate_size=96)
    policy = open_policy(directory, dtype=torch.bfloat16)
    sampled(policy)
    down = policy._shared[3]  # its input has one and a half blocks
    assert down.inference is None
    assert difference(sampled(policy).float(), trained(policy).float()) < 3e-2


def test_what_the_sampler_keeps_is_told(kind):
    policy = open_policy(kind, dtype=torch.bfloat16)
    bases = sum(m.weight.numel() for s in policy._shared for m in [x.base_layer for x in s.layers])
    kept = dict(policy.tensors_beside())
    weights = [x for name, x in policy.tensors_beside() if name == "inference.weight"]
    assert sum(x.numel() for x in weights) == (bases if has_avx512bf16() else 0)
    assert ("inference.absmax" in kept) == has_avx512bf16()
