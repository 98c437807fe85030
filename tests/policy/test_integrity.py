"""The base is what was loaded, to the bit, or it is said."""

import pytest
import torch

from lowmem_grpo.policy.integrity import Base, IntegrityError, base_sums, named_tensors
from tests.grpo.policies import open_policy
from tests.tiny import make_tiny_model


def flip(tensor, place=0, bit=1):
    flat = tensor.detach().reshape(-1).view(torch.uint8)
    flat[place] ^= bit


def test_training_does_not_change_it(policy):
    base = Base(policy)
    for parameter in policy.adapter_parameters().values():
        parameter.data += 1.0
    with policy.as_sampler():
        policy.hidden(torch.arange(5), torch.arange(5), policy.layout([(5, ())]))
    base.check()
    assert Base(policy).digest == base.digest


def test_any_bit_of_any_tensor_is_seen(policy):
    base, own = Base(policy), policy.adapter_parameters()
    tensors = {name: x for name, x in named_tensors(policy.model) if name not in own}
    kinds = {name.rpartition(".")[2] for name in tensors}
    assert {"weight", "absmax", "offset"} <= kinds
    for tensor in tensors.values():
        last = tensor.numel() * tensor.element_size() - 1
        for place, bit in ((0, 1), (last, 128)):
            flip(tensor, place, bit)
            with pytest.raises(IntegrityError, match="are not what was loaded"):
                base.check()
            flip(tensor, place, bit)
    base.check()
    assert base_sums(policy).keys() == tensors.keys()


def test_adapters_that_are_on_in_the_reference_are_seen(policy, monkeypatch):
    base = Base(policy)
    monkeypatch.setattr(policy, "as_reference", policy.as_sampler)
    with pytest.raises(IntegrityError, match="the reference is not what it was"):
        base.check()


def test_a_reference_that_moves_is_expected_to(policy):
    policy.keep_reference()
    base = Base(policy)
    for parameter in policy.adapter_parameters().values():
        parameter.data += 0.3
    base.check()
    policy.sync_reference()
    with pytest.raises(IntegrityError, match="the reference is not what it was"):
        base.check()
    base.expect_reference()
    base.check()


def test_which_layers_have_adapters_makes_no_other_base(tiny_model_dir):
    few = open_policy(tiny_model_dir, target_modules=["q_proj"])
    assert Base(few).digest == Base(open_policy(tiny_model_dir)).digest


def test_where_the_embedding_lies_makes_no_other_base(tmp_path):
    untied = make_tiny_model(tmp_path / "model", tie_word_embeddings=False)
    here, there = Base(open_policy(untied)), Base(open_policy(untied, embedding_on_host=True))
    assert here.digest == there.digest
    assert not here.is_other_than(there.digest)
    assert here.is_other_than("cpu:another")
    assert not here.is_other_than("cuda:another")  # which may quantise otherwise
    assert not here.is_other_than("")
    flip(there._policy.trunk.get_input_embeddings().table.weight)
    with pytest.raises(IntegrityError, match="embed_tokens"):
        there.check()
    rounded = open_policy(untied, lm_head_bits=8)
    base = Base(rounded)
    flip(rounded.head_weight_VD.numbers_VD)
    with pytest.raises(IntegrityError, match=r"head\.numbers"):
        base.check()
