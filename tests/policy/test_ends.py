"""The embedding on the host and the head in 8 bits: the same rows, and a model that is the rounded
one in every way of asking.
"""

import pytest
import torch

from lowmem_grpo.errors import ModelError
from lowmem_grpo.policy.base import AdapterSettings
from lowmem_grpo.policy.ends import HostTable, RoundedHead
from lowmem_grpo.policy.load import load_policy
from lowmem_grpo.policy.logprobs import full_logits, naive_token_logprobs, token_logprobs
from tests.tiny import make_tiny_model


def load(directory, **how):
    return load_policy(
        str(directory), device="cpu", dtype=torch.float32, attention="tiled", seed=0,
        tile_tokens=7, tile_vocab=50, adapters=AdapterSettings(r=4, lora_alpha=8), **how,
    )  # fmt: skip


@pytest.fixture(scope="module")
def untied(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("untied") / "model", tie_word_embeddings=False)


def hidden(policy):
    ids = torch.arange(12) * 7 % 128
    positions = torch.cat([torch.arange(5), torch.arange(5, 8), torch.arange(5, 9)])
    with policy.as_reference():
        return policy.hidden(ids, positions, policy.layout([(5, (3, 4))])), ids


def test_an_embedding_on_the_host_gives_the_same_rows(untied):
    here, _ = hidden(load(untied))
    policy = load(untied, embedding_on_host=True)
    there, _ = hidden(policy)
    assert torch.equal(here, there)
    assert not any("embed_tokens" in name for name, _ in policy.model.named_parameters())


def test_rows_come_from_the_host_and_go_where_the_ids_are():
    table = HostTable(torch.arange(12.0).view(4, 3))
    assert table.weight.device.type == "cpu"
    assert torch.equal(table.rows(torch.tensor([[2, 0]])), torch.tensor([[[6.0, 7, 8], [0, 1, 2]]]))


@pytest.mark.parametrize("setting", [{"embedding_on_host": True}, {"lm_head_bits": 8}])
def test_a_tied_model_is_refused(tiny_model_dir, setting):
    with pytest.raises(ModelError, match=f"{next(iter(setting))} = .* use m"):
        load(tiny_model_dir, **setting)


def test_a_rounded_row_is_off_by_half_a_step_at_most():
    weight = torch.randn(300, 40, generator=torch.Generator().manual_seed(0))
    weight[7] = 0.0
    weight[8] = 1e-30
    head = RoundedHead(weight)
    step = weight.abs().amax(1, keepdim=True) / 127
    assert ((head[:] - weight).abs() <= 0.5001 * step + 1e-37).all()
    assert head.numbers_VD.dtype == torch.int8
    ids = torch.tensor([5, 299, 5])
    assert torch.equal(head[ids], head[:][ids])
    assert torch.equal(head[10:20], head[:][10:20])


@pytest.mark.parametrize("entropy_gradient", [False, True])
def test_log_probs_are_those_of_the_rounded_weight(entropy_gradient):
    generator = torch.Generator().manual_seed(1)
    head = RoundedHead(torch.randn(97, 24, generator=generator))
    hidden_ND = torch.randn(11, 24, generator=generator).requires_grad_()
    targets_N = torch.randint(0, 97, (11,), generator=generator)
    found, entropy = token_logprobs(
        hidden_ND, head, targets_N, tile_tokens=4, tile_vocab=30, entropy_gradient=entropy_gradient
    )
    right, true_entropy = naive_token_logprobs(hidden_ND, head[:], targets_N)
    assert torch.allclose(found, right, rtol=1e-5, atol=1e-5)
    assert torch.allclose(entropy, true_entropy, rtol=1e-5, atol=1e-5)
    pull = torch.linspace(-1, 1, 11)
    (grad,) = torch.autograd.grad((found * pull).sum(), hidden_ND)
    (expected,) = torch.autograd.grad((right * pull).sum(), hidden_ND)
    assert torch.allclose(grad, expected, rtol=1e-4, atol=1e-5)
    logits_NV = full_logits(hidden_ND.detach(), head, None, 30)
    assert torch.allclose(logits_NV, hidden_ND.detach() @ head[:].t(), rtol=1e-5, atol=1e-5)


def test_sampler_and_trainer_use_the_same_rounded_head(untied):
    policy = load(untied, lm_head_bits=8)
    rows, ids = hidden(policy)
    assert policy.causal_lm.lm_head.weight is None  # the 16-bit one is gone
    targets = ids.roll(-1)
    logp, _ = policy.score(rows, targets)
    drawn_from = policy.logits(rows).log_softmax(-1).gather(1, targets[:, None])[:, 0]
    assert torch.allclose(logp, drawn_from, rtol=1e-5, atol=1e-5)
    exact = load(untied)
    assert (exact.logits(rows) - policy.logits(rows)).abs().max() > 1e-4  # rounding shows
    names = [name for name, _ in policy.tensors_beside()]
    assert names == ["head.numbers", "head.scales"]
