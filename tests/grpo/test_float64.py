"""The update against the same mathematics in float64, and the plain float32 rows beside it.

The twin is a plain transformers model in float64 whose linear layers hold the dequantised NF4
weights, under PEFT's own LoRA layers. What the packed update loses to rounding must be no more than
what a plain float32 forward of each row loses.
"""

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit

from lowmem_grpo.grpo.objective import Objective, rollout_weights
from lowmem_grpo.grpo.packing import pack
from lowmem_grpo.grpo.update import Scoring, accumulate
from lowmem_grpo.policy.source import resolve
from lowmem_grpo.quiet import quiet_libraries
from tests.grpo.policies import (
    gradients,
    make_off_policy,
    move_adapters,
    naive_loss,
    open_policy,
    relative_error,
)
from tests.grpo.rollouts import make_groups

SHAPE = [(11, [9, 1, 16, 5]), (4, [7, 7, 2, 12]), (17, [1, 3, 8, 10])]
CLIP = {"epsilon": 0.2, "epsilon_high": 0.25}


class Float64:
    """What `naive_loss` and `gradients` ask of a policy, over a float64 copy of one."""

    def __init__(self, policy, directory):
        from peft import LoraConfig, get_peft_model
        from transformers import AutoModelForCausalLM

        config = policy.model.peft_config["default"]
        with quiet_libraries():
            model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float64)
            self.model = get_peft_model(
                model,
                LoraConfig(
                    r=config.r,
                    lora_alpha=config.lora_alpha,
                    target_modules="all-linear",
                    task_type="CAUSAL_LM",
                ),
                autocast_adapter_dtype=False,
            )
        self.causal_lm = self.model.get_base_model()
        own = dict(self.model.named_parameters())
        for name, parameter in policy.model.named_parameters():
            value = parameter.data
            if hasattr(parameter, "quant_state"):
                value = dequantize_4bit(value, parameter.quant_state)
            own[name].data = value.double().view(own[name].shape)

    def adapter_parameters(self):
        return {n: p for n, p in self.model.named_parameters() if "lora_" in n}


def errors(directory, *, scale, **tiles):
    """Relative gradient errors of (the packed update, plain float32 rows)."""
    policy = open_policy(directory, **tiles)
    move_adapters(policy, scale)
    groups = make_groups(SHAPE, vocab=policy.head_weight_VD.shape[0])
    scoring = Scoring(1.0, (0,))
    make_off_policy(policy, groups, scoring)
    weights = rollout_weights([n for _, row in SHAPE for n in row], "grpo", 16)
    batches = pack(groups, weights, max_tokens=40)
    objective = Objective(beta=0.0, **CLIP)
    accumulate(policy, batches, scoring, objective, checkpointing=True)
    found = [gradients(policy)]
    for twin in (policy, Float64(policy, resolve(str(directory)))):
        loss, _, _ = naive_loss(twin, groups, objective, longest=16)
        loss.backward()
        found.append(gradients(twin))
    packed, rows, truth = found
    assert truth.dtype == torch.float64
    return relative_error(packed, truth), relative_error(rows, truth)


def test_tiny_model(tiny_model_dir):
    packed, rows = errors(tiny_model_dir, scale=0.1)
    assert packed < 1e-5
    assert packed < 2 * rows


@pytest.mark.slow
def test_demo_model(demo_model):
    packed, rows = errors(demo_model, scale=0.01, tile_tokens=1024, tile_vocab=16384)
    assert packed < 1e-5
    assert packed < 1.2 * rows
