"""What a model is asked before it is trained: each question by a Llama that does one thing more."""

import contextlib

import pytest
import torch

from lowmem_grpo.errors import ModelError
from lowmem_grpo.policy.check import check_forward
from tests.grpo.policies import open_policy
from tests.tiny import make_tiny_model


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=str)
def policy(request, tmp_path_factory):
    directory = tmp_path_factory.mktemp("model")
    make_tiny_model(directory)
    policy = open_policy(directory, dtype=request.param)
    for name, parameter in policy.adapter_parameters().items():
        if "lora_B" in name:
            torch.nn.init.zeros_(parameter)  # fresh adapters, as a check wants them
    return policy


def from_the_token_before(policy):
    """As a convolution of two taps: what it leaks touches one token of the next completion."""
    mlp = policy.trunk.layers[0].mlp
    return mlp.register_forward_hook(
        lambda module, args, output: output + 0.5 * args[0].roll(1, -2)
    )


def capped_logits(policy):
    """At 50, where the logits of a small model do not come."""

    def cap(module, args, output):
        output.logits = 50 * torch.tanh(output.logits / 50)
        return output

    return policy.causal_lm.register_forward_hook(cap)


def scaled_embeddings(policy):
    """Of ids alone, as models do whose trunk looks them up by itself."""

    def scale(module, args, kwargs):
        ids = kwargs.pop("input_ids", None)
        if ids is not None:
            kwargs["inputs_embeds"] = 3 * module.get_input_embeddings()(ids)
        return args, kwargs

    return policy.trunk.register_forward_pre_hook(scale, with_kwargs=True)


def noise(policy):
    mlp = policy.trunk.layers[1].mlp
    return mlp.register_forward_hook(
        lambda module, args, output: output + 0.2 * torch.randn_like(output)
    )


@contextlib.contextmanager
def a_window_that_is_not_told(policy):
    # Longer than the tokens that are looked at, so no number shows it.
    policy.causal_lm.config.layer_types = ["full_attention", "sliding_attention"]
    try:
        yield
    finally:
        del policy.causal_lm.config.layer_types


@contextlib.contextmanager
def a_layer_that_does_not_attend(policy):
    class Shift(torch.nn.Module):
        def forward(self, hidden_states, **rest):
            return hidden_states.roll(1, -2), None

    layer = policy.trunk.layers[1]
    attention, layer.self_attn = layer.self_attn, Shift()
    try:
        yield
    finally:
        layer.self_attn = attention


def another_librarys_error(policy):
    def fail(module, args):
        raise TypeError("forward() got an unexpected keyword argument 'layout'")

    return policy.trunk.layers[1].mlp.register_forward_pre_hook(fail)


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        (from_the_token_before, "a token sees more than its prompt and what comes before it"),
        (capped_logits, r"its logits are more than its head's products \(scaled, or soft-capped"),
        (scaled_embeddings, "it does more with its tokens than look up their embeddings"),
        (noise, "its forward pass is random in train mode"),
        (a_window_that_is_not_told, "its layer 1 has a sliding window, of which our attention is"),
        (a_layer_that_does_not_attend, "1 of its 2 layers, first 1, do not attend"),
        (another_librarys_error, r"fails in model.layers.1.mlp \(TiledMLP\), and --debug shows"),
    ],
    ids=lambda x: getattr(x, "__name__", ""),
)
def test_what_is_left_out_is_found_and_named(policy, more, reason):
    with more(policy), pytest.raises(ModelError, match=f"is not supported: .*{reason}"):
        check_forward(policy, "it")
    check_forward(policy, "it")
