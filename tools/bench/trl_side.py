"""TRL's side: its GRPOTrainer with the settings of a configuration of the product.

In its best CPU settings: bf16 compute where the CPU has it, no gradient checkpointing, one
micro-batch. Where TRL's default is another mathematics than the product's, it is set to the
product's. Its adapters stay bfloat16, to which TRL casts those of a 4-bit model.

Phases are measured around methods of the trainer (TRL 1.16): `_generate`, `_calculate_rewards`, the
scoring without gradients (`_get_per_token_logps_and_entropies`), and from the end of
`_prepare_inputs` to the end of the optimizer's step. What is left of a step is padding, metrics and
logging.
"""

from __future__ import annotations

import tempfile
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback, set_seed
from trl import GRPOConfig, GRPOTrainer

from lowmem_grpo.config import Config
from lowmem_grpo.hardware import choose_compute_dtype, detect
from lowmem_grpo.policy.load import nf4_config
from lowmem_grpo.policy.source import resolve
from lowmem_grpo.quiet import quiet_libraries
from lowmem_grpo.rewards import load_rewards, score
from lowmem_grpo.setup import open_task
from lowmem_grpo.tasks import Task

from .curve import reached
from .meter import Meter


def run(config: Config, until: float | None = None) -> dict[str, Any]:
    """Train as configured. `until`: stop once the running mean reward is this high.

    Returns the meter's records (`steps`) with the mean `reward`.
    """
    set_seed(config.run.seed)  # TRL wraps the model, and draws the adapters, before it seeds
    task, meter = open_task(config), Meter()
    source = resolve(config.model.name)
    requested = config.model.compute_dtype
    dtype = getattr(torch, choose_compute_dtype(detect("cpu"), requested).value)
    with tempfile.TemporaryDirectory() as scratch, quiet_libraries():
        model = AutoModelForCausalLM.from_pretrained(
            source, quantization_config=nf4_config(dtype), dtype=dtype, device_map={"": "cpu"}
        )
        meter.watch(model.base_model)
        trainer = _Timed(
            meter,
            model=model,
            processing_class=AutoTokenizer.from_pretrained(source),
            reward_funcs=_reward(config, task),
            train_dataset=_problems(config, task),
            peft_config=LoraConfig(
                r=config.lora.r,
                lora_alpha=config.lora.lora_alpha,
                lora_dropout=0.0,
                target_modules=config.lora.target_modules,
                task_type="CAUSAL_LM",
            ),
            callbacks=[_Watch(meter, until)],
            args=_settings(config, scratch, bf16=dtype == torch.bfloat16),
        )
        trainer.train()
    meter.stop()
    return {"steps": meter.steps, "startup_seconds": meter.startup_seconds}


def _problems(config: Config, task: Task) -> Dataset:
    """The problems of all steps in the product's order; `place` finds them again."""
    count = config.run.steps * config.rollout.problems_per_step
    rows = [{"prompt": list(task.train_problem(i).messages), "place": i} for i in range(count)]
    return Dataset.from_list(rows)


def _reward(config: Config, task: Task):
    """The product's rewards as one function of TRL's kind."""
    rewards = load_rewards(config.rewards.functions, config.rewards.weights, task)

    def reward(completions, completion_ids, place, **_) -> list[float]:
        texts = [messages[0]["content"] for messages in completions]
        problems = [task.train_problem(i) for i in place]
        return score(rewards, texts, problems, completion_ids).total

    return reward


def _settings(config: Config, scratch: str, *, bf16: bool) -> GRPOConfig:
    r, g, o = config.rollout, config.grpo, config.optimizer
    least = r.min_completion_length
    return GRPOConfig(
        output_dir=scratch,
        per_device_train_batch_size=r.problems_per_step * r.num_generations,
        gradient_accumulation_steps=1,
        steps_per_generation=1,
        num_iterations=g.num_iterations,
        num_generations=r.num_generations,
        max_completion_length=r.max_completion_length,
        generation_kwargs={"min_new_tokens": least} if least else None,
        temperature=r.temperature,
        beta=g.beta,
        epsilon=g.epsilon,
        loss_type=g.loss_type,
        use_bias_correction_kl=False,  # the k3 of the paper, as ours
        scale_rewards=g.scale_rewards,
        learning_rate=o.learning_rate,
        lr_scheduler_type=o.lr_scheduler_type,
        warmup_steps=o.warmup_steps,
        adam_beta1=o.adam_beta1,
        adam_beta2=o.adam_beta2,
        adam_epsilon=o.adam_epsilon,
        weight_decay=o.weight_decay,
        max_grad_norm=o.max_grad_norm,
        max_steps=config.run.steps,
        shuffle_dataset=False,
        use_cpu=True,
        bf16=bf16,
        gradient_checkpointing=False,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=config.run.seed,
    )


class _Timed(GRPOTrainer):
    """TRL's trainer that tells a meter of its phases."""

    def __init__(self, meter: Meter, **settings):
        self._meter = meter
        super().__init__(**settings)

    def _generate(self, *args, **kwargs):
        with self._meter.phase("rollout"):
            return super()._generate(*args, **kwargs)

    def _calculate_rewards(self, *args, **kwargs):
        with self._meter.phase("reward"):
            rewards = super()._calculate_rewards(*args, **kwargs)
        self._meter.note(reward=rewards.sum(dim=1).mean().item())  # of [rows, functions]
        return rewards

    def _get_per_token_logps_and_entropies(self, *args, **kwargs):
        if torch.is_grad_enabled():  # within the loss, where the update is running
            return super()._get_per_token_logps_and_entropies(*args, **kwargs)
        with self._meter.phase("reference"):
            return super()._get_per_token_logps_and_entropies(*args, **kwargs)

    def _prepare_inputs(self, *args, **kwargs):
        inputs = super()._prepare_inputs(*args, **kwargs)
        self._meter.begin("update")
        return inputs


class _Watch(TrainerCallback):
    def __init__(self, meter: Meter, until: float | None):
        self._meter, self._until = meter, until

    def on_train_begin(self, *_, **__):
        self._meter.start()

    def on_step_end(self, args, state, control, **_):
        # A step is counted from the end of the one before: sampling comes before TRL's own
        # "step begin".
        self._meter.end()
        self._meter.step()
        rewards = [step["reward"] for step in self._meter.steps]
        if self._until is not None and reached(rewards, self._until) is not None:
            control.should_training_stop = True
        return control
