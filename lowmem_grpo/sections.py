"""The sections of a run's configuration: what there is to set, with a sentence under each setting.

Names are TRL's where TRL has them. What no single value can be refused for is refused where it
lies: within a section here, across sections in config.py. What there is to set of
the loss is in section_grpo.py.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator

from lowmem_grpo.text_files import half_character

__all__ = [
    "EvalConfig", "LoraSection", "MemoryConfig", "ModelConfig", "OptimizerConfig",
    "RewardsConfig", "RolloutConfig", "RunConfig", "Section", "TaskConfig",
]  # fmt: skip

MOST, MOST_SEED = 2**31, 2**63 - 1
Positive = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Decay = Annotated[float, Field(ge=0.0, lt=1.0)]
Seed = Annotated[int, Field(ge=0)]  # numpy takes no other
Auto = Literal["auto"]
MAY_BE_BLANK = ("system_prompt", "step_separator")


class Section(BaseModel):
    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        use_attribute_docstrings=True,
        allow_inf_nan=False,
        strict=True,
    )

    @field_validator("*")
    @classmethod
    def _can_be_computed_with(cls, value: Any, info: ValidationInfo) -> Any:
        _check_value(value, info.field_name)
        return value


def _check_value(value: Any, name: str | None) -> None:
    most = MOST_SEED if name == "seed" else MOST
    if isinstance(value, (int, float)) and not -most <= value <= most:
        raise ValueError(f"Input should be at most {most:.3g}, on either side of 0")
    if isinstance(value, str):
        if half := half_character(value):
            raise ValueError(f"{half} is half of a character: give text in UTF-8")
        if "\0" in value:
            raise ValueError("Input should be without NUL characters")
        if not value.strip() and name not in MAY_BE_BLANK:
            raise ValueError("Input should not be blank: give a value, or leave the setting out")
    if isinstance(value, dict):  # of a chat template, where any text is right
        for key, item in value.items():
            _check_value(key, MAY_BE_BLANK[0])
            _check_value(item, MAY_BE_BLANK[0])
    if isinstance(value, list):
        for item in value:
            _check_value(item, name)


class ModelConfig(Section):
    name: str = "smollm2-135m"
    """Hub id, local directory, .gguf file, or smollm2-135m (the demo model)."""
    adapter: str | None = None
    """A directory with a LoRA adapter to start from, in PEFT's format. The reference is the base
    with that adapter, and the section lora is the adapter's.
    """
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    compute_dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """What matrix products and activations run in; auto follows the hardware."""
    attention: Literal["auto", "flash_attn", "torch_varlen", "sdpa", "tiled"] = "auto"
    """Backend of the shared-prefix attention; auto follows the hardware."""
    lm_head_bits: Literal[8, 16] = 16
    """Of the output head; 16 is the compute dtype. 8 is another model, in every role alike."""
    lm_head_kernels: Literal["torch", "triton"] = "torch"
    """What makes the passes over the head's tiles. triton has not been run on a card yet."""
    chat_template: str | None = None
    """A file with a chat template, for a model that has none; or a tokenizer_config.json with one.
    """
    chat_template_kwargs: dict[str, Any] = {}
    """What the chat template is given beside the messages, like {enable_thinking = false}."""


class LoraSection(Section):
    r: Positive = 16
    """Rank."""
    lora_alpha: Annotated[int | float, Field(gt=0)] = 32
    """The adapter's product is scaled by lora_alpha / r."""
    use_rslora: bool = False
    """Scale by lora_alpha over the square root of r instead (rank-stabilised LoRA)."""
    target_modules: str | list[str] = "all-linear"
    """all-linear, the names of the layers to adapt, or a pattern that their whole names match."""
    target_parameters: list[str] = []
    """Names of parameters to adapt that are no layer's weight, like mlp.experts.gate_up_proj."""
    rank_pattern: dict[str, Positive] = {}
    """Another r for the layers that a key matches, like {q_proj = 8}."""
    alpha_pattern: dict[str, Annotated[int | float, Field(gt=0)]] = {}
    """Another lora_alpha for the layers that a key matches."""
    init_lora_weights: Literal["default", "gaussian"] = "default"
    """How A starts (B is zero): Kaiming uniform or Gaussian."""

    @model_validator(mode="before")
    @classmethod
    def _base_stays(cls, data: Any) -> Any:
        init = str(data.get("init_lora_weights", "")).lower() if isinstance(data, dict) else ""
        if init.startswith(("pissa", "olora", "loftq", "corda", "eva", "lora_ga")):
            raise ValueError(
                f"init_lora_weights = {init} changes the base weights, and the base is the "
                "reference: use default or gaussian"
            )
        return data


class TaskConfig(Section):
    name: str = "arithmetic"
    """arithmetic[:options], countdown[:options], gsm8k, reasoning_gym:NAME, records:PATH,
    records:hub:OWNER/NAME[@CONFIG][/SPLIT], or several: WEIGHT*TASK + TASK.
    """
    seed: Seed = 0
    """Order of the problems, and which ones a generator makes."""
    shuffle: bool = True
    """Records in a new order in each epoch; false: in the order of the file."""
    system_prompt: str | None = None
    """Put before every problem; empty: a system message that says nothing, where a chat template
    has one of its own.
    """
    few_shot: Annotated[int, Field(ge=0, le=256)] = 0
    """Solved training problems before every question, as turns of the chat."""
    path: str | None = None
    """The file of gsm8k, instead of the Hub's; or of records without a PATH."""
    prompt_column: str = "prompt"
    """Column of a record that holds its prompt; a nested one as OUTER.INNER."""
    answer_column: str = "answer"
    """Column of a record that holds its answer, or a list of accepted ones; a nested one as
    OUTER.INNER, like reward_model.ground_truth.
    """
    eval_fraction: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.1
    """Share of the records that is held out for evaluation."""
    eval_path: str | None = None
    """A file or hub:... of its own for evaluation, instead of a held-out share."""
    filter_overlong_prompts: bool = False
    """Leave out problems whose prompt is longer than rollout.max_prompt_length: they are counted,
    and no error.
    """


class RewardsConfig(Section):
    functions: list[str] = []
    """number, choice, math, task, format:REGEX, json[:SCHEMA.json], code[:column=tests,...],
    overlong:max=L,cache=C, cosine:max=L, repetition:ngram=N, judge:FILE.toml,
    model:NAME[,max=TOKENS,batch=TOKENS,label=NAME,template=FILE] or FILE.py:function; empty means
    the task's own.
    """
    weights: list[float] | None = None
    """One factor for each function; all 1 when left out."""
    on_error: Literal["zero", "drop", "stop"] = "zero"
    """A completion whose reward fails scores 0 with it, leaves its group, or stops the run."""
    check_first_step: bool = True
    """Stop where a function has no value for any completion of the first step, in each process."""
    step_separator: Annotated[str, Field(min_length=1)] | None = None
    """Text that ends a step of a completion; a function may then give a value for each step."""
    timeout: Annotated[float, Field(gt=0.0)] = 60.0
    """Seconds that a function of yours may take for the completions of a step."""
    memory_gib: Annotated[float, Field(gt=0.0)] = 4.0
    """Address space of its process."""
    network: bool = False
    """Whether its process has one."""
    writable: list[str] = []
    """Directories that it may write to, besides one of its own for temporary files."""


class RolloutConfig(Section):
    num_generations: Annotated[int, Field(ge=2)] = 8
    """G, completions of each problem."""
    problems_per_step: Positive = 4
    """B, problems of each step."""
    dynamic_sampling: Annotated[int, Field(ge=0, le=256)] = 0
    """Rounds in which groups without a signal are replaced by those of other problems."""
    pool: str | None = None
    """A directory that the command rollouts has filled: its groups are trained on."""
    curriculum: Annotated[int, Field(ge=1, le=256)] = 1
    """Problems looked at for each one taken: of several, those passed nearest to half the time."""
    curriculum_field: str | None = None
    """A field of the problems that says their level, whose pass rate stands for new ones'."""
    max_prompt_length: Positive = 512
    """Longest prompt in tokens; a longer one is an error, or left out as the task is set to."""
    min_completion_length: Annotated[int, Field(ge=0)] = 0
    """No end before that many tokens."""
    max_completion_length: Positive = 256
    """Longest completion in tokens."""
    temperature: Annotated[float, Field(gt=0.0)] = 1.0
    """Of the sampler, and of the log-probs that the trainer takes."""
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """Nucleus sampling; must be 1 for training."""
    top_k: Annotated[int, Field(ge=0)] = 0
    """Sample from the k most likely tokens; must be 0 (off) for training."""
    min_p: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Drop tokens below that fraction of the likeliest; must be 0 for training."""
    skip_special_tokens: bool | Auto = "auto"
    """Special tokens that texts of completions lack: auto, those that end or frame turns (others,
    like <answer>, stay for rewards to look for); true, all; false, none.
    """
    include_prefill: bool = True
    """Texts of completions begin as the prompt begins the assistant's turn, like with <think>."""


class OptimizerConfig(Section):
    optim: Literal["adamw_torch", "adamw_8bit", "paged_adamw_8bit"] = "adamw_torch"
    """float32 moments, 8-bit moments, or 8-bit moments paged to the host."""
    learning_rate: Annotated[float, Field(gt=0.0)] = 2e-5
    """Peak learning rate."""
    lr_scheduler_type: Literal["constant", "linear", "cosine"] = "constant"
    """After the warm-up."""
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    """Steps of linear warm-up."""
    adam_beta1: Decay = 0.9
    """Decay of the first moment."""
    adam_beta2: Decay = 0.999
    """Decay of the second moment."""
    adam_epsilon: Annotated[float, Field(ge=1e-30)] = 1e-8
    """Added to the root of the second moment."""
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.0
    """Decoupled weight decay."""
    max_grad_norm: Annotated[float, Field(ge=0.0)] = 1.0
    """Gradients are scaled down to this norm; 0 leaves them."""


class MemoryConfig(Section):
    """`auto` leaves a setting to the memory plan, which says what it chose and why."""

    micro_batch_tokens: Positive | Auto = "auto"
    """Most trunk tokens in one forward and backward pass."""
    gradient_checkpointing: bool | Auto = "auto"
    """Keep each layer's input only and compute the layer again in backward."""
    activation_offloading: bool | Auto = "auto"
    """Keep the layers' inputs in pinned host memory; needs gradient_checkpointing."""
    offload_overlap: bool | Auto = "auto"
    """Copy them beside the layers' kernels: one layer's input more on the card."""
    mlp_tile_tokens: Annotated[int, Field(ge=0)] | Auto = "auto"
    """Tokens that an MLP computes at a time, forward and backward; 0: all of them."""
    logits_tile_tokens: Positive | Auto = "auto"
    """Rows of one tile of the LM head."""
    logits_tile_vocab: Positive | Auto = "auto"
    """Columns of one tile of the LM head."""
    rollout_batch_size: Positive | Auto = "auto"
    """Completions decoded at once."""
    kv_cache_bits: Literal[8, 16] | Auto = "auto"
    """Of the sampler's keys and values; 16 is the compute dtype. 8 samples from a rounded cache."""
    embedding_on_host: bool | Auto = "auto"
    """Keep the input embedding in host memory; not for models whose head is the same weight."""

    @model_validator(mode="after")
    def _something_to_offload(self) -> MemoryConfig:
        if self.activation_offloading is True and self.gradient_checkpointing is False:
            raise ValueError(
                "memory.activation_offloading = true moves what checkpointing keeps: use "
                "memory.gradient_checkpointing = true with it"
            )
        return self


class EvalConfig(Section):
    num_problems: Positive = 100
    """Held-out problems of an evaluation; all there are, if fewer."""
    every: Annotated[int, Field(ge=0)] = 0
    """Evaluate every so many steps during training; 0: never."""
    metric_for_best: Literal["strict_accuracy", "lenient_accuracy"] | None = None
    """Keep the adapter of the evaluation during training that is best by it, in OUTPUT/best."""
    max_completion_length: Positive | None = None
    """Longest completion of an evaluation; rollout.max_completion_length when left out."""
    num_generations: Positive = 1
    """Completions of each problem, for pass@k; above 1 with a temperature above 0."""
    temperature: Annotated[float, Field(ge=0.0)] = 0.0
    """0 takes the likeliest token each time."""
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """Nucleus sampling."""
    top_k: Annotated[int, Field(ge=0)] = 0
    """Sample from the k most likely tokens; 0: from all."""
    min_p: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Drop tokens below that fraction of the likeliest."""
    batch_size: Positive | Auto = "auto"
    """Completions decoded at once; auto leaves it to the memory plan."""

    def is_due_after(self, step: int, last: int) -> bool:
        """Whether there is an evaluation after that step of a run of `last` steps."""
        return bool(self.every) and (step % self.every == 0 or step == last)

    @model_validator(mode="after")
    def _something_to_compare(self) -> EvalConfig:
        if self.metric_for_best and not self.every:
            raise ValueError(
                f"eval.metric_for_best = {self.metric_for_best} compares evaluations during "
                "training: say how often with --eval-every N"
            )
        return self

    @model_validator(mode="after")
    def _not_the_same_again(self) -> EvalConfig:
        if self.num_generations > 1 and self.temperature == 0:
            raise ValueError(
                f"eval.num_generations = {self.num_generations} greedy completions of a problem "
                "are all the same: use eval.temperature = 1, or one"
            )
        return self


class RunConfig(Section):
    seed: Seed = 0
    """Of the adapters' initialisation and of sampling."""
    steps: Positive = 100
    """Optimizer steps."""
    output: str = "runs/grpo"
    """The run directory."""
    save_every: Annotated[int, Field(ge=0)] = 50
    """Steps between checkpoints that stay; 0: none do but the newest."""
    keep_last: Positive = 2
    """Of those, how many; besides them the two newest of any step."""
    resume_every: Positive = 1
    """Optimizer steps after which a run is saved, so that one that is killed repeats no more."""
    max_discarded: Annotated[int, Field(ge=0)] = 3
    """Batches in a row that may come to nothing, because a number is NaN or infinite."""
    check_every: Annotated[int, Field(ge=0)] = 25
    """Steps between checks that base and reference are what was loaded; 0: at the end alone."""
    log_rollouts: Annotated[int, Field(ge=0)] = 8
    """Rollouts of each step that are written to rollouts.jsonl."""
    tensorboard: bool = False
    """Write TensorBoard events to OUTPUT/tensorboard."""

    def is_saved_after(self, step: int) -> bool:
        """Whether adapters and moments are written after that step."""
        lasting = bool(self.save_every) and step % self.save_every == 0
        return lasting or step % self.resume_every == 0
