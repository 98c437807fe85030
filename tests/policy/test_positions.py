"""A row's log-probs are a function of that row, whatever kind of rotary embedding a model has."""

import sys
import types

import numpy as np
import pytest
import torch
import torch.nn.attention

from lowmem_grpo.errors import ModelError
from lowmem_grpo.policy.attention import BACKENDS
from lowmem_grpo.rollout.sampler import Request, sample
from lowmem_grpo.rollout.sampling import Sampling
from tests.grpo.policies import open_policy, plain_forward
from tests.policy import standins
from tests.tiny import make_tiny_model

FIRST = 16  # tokens of the first window: the short row ends within it, its neighbour beyond
WINDOW = 40
SHORT = [3, 9, 27, 81, 4], [12, 36, 108, 5]
LONG = list(range(20, 40)), list(range(40, 52))
FACTORS = {"short_factor": [1.0] * 8, "long_factor": [1.0 + i for i in range(8)]}
ROPES = {
    "dynamic": {"factor": 4.0},
    "longrope": {"original_max_position_embeddings": FIRST, **FACTORS},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": FIRST},
    "linear": {"factor": 4.0},
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": FIRST,
    },
    "default": {},
}
SLOW = pytest.mark.slow


@pytest.fixture(autouse=True)
def flash(monkeypatch):
    """Both flash libraries are the stand-ins."""
    package = types.ModuleType("flash_attn")
    package.flash_attn_varlen_func = standins.flash_attn_varlen_func
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    varlen = types.ModuleType("torch.nn.attention.varlen")
    varlen.varlen_attn = standins.varlen_attn
    monkeypatch.setitem(sys.modules, "torch.nn.attention.varlen", varlen)
    monkeypatch.setattr(torch.nn.attention, "varlen", varlen, raising=False)


def model_with(directory, kind, **rope):
    """Of a rotary embedding; longrope is Phi-3's, as its models have it."""
    more = {"original_max_position_embeddings": FIRST} if kind == "longrope" else {}
    return make_tiny_model(
        directory,
        "phi3" if kind == "longrope" else "llama",
        max_position_embeddings=4 * FIRST if kind == "longrope" else FIRST,
        rope_parameters={"rope_type": kind, "rope_theta": 10000.0, **ROPES[kind], **rope},
        **more,
    )


def trained_on(policy, *rows):
    """Log-probs of the first row's completion, packed with the others."""
    ids, positions, groups, start = [], [], [], 0
    for prompt, own in rows:
        ids += prompt + own
        positions += range(len(prompt + own))
        groups.append((len(prompt), (len(own),)))
    prompt, own = rows[0]
    scored = torch.arange(len(prompt) - 1, len(prompt) + len(own) - 1) + start
    with torch.no_grad():
        hidden_TD = policy.hidden(torch.tensor(ids), torch.tensor(positions), policy.layout(groups))
        return policy.score(hidden_TD[scored], torch.tensor(own))[0]


def sampled_with(policy, *prompts):
    """The first prompt's completion, and its log-probs, sampled together with the others."""
    generator = np.random.default_rng(3)
    length = len(LONG[1])
    uniforms = generator.random((len(prompts), length))
    requests = [Request(p, [u]) for p, u in zip(prompts, uniforms, strict=True)]
    how = Sampling(max_completion_length=length)
    with policy.as_sampler():
        (found, *_) = sample(policy, requests, how, end_ids=(), batch_size=len(prompts))
    return found[0].ids, torch.tensor(found[0].logprobs)


@pytest.mark.parametrize(
    "kind", [*list(ROPES)[:2], *(pytest.param(kind, marks=SLOW) for kind in list(ROPES)[2:])]
)
@pytest.mark.parametrize("window", [WINDOW, None])
def test_a_rows_log_probs_do_not_depend_on_its_neighbours(tmp_path, kind, window):
    policy = open_policy(model_with(tmp_path, kind), window=window)
    for backend in BACKENDS:
        policy.attention = backend
        alone = trained_on(policy, SHORT)
        torch.testing.assert_close(trained_on(policy, SHORT, LONG), alone, rtol=0, atol=2e-5)
        torch.testing.assert_close(trained_on(policy, SHORT), alone, rtol=0, atol=2e-5)
        ids, logprobs = sampled_with(policy, SHORT[0])
        beside, theirs = sampled_with(policy, SHORT[0], LONG[0])
        assert beside == ids
        torch.testing.assert_close(theirs, logprobs, rtol=0, atol=2e-5)
        # Longer than the first window by the end: sampler and trainer agree there, too.
        ids, logprobs = sampled_with(policy, LONG[0], SHORT[0])
        trained = trained_on(policy, (LONG[0], ids), SHORT)
        torch.testing.assert_close(logprobs, trained, rtol=0, atol=2e-5)


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_the_frequencies_are_those_of_a_call_as_long_as_the_window(tmp_path, kind):
    """As plain transformers takes them, which looks at the longest position of a call."""
    model_with(tmp_path, kind)
    within = open_policy(tmp_path, window=FIRST)
    beyond = open_policy(tmp_path, window=WINDOW)
    assert not any("rotary" in line for line in within.said)
    assert any(f"{WINDOW} tokens" in line for line in beyond.said)
    from transformers import AutoModelForCausalLM

    plain = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    rotary, x = plain.model.rotary_emb, torch.zeros(1, 1, 64)
    for policy, tokens in ((within, FIRST), (beyond, WINDOW)):
        positions = torch.arange(tokens)[None]
        for ours, theirs in zip(
            policy.trunk.rotary_emb(x, positions), rotary(x, positions), strict=True
        ):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_an_alpha_is_not_taken_for_frequencies_that_change(tmp_path):
    """HunYuan's "dynamic" is fixed by its alpha, and stays as it is."""
    make_tiny_model(
        tmp_path,
        "hunyuan_v1_dense",
        head_dim=16,
        rope_parameters={
            "rope_type": "dynamic", "rope_theta": 10000.0, "alpha": 1000.0, "factor": 1.0
        },
    )  # fmt: skip
    policy = open_policy(tmp_path, window=WINDOW)
    row = SHORT[0] + SHORT[1]
    expected = (
        plain_forward(policy, row).log_softmax(-1)[4:8].gather(1, torch.tensor(SHORT[1])[:, None])
    )
    torch.testing.assert_close(trained_on(policy, SHORT), expected[:, 0], rtol=0, atol=1e-4)
    assert policy.causal_lm.config.rope_parameters["rope_type"] == "dynamic"


def test_a_table_of_learned_positions_is_not_read_beyond_its_end(tmp_path):
    make_tiny_model(tmp_path, "gpt2", max_position_embeddings=32)
    with pytest.raises(ModelError, match=r"has 32 learned positions, and .* may have 33 tokens"):
        open_policy(tmp_path, window=33)
    open_policy(tmp_path, window=32)
