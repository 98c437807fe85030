"""From a configuration to the things it names: the machine's choices, the policy, the task, the
rewards.
"""

from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from lowmem_grpo.config import Config
from lowmem_grpo.errors import TaskError, nearest
from lowmem_grpo.grpo.objective import Objective
from lowmem_grpo.grpo.optimizer import build_optimizer, learning_rate_at
from lowmem_grpo.hardware import Choice, Machine, choose_attention, choose_compute_dtype, detect
from lowmem_grpo.isolation.confine import Limits
from lowmem_grpo.isolation.output import Output
from lowmem_grpo.policy.base import AdapterSettings, Policy
from lowmem_grpo.policy.load import load_policy, load_tokenizer
from lowmem_grpo.policy.skeleton import read_model_config
from lowmem_grpo.rewards import Reward, is_model, load_rewards
from lowmem_grpo.rewards.model import ModelReward, ModelSpec, parse_spec
from lowmem_grpo.rollout.groups import prompt_ids, prompt_length
from lowmem_grpo.rollout.prompts import turn_added
from lowmem_grpo.rollout.sampling import Sampling
from lowmem_grpo.rollout.text import Texts
from lowmem_grpo.run.checkpoint import read_adapter
from lowmem_grpo.tasks import Task, TaskOptions, load_task
from lowmem_grpo.tasks.base import held_out

__all__ = [
    "adapter_settings",
    "check_prompts",
    "choose",
    "evaluation_settings",
    "learning_rate_of",
    "left_out",
    "load_models",
    "open_models",
    "open_optimizer",
    "open_policy",
    "open_rewards",
    "open_task",
    "reward_models",
    "rollout_role",
    "sampling_of",
    "texts_of",
    "update_settings",
    "window_of",
]


CHECKED = 200_000  # prompts
LOOKED_AT = 64  # problems, for a field


def choose(config: Config, head_dim: int | None = None) -> tuple[Machine, dict[str, Choice]]:
    """The machine, and the compute dtype and attention backend for it, each with its reason.
    `head_dim` of the model may rule out flash attention, where it is known.
    """
    machine = detect(config.model.device)
    dtype = choose_compute_dtype(machine, config.model.compute_dtype)
    attention = choose_attention(machine, dtype.value, config.model.attention, head_dim=head_dim)
    return machine, {"compute_dtype": dtype, "attention": attention}


def open_policy(config: Config, say=lambda text: None, adapter: Path | None = None) -> Policy:
    """Load the policy as configured, with fresh adapters or those of a directory in PEFT's format.

    `say` is told what was chosen and why.
    """
    head_dim = getattr(read_model_config(config.model.name), "head_dim", None)
    machine, choices = choose(config, head_dim)
    say(f"device {machine.device}: {machine.name}")
    for name, choice in choices.items():
        say(f"{name.replace('_', ' ')} {choice.value}: {choice.reason}")
    policy = load_policy(
        config.model.name,
        device=machine.device,
        dtype=getattr(torch, choices["compute_dtype"].value),
        attention=choices["attention"].value,
        adapters=adapter_settings(config),
        seed=config.run.seed,
        tile_tokens=config.memory.logits_tile_tokens,
        tile_vocab=config.memory.logits_tile_vocab,
        chat_template=config.model.chat_template,
        mlp_tile=config.memory.mlp_tile_tokens,
        cache_bits=config.memory.kv_cache_bits,
        embedding_on_host=config.memory.embedding_on_host,
        lm_head_bits=config.model.lm_head_bits,
        lm_head_kernels=config.model.lm_head_kernels,
        window=window_of(config),
    )
    for line in policy.said:
        say(line)
    if adapter is not None:
        policy.load_adapter_state(read_adapter(adapter))
        say(f"adapter {adapter}")
    return policy


def adapter_settings(config: Config) -> AdapterSettings:
    """The adapters as configured."""
    lora = config.lora
    targets, init = lora.target_modules, lora.init_lora_weights
    return AdapterSettings(
        r=lora.r,
        lora_alpha=lora.lora_alpha,
        target_modules=targets if isinstance(targets, str) else tuple(targets),
        init_lora_weights=True if init == "default" else init,
        target_parameters=tuple(lora.target_parameters),
        rank_pattern=lora.rank_pattern,
        alpha_pattern=lora.alpha_pattern,
        use_rslora=lora.use_rslora,
    )


def window_of(config: Config) -> int:
    """The most tokens that a prompt and its completion have together, in training or evaluation."""
    r = config.rollout
    return r.max_prompt_length + max(
        r.max_completion_length, config.eval.max_completion_length or 0
    )


def open_optimizer(config: Config, parameters: list):
    """The optimizer over `parameters` as configured."""
    o = config.optimizer
    return build_optimizer(
        parameters,
        optim=o.optim,
        learning_rate=o.learning_rate,
        betas=(o.adam_beta1, o.adam_beta2),
        eps=o.adam_epsilon,
        weight_decay=o.weight_decay,
    )


def learning_rate_of(config: Config, step: int) -> float:
    """Of a step, from 1 on."""
    o = config.optimizer
    return learning_rate_at(
        step,
        base=o.learning_rate,
        schedule=o.lr_scheduler_type,
        warmup_steps=o.warmup_steps,
        total_steps=config.run.steps,
    )


def update_settings(config: Config) -> dict[str, Any]:
    """What `grpo.update.accumulate` takes of the configuration."""
    grpo = config.grpo
    names = {field.name for field in fields(Objective)} - {"epsilon_high", "beta"}
    own = {name: getattr(grpo, name) for name in names}
    return {
        "objective": Objective(epsilon_high=grpo.upper_epsilon, beta=grpo.loss_beta, **own),
        "checkpointing": config.memory.gradient_checkpointing,
        "offloading": config.memory.activation_offloading,
        "overlapping": config.memory.offload_overlap,
    }


def open_task(config: Config) -> Task:
    """The task as configured, without problems whose prompts are too long where that is set. Raises
    TaskError; where prompts are looked at, ModelError.
    """
    task = config.task
    options = TaskOptions(
        system_prompt=task.system_prompt,
        few_shot=task.few_shot,
        path=task.path,
        prompt_column=task.prompt_column,
        answer_column=task.answer_column,
        eval_fraction=task.eval_fraction,
        eval_path=task.eval_path,
        shuffle=task.shuffle,
    )
    opened = load_task(task.name, seed=task.seed, options=options)
    if not task.filter_overlong_prompts:
        return opened
    tokenizer = load_tokenizer(config.model.name, config.model.chat_template)
    longest, template = config.rollout.max_prompt_length, config.model.chat_template_kwargs
    return opened.leaving_out(lambda each: prompt_length(tokenizer, each, template) <= longest)


def left_out(task: Task, config: Config) -> list[str]:
    """What there is to say of problems that are left out, one line or none."""
    if not (counts := task.left_out()):
        return []
    longest = config.rollout.max_prompt_length
    return [f"left out for prompts of more than {longest} tokens: {counts} ({task.name})"]


def rollout_role(policy: Policy, config: Config):
    """The role of the policy in which groups are sampled, a context manager."""
    return policy.as_reference() if config.grpo.old_policy == "base" else policy.as_sampler()


def sampling_of(config: Config, phase: str) -> Sampling:
    """How completions are drawn, in the "rollout" or in an "evaluation"."""
    r, e = config.rollout, config.eval
    if phase == "rollout":
        names = {field.name for field in fields(Sampling)} - {"entropies"}
        return Sampling(
            **{name: getattr(r, name) for name in names}, entropies=config.grpo.masks_by_entropy
        )
    return Sampling(
        temperature=e.temperature,
        top_p=e.top_p,
        top_k=e.top_k,
        min_p=e.min_p,
        max_completion_length=e.max_completion_length or r.max_completion_length,
    )


def evaluation_settings(config: Config) -> dict[str, Any]:
    """What `run.evaluate.evaluate` takes of the configuration."""
    e = config.eval
    return {
        "num_problems": e.num_problems,
        "num_generations": e.num_generations,
        "sampling": sampling_of(config, "evaluation"),
        "seed": config.run.seed,
        "max_prompt_length": config.rollout.max_prompt_length,
        "chat_template_kwargs": config.model.chat_template_kwargs,
        "batch_size": e.batch_size,
    }


def texts_of(config: Config, tokenizer) -> Texts:
    """How the tokens of completions become text."""
    r, template = config.rollout, config.model.chat_template_kwargs
    return Texts(tokenizer, r.skip_special_tokens, r.include_prefill, template)


def check_prompts(
    task: Task,
    config: Config,
    say: Callable[[str], None] = lambda text: None,
    training: int | None = None,
) -> None:
    """Meet every prompt that is longer than allowed before anything is loaded, and not in the
    middle of the run; of a run of years, the first ones. `training`: so many training problems, and
    no evaluation; of a whole run when left out. `say` is told what is left out. Raises TaskError,
    also where nothing is held out to evaluate on, and ModelError.
    """
    tokenizer = load_tokenizer(config.model.name, config.model.chat_template)
    longest, template = config.rollout.max_prompt_length, config.model.chat_template_kwargs
    r, batches = config.rollout, -(-config.run.steps // config.grpo.num_iterations)
    most = batches * r.problems_per_step * (1 + r.dynamic_sampling) * r.curriculum
    most = most if training is None else training
    _check_level(task, config)
    first = task.train_problem(0)
    if added := turn_added(tokenizer, list(first.messages), template, first.id):
        say(
            "the chat template does not begin the assistant's turn: every prompt ends with "
            f"{added!r:.60}, as it has before messages of the assistant (model.chat_template)"
        )
    for index in range(min(most, CHECKED) if r.pool is None else 0):
        prompt_ids(tokenizer, task.train_problem(index), longest, template)
    if config.eval.every and training is None:
        for problem in held_out(task, config.eval.num_problems):
            prompt_ids(tokenizer, problem, longest, template)
    for line in left_out(task, config):
        say(line)


def _check_level(task: Task, config: Config) -> None:
    """Raises TaskError where no problem has the field that rates are kept by."""
    r = config.rollout
    if r.curriculum_field is None or r.curriculum == 1:
        return
    names: set[str] = set()
    for index in range(LOOKED_AT):
        names.update(task.train_problem(index).fields)
        if r.curriculum_field in names:
            return
    raise TaskError(
        f"rollout.curriculum_field = {r.curriculum_field}: no problem of {task.name} has it"
        f"{nearest(r.curriculum_field, names)}; they have: {', '.join(sorted(names)) or 'none'}"
    )


def open_rewards(
    config: Config,
    task: Task,
    output: Output | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> list[Reward]:
    """The rewards as configured. `output` takes what a user's functions print. Where none is named,
    `say` is told which one the answers get. Raises ConfigError as `load_rewards` does.
    """
    r = config.rewards
    about = "" if r.functions else task.about_answers()
    if about and task.default_rewards:
        say(about)
    limits = Limits(
        memory_bytes=int(r.memory_gib * 2**30), network=r.network, writable=tuple(r.writable)
    )
    return load_rewards(
        r.functions,
        r.weights,
        task,
        timeout=r.timeout,
        limits=limits,
        with_steps=r.step_separator is not None,
        conversation=_conversation(config),
        output=output,
    )


def reward_models(config: Config) -> list[ModelSpec]:
    """The reward models as configured, of which nothing is read yet. Raises ConfigError."""
    specs = filter(is_model, config.rewards.functions)
    return [parse_spec(spec, _conversation(config)) for spec in specs]


def open_models(
    config: Config, rewards: list[Reward], say=lambda text: None, adapter: Path | None = None
) -> Policy:
    """Load the reward models, which leave the device as it was, and the policy as configured, with
    fresh adapters or those of a directory. Where the reference is not the base alone, it is the
    policy as it is now.
    """
    load_models([reward.function for reward in rewards if reward.here], config, say)
    policy = open_policy(config, say, adapter)
    if config.keeps_reference:
        policy.keep_reference()
    return policy


def load_models(models: list[ModelReward], config: Config, say=lambda text: None) -> None:
    """Load reward models for the policy's device, in its compute dtype. Raises ModelError."""
    for model in models:
        machine, choices = choose(config)
        model.load(machine.device, getattr(torch, choices["compute_dtype"].value))
        say(f"reward model {model.spec.name}: in 4 bits, {choices['compute_dtype'].value}")


def _conversation(config: Config) -> int:
    return config.rollout.max_prompt_length + config.rollout.max_completion_length
