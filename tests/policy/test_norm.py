"""RMSNorm in tiles against the definition in float64, and which norms it replaces."""

import pytest
import torch
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.mistral.modeling_mistral import MistralRMSNorm
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from lowmem_grpo.policy import norm
from lowmem_grpo.policy.norm import RMSNorm, is_rms_norm, replace_norms


@pytest.fixture(params=[1, 50, 10**9], ids=["rows alone", "small tiles", "one tile"])
def tiles(request, monkeypatch):
    monkeypatch.setattr(norm, "TILE_ELEMENTS", {"cpu": request.param, "card": request.param})


def frozen(size, eps=1e-5):
    weight = torch.linspace(-2, 3, size)
    return RMSNorm(torch.nn.Parameter(weight, requires_grad=False), eps)


def naive(x, weight, eps):
    return weight * x / (x.square().mean(-1, keepdim=True) + eps).sqrt()


@pytest.mark.parametrize("shape", [(1, 8), (7, 17), (2, 3, 5, 16), (1, 11, 24)])
def test_values_and_gradients_are_those_of_the_definition(tiles, shape):
    generator = torch.Generator().manual_seed(0)
    x = (3 * torch.randn(shape, generator=generator)).requires_grad_()
    grad = torch.randn(shape, generator=generator)
    own = frozen(shape[-1])
    y = own(x)
    (found,) = torch.autograd.grad(y, x, grad)
    wide = x.detach().double().requires_grad_()
    expected = naive(wide, own.weight.double(), 1e-5)
    (right,) = torch.autograd.grad(expected, wide, grad.double())
    assert torch.allclose(y.double(), expected, rtol=1e-5, atol=1e-6)
    assert torch.allclose(found.double(), right, rtol=1e-5, atol=1e-6)


def test_a_view_that_is_not_contiguous(tiles):
    x = torch.randn(4, 6, 16, generator=torch.Generator().manual_seed(1)).transpose(0, 1)
    x.requires_grad_()
    own = frozen(16)
    y = own(x)
    assert torch.allclose(y, naive(x, own.weight, 1e-5), rtol=1e-5, atol=1e-6)
    (found,) = torch.autograd.grad(y.square().sum(), x)
    (right,) = torch.autograd.grad(naive(x, own.weight, 1e-5).square().sum(), x)
    assert torch.allclose(found, right, rtol=1e-4, atol=1e-5)


def test_in_bfloat16_it_rounds_as_transformers_does(tiles):
    theirs = LlamaRMSNorm(48, eps=1e-5).to(torch.bfloat16).requires_grad_(False)
    theirs.weight.copy_(torch.linspace(-2, 3, 48))
    own = RMSNorm(theirs.weight, 1e-5)
    x = (5 * torch.randn(33, 48, generator=torch.Generator().manual_seed(2))).to(torch.bfloat16)
    assert torch.equal(own(x), theirs(x))


def test_what_is_kept_is_x_and_a_number_a_row(tiles):
    kept = []
    x = torch.randn(5, 9, 16, dtype=torch.bfloat16).requires_grad_()
    own = RMSNorm(torch.nn.Parameter(torch.ones(16, dtype=torch.bfloat16), False), 1e-5)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        own(x)
    assert {(tuple(t.shape), t.dtype) for t in kept} == {
        ((5, 9, 16), torch.bfloat16),
        ((16,), torch.bfloat16),
        ((45, 1), torch.float32),
    }


def test_a_weight_that_learns_is_refused():
    with pytest.raises(ValueError, match="requires a gradient"):
        RMSNorm(torch.nn.Parameter(torch.ones(4)), 1e-5)


@pytest.mark.parametrize("kind", [LlamaRMSNorm, Qwen2RMSNorm, Qwen3RMSNorm, MistralRMSNorm])
def test_norms_that_compute_the_same_are_recognised(kind):
    assert is_rms_norm(kind)


class OffCentreRMSNorm(LlamaRMSNorm):
    def forward(self, x):
        return super().forward(x - x.mean(-1, keepdim=True))


@pytest.mark.parametrize("kind", [GemmaRMSNorm, OffCentreRMSNorm, torch.nn.LayerNorm, RMSNorm])
def test_others_are_left_alone(kind):
    assert not is_rms_norm(kind)


def test_every_norm_of_a_model_is_replaced_under_its_name():
    model = torch.nn.ModuleDict(
        {"one": LlamaRMSNorm(8), "other": torch.nn.LayerNorm(8), "two": Qwen3RMSNorm(8)}
    ).requires_grad_(False)
    before = model.state_dict()
    replace_norms(model)
    assert isinstance(model["one"], RMSNorm)
    assert isinstance(model["two"], RMSNorm)
    assert isinstance(model["other"], torch.nn.LayerNorm)
    assert model.state_dict().keys() == before.keys()
    assert model["two"].variance_epsilon == Qwen3RMSNorm(8).variance_epsilon
