"""Which models load, in what dtype, and how the others are refused."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from lowmem_grpo.errors import ModelError
from lowmem_grpo.policy.load import load_tokenizer, nf4_config
from tests.grpo.policies import open_policy, plain_forward
from tests.tiny import make_tiny_model, make_tokenizer


def edit_config(directory, **fields):
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def edit_weights(directory, edit):
    path = directory / "model.safetensors"
    weights = load_file(path)
    edit(weights)
    save_file(weights, path, metadata={"format": "pt"})


def logits(policy, ids):
    layout = policy.layout([(len(ids), ())])
    with torch.no_grad():
        hidden_TD = policy.hidden(torch.tensor(ids), torch.arange(len(ids)), layout)
        return policy.logits(hidden_TD)


def without_template(directory):
    (directory / "chat_template.jinja").unlink()


def truncated(directory):
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def garbage(directory):
    (directory / "model.safetensors").write_bytes(b"not tensors at all")


def pickles_only(directory):
    torch.save({}, directory / "pytorch_model.bin")
    (directory / "model.safetensors").unlink()


def missing_weight(directory):
    edit_weights(directory, lambda w: w.pop("model.layers.1.self_attn.k_proj.weight"))


def missing_norm(directory):
    edit_weights(directory, lambda w: w.pop("model.norm.weight"))


def misshapen(directory):
    edit_weights(directory, lambda w: w.update({"model.norm.weight": torch.zeros(7)}))


def gptq(directory):
    edit_config(directory, quantization_config={"quant_method": "gptq", "bits": 4})


def eight_bits(directory):
    quantised = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    edit_config(directory, quantization_config=quantised)


def bad_config(directory):
    (directory / "config.json").write_text("{not json")


def unknown_type(directory):
    edit_config(directory, model_type="nonesuch")


def bad_tokenizer(directory):
    path = directory / "tokenizer.json"
    path.write_text(path.read_text().replace('"WordLevel"', '"Words"'))


def no_end_token(directory):
    path = directory / "tokenizer_config.json"
    fields = json.loads(path.read_text())
    path.write_text(json.dumps({**fields, "eos_token": None}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (without_template, "has no chat template: use an instruct model, or"),
        (truncated, "cannot read .*: Error while deserializing header"),
        (garbage, "cannot read .*: Error while deserializing header"),
        (pickles_only, r"no .safetensors file \(it has pytorch_model.bin, which is a pickle\)"),
        (missing_weight, "1 weights are missing from its files, first model.layers.1.self_attn.k"),
        (missing_norm, "1 weights are missing from its files, first model.norm.weight"),
        (misshapen, "cannot load|is not supported: The size"),
        (gptq, "is quantised by gptq, not in bitsandbytes' 4 bits"),
        (eight_bits, "is quantised by bitsandbytes' 8 bits .load_in_8bit., not in"),
        (bad_config, "not a valid JSON"),
        (unknown_type, "nonesuch"),
        (bad_tokenizer, "cannot load the tokenizer of"),
        (no_end_token, "names no end-of-sequence token"),
    ],
    ids=lambda x: getattr(x, "__name__", ""),
)
def test_a_damaged_directory_is_one_short_message(tmp_path, damage, message):
    make_tiny_model(tmp_path)
    damage(tmp_path)
    with pytest.raises(ModelError, match=message) as caught:
        open_policy(tmp_path)
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("architecture", "fields", "message"),
    [
        # Logits that are capped or scaled, which a small model would not show.
        (
            "gemma2",
            {"head_dim": 16},
            r"it soft-caps its logits at 30.0 \(final_logit_softcapping\)",
        ),
        ("granite", {"logits_scaling": 4.0}, r"it divides its logits by 4.0 \(logits_scaling\)"),
        # Layers that mix tokens in another way, and would leak between completions.
        (
            "lfm2",
            {"layer_types": ["conv", "full_attention"]},
            r"it has conv layers \(layer_types\)",
        ),
        ("mamba", {}, "it has linear_attention layers"),
        # Keys and values of different sizes; attention that cannot be replaced, or has no layout.
        ("deepseek_v3", {}, "keys of 192 numbers a head and values of 128"),
        ("gptj", {}, "its attention is its own, which cannot be replaced by ours"),
        ("mpt", {}, "its attention is its own, which cannot be replaced by ours"),
        ("stablelm", {}, "do not hand on to StableLmAttention which tokens belong together"),
    ],
)
def test_what_we_do_not_compute_is_refused(tmp_path, architecture, fields, message):
    make_tiny_model(tmp_path, architecture, **fields)
    with pytest.raises(ModelError, match=message):
        open_policy(tmp_path)


def test_what_the_configuration_tells_does_not_depend_on_the_precision(tmp_path):
    make_tiny_model(tmp_path, "recurrent_gemma")
    with pytest.raises(ModelError, match=r"it soft-caps its logits at 30\.0"):
        open_policy(tmp_path, dtype=torch.bfloat16)


def test_a_chat_template_may_be_given(tmp_path):
    make_tiny_model(tmp_path / "model")
    without_template(tmp_path / "model")
    template = tmp_path / "chat.jinja"
    text = "{% for m in messages %}[{{ m['content'] }}]{% endfor %}"
    messages = [{"role": "user", "content": "hi"}]
    # As it is, and as a tokenizer_config.json has it.
    for whole in (text, "\ufeff" + text, json.dumps({"chat_template": text, "other": 1})):
        template.write_text(whole)
        tokenizer = load_tokenizer(str(tmp_path / "model"), str(template))
        assert tokenizer.apply_chat_template(messages, tokenize=False) == "[hi]"
    template.write_text('{"messages": []}')
    with pytest.raises(ModelError, match="JSON without a text named 'chat_template'"):
        load_tokenizer(str(tmp_path / "model"), str(template))
    with pytest.raises(ModelError, match="no such file: nowhere"):
        load_tokenizer(str(tmp_path / "model"), "nowhere.jinja")


def test_dropout_is_off(tmp_path):
    # Two passes over the same tokens must agree, in train mode, which bitsandbytes needs.
    make_tiny_model(tmp_path, attention_dropout=0.5)
    policy = open_policy(tmp_path)
    assert policy.model.training
    ids = [3, 4, 5, 6, 7, 8]
    with torch.no_grad():
        first, again = plain_forward(policy, ids), plain_forward(policy, ids)
    assert torch.equal(first, again)
    torch.testing.assert_close(logits(policy, ids), first, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_files_that_are_nf4_already_are_taken_in_the_dtype_asked_for(tmp_path, dtype):
    make_tiny_model(tmp_path / "plain")
    # Rounded first, so that what is quantised is the same in every dtype.
    edit_weights(
        tmp_path / "plain", lambda w: w.update({n: t.bfloat16().float() for n, t in w.items()})
    )
    stored = AutoModelForCausalLM.from_pretrained(
        tmp_path / "plain", quantization_config=nf4_config(torch.bfloat16), dtype=torch.bfloat16
    )
    stored.save_pretrained(tmp_path / "nf4")
    make_tokenizer().save_pretrained(tmp_path / "nf4")
    policy = open_policy(tmp_path / "nf4", dtype=dtype)
    assert policy.dtype == dtype
    assert policy.trunk.norm.weight.dtype == dtype
    layers = [m for m in policy.model.modules() if type(m).__name__ == "Linear4bit"]
    assert len(layers) == 14
    assert {m.compute_dtype for m in layers} == {dtype}
    ids = [3, 90, 5, 60, 7]
    expected = logits(open_policy(tmp_path / "plain", dtype=dtype), ids)
    torch.testing.assert_close(logits(policy, ids), expected)


def test_the_demo_model_is_itself_when_packed(demo_model):
    policy = open_policy(demo_model, tile_tokens=64, tile_vocab=16384)
    tokenizer = policy.tokenizer
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is 3 + 4?"}], add_generation_prompt=True
    )["input_ids"]
    rows = [tokenizer.encode(text) for text in ("The answer is 7.", "Eight, I think")]
    ids = torch.tensor(prompt + rows[0] + rows[1])
    lengths = [len(row) for row in rows]
    positions = torch.cat(
        [torch.arange(len(prompt))] + [len(prompt) + torch.arange(n) for n in lengths]
    )
    with policy.as_sampler():
        hidden_TD = policy.hidden(ids, positions, policy.layout([(len(prompt), tuple(lengths))]))
        found = policy.logits(hidden_TD).log_softmax(-1)
        expected = plain_forward(policy, prompt + rows[1])[len(prompt) :].log_softmax(-1)
    assert (found[-lengths[1] :] - expected).abs().max() < 1e-3
