"""What keeps a long update small, on a card: the same gradients, less memory, and no race. Never
run yet; `pytest -m gpu`.
"""

import pytest
import torch

from lowmem_grpo.policy import activations
from lowmem_grpo.policy.base import AdapterSettings
from lowmem_grpo.policy.load import load_policy
from tests.grpo.policies import relative_error

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
TOKENS, PROMPT = 2048, 100


@pytest.fixture(scope="module")
def policy(demo_model):
    policy = load_policy(
        demo_model, device="cuda:0", dtype=torch.bfloat16, attention="torch_varlen", seed=0,
        tile_tokens=512, tile_vocab=8192, adapters=AdapterSettings(r=16, lora_alpha=32),
    )  # fmt: skip
    generator = torch.Generator("cuda").manual_seed(0)
    with torch.no_grad():
        for parameter in policy.adapter_parameters().values():
            parameter.normal_(std=0.01, generator=generator)
    return policy


def gradients(policy, *, mlp_tile=0, kernels=None, **how):
    """Adapters' gradients of one long completion, and the peak that it took."""
    length = TOKENS - PROMPT
    ids = torch.arange(TOKENS, device="cuda") * 7 % 40000
    positions = torch.arange(TOKENS, device="cuda")
    policy.set_mlp_tile(mlp_tile)
    policy.head_kernels = kernels
    torch.cuda.reset_peak_memory_stats()
    with policy.as_trainable(**how):
        hidden = policy.hidden(ids, positions, policy.layout([(PROMPT, (length,))]))
        logprobs, _ = policy.score(hidden, ids.roll(-1))
        (logprobs * torch.linspace(-1, 1, TOKENS, device="cuda")).mean().backward()
    found = {name: p.grad for name, p in policy.adapter_parameters().items()}
    policy.model.zero_grad(set_to_none=True)
    return found, torch.cuda.max_memory_allocated()


@pytest.mark.parametrize(
    "how",
    [
        {"offloading": True},
        {"offloading": True, "overlapping": True},
        {"mlp_tile": 512},
        {"offloading": True, "overlapping": True, "mlp_tile": 512},
    ],
    ids=str,
)
def test_gradients_stay_and_memory_falls(policy, monkeypatch, how):
    monkeypatch.setattr(activations, "LEAST_BYTES", 1 << 16)
    plain, peak = gradients(policy, checkpointing=True)
    found, less = gradients(policy, checkpointing=True, **how)
    for name, gradient in plain.items():
        assert relative_error(found[name], gradient) < 2e-2, name
    assert less < peak


def test_copies_beside_the_kernels_do_not_race(policy, monkeypatch):
    monkeypatch.setattr(activations, "LEAST_BYTES", 1 << 16)
    in_order, _ = gradients(policy, checkpointing=True, offloading=True)
    for _ in range(20):
        beside, _ = gradients(policy, checkpointing=True, offloading=True, overlapping=True)
        for name, gradient in in_order.items():
            assert relative_error(beside[name], gradient) < 1e-2, name


def test_the_heads_kernels_are_as_exact_as_torch(policy):
    head_kernels = pytest.importorskip("lowmem_grpo.policy.head_kernels")
    plain, peak = gradients(policy, checkpointing=True)
    found, less = gradients(policy, checkpointing=True, kernels=head_kernels)
    for name, gradient in plain.items():
        assert relative_error(found[name], gradient) < 2e-2, name
    assert less <= peak
