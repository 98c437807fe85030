"""The sampler's own layers compute what the model's modules do, to the last bit."""

import numpy as np
import pytest
import torch

from lowmem_grpo.policy import shared_input
from lowmem_grpo.policy.base import AdapterSettings
from lowmem_grpo.policy.load import load_policy
from lowmem_grpo.rollout.sampler import Request, sample
from lowmem_grpo.rollout.sampling import Sampling
from tests.grpo.policies import move_adapters, open_policy
from tests.tiny import make_tiny_model

# A window of three is shorter than each of these sequences.
WINDOW = {"sliding_window": 3, "use_sliding_window": True, "max_window_layers": 1}
KINDS = {
    "llama": {},
    "llama with biases": {"attention_bias": True, "mlp_bias": True},
    "llama, wide heads": {"head_dim": 32},
    "mistral": {"sliding_window": 3},
    "qwen2": {},
    "qwen2, a layer with a window": WINDOW,
    "qwen3, a layer with a window": WINDOW,
}


@pytest.fixture(scope="module", params=KINDS)
def kind(request, tmp_path_factory):
    architecture = request.param.split(",")[0].split()[0]
    directory = tmp_path_factory.mktemp("model") / "tiny"
    return make_tiny_model(directory, architecture, **KINDS[request.param])


def opened(directory, dtype=torch.float32):
    policy = open_policy(directory, dtype=dtype)
    generator = torch.Generator().manual_seed(3)
    for name, parameter in policy.causal_lm.named_parameters():
        if "norm" in name or name.endswith("base_layer.bias"):
            parameter.data.normal_(1.0, 0.5, generator=generator)
    return policy


def by_both_ways(policy, run):
    """What `run()` finds by the sampler's own layers, and by the model's modules."""
    layers = policy.sampling_layers
    assert len(layers) == policy.causal_lm.config.num_hidden_layers
    found = run()
    policy.sampling_layers = None
    try:
        return found, run()
    finally:
        policy.sampling_layers = layers


def drawn(policy):
    """Two problems, three completions each of which some end early."""
    generator = np.random.default_rng(0)
    requests = [
        Request(prompt, [generator.random(20) for _ in range(3)])
        for prompt in ([5, 9, 77, 3], [8] * 11)
    ]
    sampling = Sampling(max_completion_length=20)
    with policy.as_sampler():
        groups = sample(policy, requests, sampling, end_ids=tuple(range(8)), batch_size=6)
    assert len({len(completion.ids) for group in groups for completion in group}) > 2
    return [(completion.ids, completion.logprobs) for group in groups for completion in group]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_forward_pass_is_the_same(kind, dtype):
    policy = opened(kind, dtype)
    ids = torch.tensor([4, 80, 33, 12, 60, 61, 90, 62])
    positions = torch.tensor([0, 1, 2, 3, 4, 5, 4, 5])

    def run():
        with policy.as_sampler():
            return policy.hidden(ids, positions, policy.layout([(4, (2, 2))]))

    found, expected = by_both_ways(policy, run)
    assert torch.equal(found, expected)
    with policy.as_reference():
        assert not torch.equal(run(), policy.hidden(ids, positions, policy.layout([(4, (2, 2))])))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_drawn_is_the_same(kind, dtype):
    policy = opened(kind, dtype)
    found, expected = by_both_ways(policy, lambda: drawn(policy))
    assert found == expected


@pytest.mark.parametrize(
    ("architecture", "targets", "shape"),
    [
        ("llama", ("q_proj", "v_proj"), {}),  # others are the base's alone
        ("llama", ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "down_proj"), {}),
        # The parts of a Llama, and their products multiplied.
        ("granite", "all-linear", {"residual_multiplier": 0.5, "attention_multiplier": 0.3}),
        ("phi3", "all-linear", {}),  # one linear layer for queries, keys and values
    ],
)
def test_other_models_and_adapters_sample_through_their_modules(
    tmp_path, architecture, targets, shape
):
    directory = make_tiny_model(tmp_path / "tiny", architecture, **shape)
    policy = load_policy(
        str(directory),
        device="cpu",
        dtype=torch.float32,
        attention="sdpa",
        adapters=AdapterSettings(r=4, lora_alpha=8, target_modules=targets),
        seed=0,
        tile_tokens=7,
        tile_vocab=19,
    )
    move_adapters(policy, 0.1)
    assert policy.sampling_layers is None
    assert drawn(policy)


def test_many_rows_take_the_modules_way(tmp_path, monkeypatch):
    policy = opened(make_tiny_model(tmp_path / "tiny"))
    calls = []
    for layer in policy.sampling_layers:
        layer.register_forward_hook(lambda *_: calls.append(1))
    drawn(policy)
    per_token, rows = len(policy.sampling_layers), 6
    assert calls
    monkeypatch.setattr(shared_input, "MOST_ROWS", rows)  # decodes; prompts are 4 and 11 tokens
    decoded = len(calls)
    calls.clear()
    drawn(policy)
    assert len(calls) == decoded - per_token
    with policy.as_reference():
        calls.clear()
        policy.hidden(torch.tensor([4]), torch.tensor([0]), policy.layout([(1, ())]))
    assert not calls
