"""Sequence classifiers in 4 bits: that they score as transformers does, whatever stands beside a
row, and where their weights lie. On fake CUDA tensors: test_fake_cuda.py.
"""

import bitsandbytes as bnb
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification

from lowmem_grpo.errors import ModelError
from lowmem_grpo.policy import classifier as module
from lowmem_grpo.policy.classifier import (
    Classifier,
    classifier_without_weights,
    load_classifier,
    read_classifier_config,
)
from lowmem_grpo.policy.integrity import named_tensors
from lowmem_grpo.policy.load import nf4_config
from lowmem_grpo.policy.skeleton import fill
from tests.tiny import make_tiny_model, make_tiny_reward_model

ROWS = [[5, 9, 30, 7, 0], [8, 0], [64, 3, 3, 11, 12, 90, 45, 2], [77], [9, 9, 9, 9, 0, 4]]
KINDS = {
    "llama": {},
    "qwen2": {"num_labels": 3},
    "no padding": {"pad_token_id": None},
    "bert": {},
}


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return make_tiny_reward_model(tmp_path_factory.mktemp("reward") / "model")


def loaded(directory, **how):
    config = read_classifier_config(str(directory))
    return load_classifier(str(directory), config, device="cpu", dtype=torch.float32, **how)


def alone(model, rows):
    """The scores that transformers' own model gives one row at a time, without a mask."""
    with torch.no_grad():
        found = [model(input_ids=torch.tensor([row])).logits.float() for row in rows]
    return torch.cat(found)


@pytest.mark.parametrize("kind", KINDS)
def test_the_scores_are_those_of_transformers_whatever_is_in_the_batch(tmp_path, kind):
    architecture = kind if kind != "no padding" else "llama"
    make_tiny_reward_model(tmp_path, architecture, **KINDS[kind])
    ours = loaded(tmp_path)
    # In train mode, since bitsandbytes would repack; what is dropped then is set to nothing.
    quiet = {} if architecture != "bert" else {
        "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
    }  # fmt: skip
    head = "classifier" if architecture == "bert" else "score"
    plain = AutoModelForSequenceClassification.from_pretrained(
        tmp_path, quantization_config=nf4_config(torch.float32, [head]), dtype=torch.float32,
        **quiet,
    ).train()  # fmt: skip
    expected = alone(plain, ROWS)
    assert expected.std() > 0.01
    for rows in (ROWS, ROWS[::-1]):
        found = ours.logits(rows)
        found = found if rows is ROWS else found.flip(0)
        assert torch.allclose(found, expected, rtol=1e-5, atol=1e-5), (found - expected).abs().max()
    parts = torch.cat([ours.logits([row]) for row in ROWS])
    assert torch.allclose(parts, expected, rtol=1e-5, atol=1e-6)


def test_the_head_stays_and_nothing_is_repacked_or_dropped(tmp_path):
    make_tiny_reward_model(tmp_path, "bert", hidden_dropout_prob=0.5)  # a head with a bias
    found = loaded(tmp_path)
    assert type(found.model.classifier) is torch.nn.Linear
    layers = [m for m in found.model.modules() if isinstance(m, bnb.nn.Linear4bit)]
    assert len(layers) == 13
    before = [layer.weight.data.clone() for layer in layers]
    assert torch.equal(found.logits(ROWS), found.logits(ROWS))
    assert all(torch.equal(a, b.weight.data) for a, b in zip(before, layers, strict=True))
    assert not any(getattr(m.weight.quant_state, "packing_format_for_cpu", 0) for m in layers)


@pytest.mark.parametrize("architecture", ["llama", "bert"])
def test_the_skeleton_is_what_loading_builds(tmp_path, architecture):
    make_tiny_reward_model(tmp_path, architecture)
    config = read_classifier_config(str(tmp_path))
    skeleton = classifier_without_weights(str(tmp_path), config, torch.float32)
    fill(skeleton, "meta", torch.float32)

    def told(model):
        return {name: (tuple(t.shape), t.dtype) for name, t in named_tensors(model)}

    assert told(skeleton) == told(loaded(tmp_path).model)


def test_weights_are_on_the_device_while_they_are_used_and_the_hosts_stay(directory):
    there = loaded(directory)
    moving = Classifier(there.model, "meta")  # any device but the host
    before, scores = dict(named_tensors(there.model)), there.logits(ROWS)
    with moving.on_device():
        inside = dict(named_tensors(there.model))
    with pytest.raises(RuntimeError, match="as asked"), moving.on_device():
        raise RuntimeError("as asked")
    assert inside.keys() == before.keys()
    assert {tensor.device.type for tensor in inside.values()} == {"meta"}
    after = dict(named_tensors(there.model))
    assert all(after[name] is before[name] for name in before)
    assert torch.equal(there.logits(ROWS), scores)


def test_a_model_in_which_rows_meet_is_refused(directory, monkeypatch):
    plain = Classifier.logits

    def mixed(self, rows):
        return plain(self, [[*row, *[7] * (max(map(len, rows)) - len(row))] for row in rows])

    monkeypatch.setattr(module.Classifier, "logits", mixed)
    with pytest.raises(ModelError, match=r"depend on what stands beside them.*batch=1"):
        loaded(directory)
    loaded(directory, check=False)


def test_what_is_no_reward_model_is_refused(tmp_path, directory):
    make_tiny_model(tmp_path / "policy")
    with pytest.raises(ModelError, match="is a LlamaForCausalLM, which scores nothing"):
        read_classifier_config(str(tmp_path / "policy"))
    weights = load_file(directory / "model.safetensors")
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((directory / name).read_bytes())
    rest = {name: tensor for name, tensor in weights.items() if name != "score.weight"}
    save_file(rest, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=r"1 weights are missing from its files, first score"):
        loaded(tmp_path)
