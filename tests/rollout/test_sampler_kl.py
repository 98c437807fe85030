"""What the demo model is sampled from is what is trained, up to rounding."""

import pytest
import torch

from lowmem_grpo.grpo.objective import k3
from lowmem_grpo.grpo.packing import pack
from lowmem_grpo.grpo.update import Scoring
from lowmem_grpo.policy.base import AdapterSettings
from lowmem_grpo.policy.load import load_policy
from lowmem_grpo.rollout.groups import end_token_ids, sample_groups
from lowmem_grpo.rollout.sampling import Sampling
from lowmem_grpo.tasks.base import Problem
from tests.grpo.policies import move_adapters

QUESTIONS = "What is 3 + 4?", "Name three colours, and say which one you like best and why."


@pytest.mark.slow
@pytest.mark.parametrize("moved", [0.0, 0.01])
@pytest.mark.parametrize(
    ("dtype", "bits", "limit"),
    [(torch.float32, 16, 1e-6), (torch.bfloat16, 16, 1e-2), (torch.float32, 8, 1e-2)],
)
def test_sampler_and_trainer_of_the_demo_model_agree(demo_model, dtype, bits, limit, moved):
    policy = load_policy(
        demo_model, device="cpu", dtype=dtype, attention="tiled",
        adapters=AdapterSettings(r=16, lora_alpha=32), seed=0, tile_tokens=512, tile_vocab=2048,
    )  # fmt: skip
    policy.cache_bits = bits
    if moved:
        move_adapters(policy, moved)
    groups = sample_groups(
        policy,
        [Problem(text, ({"role": "user", "content": text},), "") for text in QUESTIONS],
        num_generations=8,
        sampling=Sampling(max_completion_length=24),
        seed=0,
        step=0,
        max_prompt_length=100,
        batch_size=64,
    )
    for group in groups:
        group.advantages = [1.0] * 8
    (batch,) = pack(groups, [1.0] * 16, max_tokens=10**6)
    with policy.as_trainable():
        logprobs_N = Scoring(1.0, end_token_ids(policy))(policy, batch).logprobs_N
    found = k3(batch.old_logprobs_N, logprobs_N.detach()).mean().item()
    print(f"{dtype}, cache of {bits} bits, adapters moved by {moved}: mean k3 {found:.2g}")
    assert found < limit
