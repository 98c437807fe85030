"""An MLP in tiles is the MLP: values, gradients of x and adapters, and what it holds."""

import pytest
import torch

from lowmem_grpo.policy.base import AdapterSettings
from lowmem_grpo.policy.load import load_policy
from lowmem_grpo.policy.mlp import TiledMLP, tile_mlps
from tests.grpo.policies import relative_error
from tests.tiny import make_tiny_model

TOKENS = 23


@pytest.fixture(scope="module")
def policy(tiny_model_dir):
    policy = load_policy(
        str(tiny_model_dir), device="cpu", dtype=torch.float32, attention="tiled", seed=0,
        tile_tokens=7, tile_vocab=50, adapters=AdapterSettings(r=4, lora_alpha=8),
    )  # fmt: skip
    return moved(policy)


def moved(policy):
    """The same policy with adapters that do something."""
    generator = torch.Generator().manual_seed(3)
    for parameter in policy.adapter_parameters().values():
        torch.nn.init.normal_(parameter, std=0.1, generator=generator)
    return policy


@pytest.fixture
def mlp(policy):
    return policy.causal_lm.model.layers[0].mlp


def run(mlp, tile, *, wants_x=True):
    mlp.tile = tile
    x = torch.randn(1, TOKENS, 64, generator=torch.Generator().manual_seed(4))
    x.requires_grad_(wants_x)
    y = mlp(x)
    (y * torch.linspace(-1, 1, TOKENS)[:, None]).sum().backward()
    found = {n: p.grad.clone() for n, p in mlp.named_parameters() if p.grad is not None}
    mlp.zero_grad(set_to_none=True)
    mlp.tile = None
    return y.detach(), x.grad, found


@pytest.mark.parametrize("tile", [1, 5, 22])
def test_values_and_gradients_are_those_of_the_whole(mlp, tile):
    y, grad_x, grads = run(mlp, None)
    tiled_y, tiled_x, tiled = run(mlp, tile)
    assert relative_error(tiled_y, y) < 1e-6
    assert relative_error(tiled_x, grad_x) < 1e-6
    assert len(grads) == 6  # A and B of three linear layers
    assert tiled.keys() == grads.keys()
    for name, gradient in grads.items():
        assert relative_error(tiled[name], gradient) < 1e-5, name


def test_where_x_wants_no_gradient_the_adapters_still_do(mlp):
    _, _, grads = run(mlp, None, wants_x=False)
    _, grad_x, tiled = run(mlp, 5, wants_x=False)
    assert grad_x is None
    for name, gradient in grads.items():
        assert relative_error(tiled[name], gradient) < 1e-5, name


def widths(mlp, forward_and_backward):
    """Rows of every product of the gate, forward ones."""
    seen = []
    hook = mlp.gate_proj.register_forward_pre_hook(lambda m, x: seen.append(x[0].numel() // 64))
    try:
        forward_and_backward()
    finally:
        hook.remove()
    return seen


def test_no_product_is_wider_than_a_tile(mlp):
    assert widths(mlp, lambda: run(mlp, 10)) == [10, 10, 3, 10, 10, 3]
    assert widths(mlp, lambda: run(mlp, TOKENS)) == [TOKENS]  # one tile: as it is
    mlp.tile = 10
    with torch.no_grad():
        assert widths(mlp, lambda: mlp(torch.ones(TOKENS, 64))) == [10, 10, 3]
    mlp.tile = None


def gradients(policy, tile, **how):
    ids = torch.arange(12) * 7 % 128
    positions = torch.cat([torch.arange(5), torch.arange(5, 8), torch.arange(5, 9)])
    policy.set_mlp_tile(tile)
    with policy.as_trainable(**how):
        hidden = policy.hidden(ids, positions, policy.layout([(5, (3, 4))]))
        logprobs, _ = policy.score(hidden, ids)
        (logprobs * torch.linspace(-1, 1, 12)).sum().backward()
    policy.set_mlp_tile(0)
    found = {name: p.grad for name, p in policy.adapter_parameters().items()}
    policy.model.zero_grad(set_to_none=True)
    return found


def test_under_checkpointing_the_output_is_not_computed_again(policy, mlp):
    """Forward, and the tiles in backward: the layer's own recomputation stops before the MLP."""
    once = widths(mlp, lambda: gradients(policy, 5, checkpointing=True))
    assert once == [5, 5, 2] * 2


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_gradient_of_a_model_does_not_change(policy, checkpointing):
    plain = gradients(policy, 0)
    tiled = gradients(policy, 5, checkpointing=checkpointing)
    for name, gradient in plain.items():
        assert relative_error(tiled[name], gradient) < 1e-5, name


def test_names_of_weights_and_adapters_stay(policy):
    names = {n for n, _ in policy.causal_lm.named_modules() if ".mlp" in n and "lora" not in n}
    assert "model.layers.1.mlp.gate_proj.base_layer" in names
    assert all(n.startswith("base_model.model.model.layers.") for n in policy.adapter_state())
    assert sum(".mlp.up_proj." in n for n in policy.adapter_state()) == 4


def test_what_is_no_row_by_row_mlp_is_left_alone(tmp_path):
    model = torch.nn.ModuleDict({"mlp": torch.nn.Sequential(torch.nn.Conv1d(4, 4, 3))})
    assert tile_mlps(model) == []
    plain = torch.nn.ModuleDict(
        {"mlp": torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU())}
    )
    (found,) = tile_mlps(plain)
    assert isinstance(plain["mlp"], TiledMLP)
    assert found is plain["mlp"]


@pytest.mark.parametrize("architecture", ["qwen2", "qwen3"])
def test_other_architectures(architecture, tmp_path):
    directory = make_tiny_model(tmp_path / "model", architecture)
    policy = load_policy(
        str(directory), device="cpu", dtype=torch.float32, attention="tiled", seed=0,
        tile_tokens=7, tile_vocab=50, adapters=AdapterSettings(r=4, lora_alpha=8),
    )  # fmt: skip
    assert len(moved(policy)._mlps) == 2
    plain, tiled = gradients(policy, 0), gradients(policy, 5, checkpointing=True)
    for name, gradient in plain.items():
        assert relative_error(tiled[name], gradient) < 1e-5, name
