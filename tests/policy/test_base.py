"""The policy's roles: what each computes, and that none leaves a trace, whatever happens."""

import contextlib

import bitsandbytes as bnb
import pytest
import torch
from transformers import AutoModelForCausalLM

from lowmem_grpo.errors import ModelError
from lowmem_grpo.policy import shared_input
from lowmem_grpo.policy.load import nf4_config
from lowmem_grpo.policy.lora import LoraLinear4bit
from tests.grpo.policies import move_adapters, open_policy

IDS = torch.tensor([4, 80, 33, 12, 60, 61, 90, 62])
POSITIONS = torch.tensor([0, 1, 2, 3, 4, 5, 4, 5])
GROUPS = [(4, (2, 2))]
ROLES = {
    "reference": lambda policy: policy.as_reference(),
    "sampler": lambda policy: policy.as_sampler(),
    "trainable": lambda policy: policy.as_trainable(),
    "checkpointed": lambda policy: policy.as_trainable(checkpointing=True),
}


def forward(policy):
    """Log-probs and entropies of all tokens but the first, in the current role."""
    hidden_TD = policy.hidden(IDS, POSITIONS, policy.layout(GROUPS))
    return policy.score(hidden_TD[:-1], IDS[1:], entropy_gradient=True)


def gradients(policy, **options):
    with policy.as_trainable(**options):
        logp_N, entropy_N = forward(policy)
        loss = (logp_N * torch.arange(1, 8)).sum() + entropy_N.sum()
        return torch.autograd.grad(loss, policy.adapter_parameters().values())


def quantised(policy):
    return [m for m in policy.model.modules() if isinstance(m, bnb.nn.Linear4bit)]


def condition(policy):
    """Everything that a role may change."""
    return (
        torch.is_grad_enabled(),
        {n: p.requires_grad for n, p in policy.model.named_parameters()},
        [m.disable_adapters for m in policy.model.modules() if isinstance(m, LoraLinear4bit)],
        [getattr(m, "gradient_checkpointing", None) for m in policy.model.modules()],
        [m.training for m in policy.model.modules()],
        policy.causal_lm.config._attn_implementation,
    )


def test_the_reference_is_the_model_without_adapters(shared_policy, tiny_model_dir):
    plain = AutoModelForCausalLM.from_pretrained(
        tiny_model_dir, quantization_config=nf4_config(torch.float32), dtype=torch.float32
    ).train()
    with torch.no_grad():
        logits_TV = plain(input_ids=IDS[None, :6]).logits[0]
    expected_N = logits_TV[:5].log_softmax(-1).gather(1, IDS[1:6, None])[:, 0]
    with shared_policy.as_reference():
        logp_N, _ = forward(shared_policy)
    torch.testing.assert_close(logp_N[:5], expected_N, rtol=1e-4, atol=1e-4)
    assert not logp_N.requires_grad
    with shared_policy.as_sampler():
        sampled_N, _ = forward(shared_policy)
    assert (sampled_N - logp_N).abs().max() > 0.1


def test_sampler_and_trainer_are_the_same_policy(shared_policy, monkeypatch):
    with shared_policy.as_sampler():
        sampled_N, _ = forward(shared_policy)
    with shared_policy.as_trainable():
        trained_N, _ = forward(shared_policy)
    assert not sampled_N.requires_grad
    assert trained_N.requires_grad
    # Fewer, larger products round differently; where they are not worth it, nothing differs.
    torch.testing.assert_close(sampled_N, trained_N.detach(), rtol=1e-6, atol=1e-5)
    monkeypatch.setattr(shared_input, "MOST_ROWS", 0)
    with shared_policy.as_sampler():
        sampled_N, _ = forward(shared_policy)
    assert torch.equal(sampled_N, trained_N)


@pytest.mark.parametrize("fails", [False, True], ids=["ends", "raises"])
@pytest.mark.parametrize("role", ROLES)
def test_a_role_leaves_no_trace(shared_policy, role, fails):
    before, results = condition(shared_policy), forward(shared_policy)
    with contextlib.suppress(KeyboardInterrupt):
        with ROLES[role](shared_policy):
            forward(shared_policy)
            if fails:
                raise KeyboardInterrupt
    assert condition(shared_policy) == before
    for after, result in zip(forward(shared_policy), results, strict=True):
        assert after.requires_grad
        assert torch.equal(after, result)


def test_trainable_within_no_grad_records_gradients(shared_policy):
    with torch.no_grad(), shared_policy.as_trainable():
        assert forward(shared_policy)[0].requires_grad
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_checkpointing_changes_no_gradient(tiny_model_dir, dtype):
    policy = open_policy(tiny_model_dir, dtype=dtype)
    kept, again = gradients(policy), gradients(policy, checkpointing=True)
    for one, other in zip(kept, again, strict=True):
        assert one.abs().max() > 0
        assert torch.equal(one, other)


def test_checkpointing_computes_layers_twice(shared_policy):
    calls = []
    layer = shared_policy.trunk.layers[1].mlp
    handle = layer.register_forward_pre_hook(lambda *_: calls.append(1))
    gradients(shared_policy)
    assert len(calls) == 1
    gradients(shared_policy, checkpointing=True)
    handle.remove()
    assert len(calls) == 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_four_bit_weights_are_never_repacked(tiny_model_dir, dtype):
    # On a CPU with AVX512-BF16 an eval forward repacks them, into a format without gradients.
    policy = open_policy(tiny_model_dir, dtype=dtype)
    data = [m.weight.data.clone() for m in quantised(policy)]
    for role in ROLES.values():
        with role(policy):
            forward(policy)
    gradients(policy)
    policy.adapter_state()
    for module, before in zip(quantised(policy), data, strict=True):
        assert not getattr(module.weight.quant_state, "packing_format_for_cpu", False)
        assert torch.equal(module.weight.data, before)


def test_dtypes_and_what_is_trained(tiny_model_dir):
    policy = open_policy(tiny_model_dir, dtype=torch.bfloat16)
    assert policy.dtype == policy.trunk.embed_tokens.weight.dtype == torch.bfloat16
    norms = [m for n, m in policy.trunk.named_modules() if n.endswith("norm")]
    assert len(norms) == 5
    assert {m.weight.dtype for m in norms} == {torch.bfloat16}
    assert policy.head_weight_VD is policy.trunk.embed_tokens.weight  # tied, and not copied
    adapters = policy.adapter_parameters()
    assert len(adapters) == 2 * len(quantised(policy)) == 28
    assert {p.dtype for p in adapters.values()} == {torch.float32}
    trained = {n for n, p in policy.model.named_parameters() if p.requires_grad}
    assert trained == adapters.keys()
    for module in quantised(policy):
        state = module.weight.quant_state
        assert module.weight.dtype == torch.uint8
        assert (state.quant_type, state.nested, state.dtype) == ("nf4", True, torch.bfloat16)
        assert module.compute_dtype == torch.bfloat16
    hidden_TD = policy.hidden(IDS, POSITIONS, policy.layout(GROUPS))
    assert hidden_TD.dtype == torch.bfloat16
    assert policy.logits(hidden_TD).dtype == torch.float32
    assert {g.dtype for g in gradients(policy)} == {torch.float32}


def test_fresh_adapters_come_from_the_seed_alone(tiny_model_dir):
    from lowmem_grpo.policy.base import AdapterSettings
    from lowmem_grpo.policy.load import load_policy

    def fresh(seed, global_seed):
        torch.manual_seed(global_seed)
        stream = torch.get_rng_state()
        policy = load_policy(
            str(tiny_model_dir), device="cpu", dtype=torch.float32, attention="sdpa",
            adapters=AdapterSettings(r=4, lora_alpha=8), seed=seed, tile_tokens=8, tile_vocab=64,
        )  # fmt: skip
        assert torch.equal(torch.get_rng_state(), stream)
        return policy

    one, same, other = fresh(0, 1), fresh(0, 2), fresh(1, 1)
    for name, tensor in one.adapter_state().items():
        assert torch.equal(tensor, same.adapter_state()[name])
        if "lora_B" in name:
            assert not tensor.any()
        else:
            assert not torch.equal(tensor, other.adapter_state()[name])
    with one.as_reference():
        reference_N, _ = forward(one)
    assert torch.equal(forward(one)[0], reference_N)  # B is zero: nothing was learnt yet


def test_adapter_state_goes_round(policy, tiny_model_dir):
    state = policy.adapter_state()
    assert all(t.is_contiguous() and t.dtype == torch.float32 for t in state.values())
    results = forward(policy)[0].detach()
    parameters = policy.adapter_parameters()
    with torch.no_grad():
        for parameter in parameters.values():
            parameter.mul_(-0.5)
    assert not torch.allclose(forward(policy)[0], results)
    policy.load_adapter_state(state)  # a copy: what happened since did not reach it
    assert torch.equal(forward(policy)[0], results)
    # The optimizer holds on to these very tensors.
    assert all(p is parameters[n] for n, p in policy.adapter_parameters().items())
    assert all(p.requires_grad for p in parameters.values())


def test_an_adapter_that_does_not_fit_is_refused_whole(policy):
    before = policy.adapter_state()
    first = min(before)
    missing = {n: t * 0 for n, t in before.items() if n != first}
    with pytest.raises(ModelError, match=f"does not fit this model: 1 tensors differ.*{first}"):
        policy.load_adapter_state(missing)
    with pytest.raises(ModelError, match="1 tensors differ, first another"):
        policy.load_adapter_state({**before, "another": torch.zeros(2)})
    wide = {n: t * 0 for n, t in before.items()} | {first: torch.zeros(9, 64)}
    with pytest.raises(ModelError, match=rf"{first} is \(9, 64\), expected \(4, 128\)"):
        policy.load_adapter_state(wide)
    for name, tensor in policy.adapter_state().items():
        assert torch.equal(tensor, before[name])


def test_unknown_target_modules_are_named(tiny_model_dir):
    from lowmem_grpo.policy.base import AdapterSettings, attach_adapters

    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    settings = AdapterSettings(r=2, lora_alpha=4, target_modules=("q_projection",))
    with pytest.raises(ModelError, match=r"lora.target_modules = \('q_projection',\)"):
        attach_adapters(model, settings, seed=0)


def test_a_kept_reference_is_the_policy_of_when_it_was_kept(policy, tiny_model_dir):
    with policy.as_reference():
        base = forward(policy)[0].clone()
    names = policy.adapter_state().keys(), policy.adapter_parameters().keys()
    assert policy.reference_state() == {}

    def logprobs(role):
        with role():
            return forward(policy)[0].detach().clone()

    policy.keep_reference()
    first = logprobs(policy.as_trainable)
    assert torch.equal(logprobs(policy.as_reference), first)
    assert (first - base).abs().max() > 1e-2
    move_adapters(policy, 0.2, seed=7)
    second = logprobs(policy.as_trainable)
    assert torch.equal(logprobs(policy.as_reference), first)
    assert (second - first).abs().max() > 1e-2
    kept = policy.reference_state()
    policy.sync_reference()
    assert torch.equal(logprobs(policy.as_reference), second)
    policy.load_reference_state(kept)
    assert torch.equal(logprobs(policy.as_reference), first)
    assert torch.equal(logprobs(policy.as_trainable), second)
    # It is nothing that is trained or saved as the adapter.
    assert (policy.adapter_state().keys(), policy.adapter_parameters().keys()) == names
    with pytest.raises(ModelError, match="does not fit"):
        policy.load_reference_state({})


def test_adapters_that_are_fresh_are_the_base(tiny_model_dir):
    policy = open_policy(tiny_model_dir, dtype=torch.bfloat16)
    with torch.no_grad():
        for name, parameter in policy.adapter_parameters().items():
            if "lora_B" in name:
                parameter.zero_()
    with policy.as_reference():
        base = forward(policy)[0].clone()
    policy.keep_reference()
    with policy.as_reference():
        assert torch.equal(forward(policy)[0], base)


def test_adapters_on_the_head_are_refused(tiny_model_dir):
    # It is read by tiles of its weight, in every role: they would be trained on nothing.
    with pytest.raises(ModelError, match=r"adapters on the output head are not supported"):
        open_policy(tiny_model_dir, target_modules=("q_proj", "lm_head"))
