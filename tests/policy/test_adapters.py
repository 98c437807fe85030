"""Adapters are on every layer that was asked for, or the name is refused."""

import re

import pytest
import torch
from peft.tuners.lora import LoraLayer

from lowmem_grpo.errors import ModelError
from lowmem_grpo.policy.adapters import AdapterSettings, adapts_embedding
from lowmem_grpo.policy.base import attach_adapters
from lowmem_grpo.policy.load import load_policy
from lowmem_grpo.policy.skeleton import read_model_config, without_weights
from tests.families import make_family
from tests.runs import call
from tests.tiny import make_tiny_model


def skeleton(directory, **settings):
    """The model with adapters, as it is planned."""
    settings = AdapterSettings(**{"r": 4, "lora_alpha": 8, **settings})
    return without_weights(read_model_config(str(directory)), torch.float32, settings)


def loaded(directory, **settings):
    settings = AdapterSettings(**{"r": 4, "lora_alpha": 8, **settings})
    return load_policy(
        str(directory), device="cpu", dtype=torch.float32, attention="sdpa", adapters=settings,
        seed=0, tile_tokens=7, tile_vocab=19,
    )  # fmt: skip


def adapted(model):
    return {name for name, module in model.named_modules() if isinstance(module, LoraLayer)}


REFUSED = [
    (["q_proj", "v_porj"], "no module is called 'v_porj' (did you mean 'v_proj'?)"),
    (["v_porj"], "no module is called 'v_porj' (did you mean 'v_proj'?)"),
    (["layers.0.self_attn.q_proj", "layers.7.self_attn.q_proj"], "'layers.7.self_attn.q_proj'"),
    (["q_proj", "gate_up_proj"], "no module is called 'gate_up_proj'"),
    (["q_proj", "proj"], "no module is called 'proj'"),
    (["q_proj", ""], "no module is called ''"),
    (["q_proj", "lm_head"], "adapters on the output head are not supported"),
    (["self_attn"], "'self_attn' is a LlamaAttention, which has no weight: name its layers"),
    ("q_proj", "a text alone is a pattern for whole names: use ['q_proj']"),
    (r".*\.(q_proj|v_porj)", "no module is called 'v_porj' (did you mean 'v_proj'?)"),
    (r".*\.self_atn\.q_proj|.*\.k_proj", "no module is called 'self_atn'"),
    (r".*\.(q_proj", "unterminated subpattern"),
    (r"nothing", "not found in the base model"),
]


@pytest.mark.parametrize(("targets", "message"), REFUSED, ids=str)
def test_names_that_match_nothing_are_refused(tiny_model_dir, targets, message):
    targets = targets if isinstance(targets, str) else tuple(targets)
    for build in (skeleton, loaded):
        with pytest.raises(ModelError, match=re.escape(message)) as raised:
            build(tiny_model_dir, target_modules=targets)
        assert f"lora.target_modules = {targets!r}: " in str(raised.value)


def test_a_command_refuses_them_before_anything_is_loaded(tiny_model_dir, tmp_path):
    for command in (["plan"], ["train", "--output", tmp_path / "run"]):
        done = call(
            *command, "--model", tiny_model_dir, "--profile", "cpu",
            "--set", 'lora.target_modules=["q_proj", "v_porj"]',
        )  # fmt: skip
        assert done.exit_code == 2
        assert "'v_porj' (did you mean 'v_proj'?)" in done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("targets", "count"),
    [
        (["q_proj", "v_proj"], 4),
        (["layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj"], 2),
        (["q_proj", "embed_tokens"], 3),
        (r".*\.layers\.[01]\.(?:self_attn|mlp)\.(q|up)_proj", 4),
        (r"(?i).*\.Q_PROJ", 2),
        (r"(?!.*\.mlp\.).*_proj", 8),
        ("all-linear", 14),
    ],
    ids=str,
)
def test_what_is_named_is_adapted(tiny_model_dir, targets, count):
    targets = targets if isinstance(targets, str) else tuple(targets)
    policy = loaded(tiny_model_dir, target_modules=targets)
    assert len(adapted(policy.model)) == count
    assert len(policy.adapter_parameters()) == 2 * count == len(policy.adapter_state())
    assert policy.said[0].startswith(f"adapters on {count} layers: ")
    assert len(policy.said) == 1
    assert all(p.requires_grad for p in policy.adapter_parameters().values())
    trainable = {n for n, p in policy.model.named_parameters() if p.requires_grad}
    assert trainable == set(policy.adapter_parameters())


def test_a_pattern_for_many_models_says_what_is_not_in_this_one(tiny_model_dir):
    pattern = r".*(?:language|text|model).*(?:self_attn|attention)\.(?:q_proj|o_proj)"
    policy = loaded(tiny_model_dir, target_modules=pattern)
    assert policy.said[1] == (
        "lora.target_modules: no layer with an adapter has language, text, attention in it"
    )


def test_experts_and_their_neighbours_are_said(tmp_path):
    directory = make_family(tmp_path / "moe", "qwen3_moe")
    policy = loaded(directory)
    assert policy.said == [
        "adapters on 11 layers: q_proj 2, k_proj 2, v_proj 2, o_proj 2, down_proj 1, "
        "gate_up_proj 1, gate.weight 1",
        "no adapter on 3 layers that lora.target_modules = 'all-linear' names, first "
        "model.layers.0.mlp.gate_proj: PEFT takes their names for those of the experts",
    ]
    names = {"target_modules": ("q_proj",), "target_parameters": ("experts.down_proj",)}
    policy = loaded(directory, **names)
    assert policy.said == ["adapters on 3 layers: q_proj 2, down_proj 1"]
    for names, message in (
        (["experts.donw_proj"], "'experts.donw_proj' (did you mean 'experts.down_proj'?)"),
        (["q_proj.weight"], "model.layers.0.self_attn.q_proj.weight is in 4 bits: name its layer"),
    ):
        with pytest.raises(ModelError, match=re.escape(message)):
            loaded(directory, target_modules=("q_proj",), target_parameters=tuple(names))


def test_ranks_and_scales_of_layers(tiny_model_dir):
    policy = loaded(
        tiny_model_dir, rank_pattern={"q_proj": 2, "layers.1.mlp.up_proj": 6},
        alpha_pattern={"q_proj": 5}, use_rslora=True,
    )  # fmt: skip
    layers = policy.causal_lm.model.layers
    found = {
        (layer.r["default"], round(layer.scaling["default"], 6))
        for layer in (layers[0].self_attn.q_proj, layers[1].mlp.up_proj, layers[0].mlp.up_proj)
    }
    assert found == {(2, round(5 / 2**0.5, 6)), (6, round(8 / 6**0.5, 6)), (4, 4.0)}
    with pytest.raises(ModelError, match=r"lora.rank_pattern: 'q_porj'"):
        loaded(tiny_model_dir, rank_pattern={"q_porj": 2})


def test_layers_with_scales_of_their_own_sample_as_they_train(tiny_model_dir):
    from tests.grpo.policies import move_adapters, relative_error

    for dtype, most in ((torch.float32, 1e-5), (torch.bfloat16, 0.05)):
        policy = load_policy(
            str(tiny_model_dir), device="cpu", dtype=dtype, attention="sdpa", seed=0, tile_tokens=7,
            tile_vocab=19, adapters=AdapterSettings(
                r=4, lora_alpha=8, rank_pattern={"k_proj": 2}, alpha_pattern={"q_proj": 80},
            ),
        )  # fmt: skip
        move_adapters(policy, 0.1)
        ids, positions = torch.tensor([5, 9, 77, 3, 20]), torch.arange(5)
        layout = policy.layout([(5, ())])
        with policy.as_sampler():
            sampled = policy.hidden(ids, positions, layout)
        with torch.no_grad():
            trained = policy.hidden(ids, positions, layout)
        assert relative_error(sampled.float(), trained.float()) < most


def test_an_embedding_with_an_adapter_stays_on_the_card(tmp_path):
    directory = make_tiny_model(tmp_path / "tiny", "qwen3", tie_word_embeddings=False)
    config = read_model_config(str(directory))
    for targets, expected in (
        (("embed_tokens", "q_proj"), True),
        (r".*embed_tokens|.*q_proj", True),
        (("q_proj",), False),
        ("all-linear", False),
    ):
        settings = AdapterSettings(r=4, lora_alpha=8, target_modules=targets)
        assert adapts_embedding(config, settings) is expected
    policy = loaded(directory, target_modules=("embed_tokens", "q_proj"))
    with pytest.raises(ModelError, match="the embedding has an adapter"):
        policy.embedding_to_host()


def test_attaching_names_the_nearest(tiny_model_dir):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    settings = AdapterSettings(r=2, lora_alpha=4, target_modules=("q_projection",))
    with pytest.raises(ModelError, match=r"'q_projection' \(did you mean 'q_proj'\?\)"):
        attach_adapters(model, settings, seed=0)
