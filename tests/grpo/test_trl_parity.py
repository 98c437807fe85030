"""Loss and adapter gradients of one step against TRL's GRPOTrainer, on the same fixed rollouts.

What computes on the other side is TRL's own: a real GRPOTrainer over the same NF4 base with PEFT's
own LoRA layers, padded rows, its fused head and its `compute_loss`. Only generation is left out:
the method is given the rollouts in the form in which `_generate_and_score_completions` leaves them.

TRL casts the adapters of a quantised model to bfloat16 in its constructor. They are put back to
float32 afterwards, with our values, so that what is compared is the mathematics. One default is
set back as well: since 1.16 TRL multiplies the KL term by the importance ratio
(`use_bias_correction_kl`), which is another loss than DeepSeekMath's.

The errors are relative, and printed as a table:
    pytest -s -m "slow or not slow" tests/grpo/test_trl_parity.py
"""

import pytest
import torch

from lowmem_grpo.grpo.objective import LOSS_TYPES, rollout_weights
from lowmem_grpo.grpo.packing import pack
from lowmem_grpo.grpo.update import Scoring, accumulate, score_reference
from lowmem_grpo.policy.load import nf4_config
from lowmem_grpo.policy.source import resolve
from lowmem_grpo.quiet import quiet_libraries
from tests.grpo.policies import make_off_policy, move_adapters, open_policy
from tests.grpo.rollouts import make_groups

pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")

SHAPE = [(11, [9, 1, 16, 5]), (4, [7, 7, 2, 12]), (17, [1, 3, 8, 10])]
LONGEST, RANK = 16, 4
CLIP = {"epsilon": 0.2, "epsilon_high": 0.25}
CASES = [(kind, beta) for kind in LOSS_TYPES for beta in (0.0, 0.04)]
PAD = 0  # the tiny model's end token, so that masks cannot come from token ids


@pytest.fixture(scope="module")
def table():
    rows = []
    yield rows
    if rows:
        print(f"\n{'model':<14}{'loss_type':<10}{'beta':>6}{'temp.':>7}", end="")
        print(f"{'clipped':>9}{'loss':>14}{'loss error':>12}{'gradient error':>16}")
        for model, kind, beta, temperature, clipped, loss, loss_error, gradient_error in rows:
            print(f"{model:<14}{kind:<10}{beta:>6}{temperature:>7}{clipped:>9}", end="")
            print(f"{loss:>14.7f}{loss_error:>12.1e}{gradient_error:>16.1e}")


def make_trainer(directory, policy, *, loss_type, beta, temperature, output):
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM
    from trl import GRPOConfig, GRPOTrainer

    with quiet_libraries():
        model = AutoModelForCausalLM.from_pretrained(
            directory,
            quantization_config=nf4_config(torch.float32),
            dtype=torch.float32,
            device_map={"": "cpu"},
            attn_implementation="eager",
        )
        trainer = GRPOTrainer(
            model=model,
            args=GRPOConfig(
                output_dir=str(output),
                report_to=[],
                use_cpu=True,
                bf16=False,
                gradient_checkpointing=False,
                per_device_train_batch_size=12,
                num_generations=4,
                max_completion_length=LONGEST,
                loss_type=loss_type,
                beta=beta,
                temperature=temperature,
                use_bias_correction_kl=False,
                **CLIP,
            ),
            reward_funcs=lambda completions, **fields: [0.0] * len(completions),
            train_dataset=datasets.Dataset.from_dict({"prompt": ["?"] * 12}),
            processing_class=policy.tokenizer,
            peft_config=LoraConfig(
                r=RANK,
                lora_alpha=2 * RANK,
                lora_dropout=0.0,
                target_modules="all-linear",
                task_type="CAUSAL_LM",
            ),
        )
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1  # what `train` would have set
    theirs = dict(trainer.model.named_parameters())
    for name, parameter in policy.adapter_parameters().items():
        assert theirs[name].dtype == torch.bfloat16
        theirs[name].data = parameter.detach().clone()
    return trainer


def padded(rows, *, left=False, value=0):
    width = max(map(len, rows))
    fill = [[value] * (width - len(row)) for row in rows]
    return torch.tensor([f + r if left else r + f for f, r in zip(fill, rows, strict=True)])


def trl_inputs(groups, beta):
    """The rollouts as padded rows: prompts on the left, completions on the right."""
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    prompts = [group.prompt_ids for group in groups for _ in group.rollouts]
    completions = [rollout.completion_ids for rollout in rollouts]
    inputs = {
        "prompt_ids": padded(prompts, left=True, value=PAD),
        "prompt_mask": padded([[1] * len(row) for row in prompts], left=True),
        "completion_ids": padded(completions, value=PAD),
        "completion_mask": padded([[1] * len(row) for row in completions]),
        "advantages": torch.tensor([a for group in groups for a in group.advantages]),
        "old_per_token_logps": padded([rollout.logprobs for rollout in rollouts]),
        "num_items_in_batch": torch.tensor(sum(map(len, completions))),
    }
    if beta:
        inputs["ref_per_token_logps"] = padded([rollout.ref_logprobs for rollout in rollouts])
    return inputs


def compare(policy, trainer, *, loss_type, beta, temperature):
    """(clipped tokens, loss, relative error of the loss, of the gradient)."""
    groups = make_groups(SHAPE, vocab=policy.head_weight_VD.shape[0])
    groups[0].rollouts[0].completion_ids[3:5] = [PAD, PAD]
    scoring = Scoring(temperature, (PAD,))
    make_off_policy(policy, groups, scoring)
    weights = rollout_weights([n for _, row in SHAPE for n in row], loss_type, LONGEST)
    if beta:
        score_reference(policy, pack(groups, weights, max_tokens=40), scoring, lambda tokens: None)
    batches = pack(groups, weights, max_tokens=40, skip_zero_advantage=beta == 0)
    assert len(batches) > 2
    stats = accumulate(policy, batches, scoring, beta=beta, checkpointing=True, **CLIP)

    loss = trainer.compute_loss(trainer.model, trl_inputs(groups, beta))
    loss.backward()
    theirs = dict(trainer.model.named_parameters())
    difference, size = 0.0, 0.0
    for name, parameter in policy.adapter_parameters().items():
        assert theirs[name].grad.dtype == torch.float32
        difference += (parameter.grad - theirs[name].grad).double().square().sum().item()
        size += theirs[name].grad.double().square().sum().item()
        parameter.grad = theirs[name].grad = None
    clipped = int(stats.sums["clip_low"] + stats.sums["clip_high"])
    loss_error = abs(stats.loss - loss.item()) / abs(loss.item())
    return clipped, loss.item(), loss_error, (difference / size) ** 0.5


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize(("loss_type", "beta"), CASES)
def test_tiny_model(policy, tiny_model_dir, table, tmp_path, loss_type, beta, temperature):
    case = {"loss_type": loss_type, "beta": beta, "temperature": temperature}
    trainer = make_trainer(tiny_model_dir, policy, output=tmp_path, **case)
    clipped, loss, loss_error, gradient_error = compare(policy, trainer, **case)
    table.append(("tiny", *case.values(), clipped, loss, loss_error, gradient_error))
    assert clipped > 5
    assert loss_error < 1e-5
    assert gradient_error < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_demo_model(demo_model, table, tmp_path, temperature):
    policy = open_policy(demo_model, tile_tokens=1024, tile_vocab=16384)
    # As far from the base as a short training run gets.
    move_adapters(policy, 0.01)
    first = {"loss_type": "grpo", "beta": 0.04, "temperature": temperature}
    trainer = make_trainer(resolve(demo_model), policy, output=tmp_path, **first)
    errors = []
    for loss_type, beta in CASES:
        # One trainer for all: these two are all that the constructor keeps of them.
        trainer.loss_type, trainer.beta = loss_type, beta
        case = {"loss_type": loss_type, "beta": beta, "temperature": temperature}
        clipped, loss, *found = compare(policy, trainer, **case)
        table.append((demo_model, *case.values(), clipped, loss, *found))
        errors += found
        assert clipped > 5
    # Twice the tiny model's limit: through 30 layers each side is up to 9e-6 away from the same
    # gradient in float64 (test_float64.py), and the two roundings add up.
    assert max(errors) < 2e-5
