"""The whole run as one validated object: defaults < profile < run file < flags.

Every section is a pydantic model with a sentence under each field. Values are merged as plain
nested dicts, each remembering where it came from, and validated once, so an unknown key or a wrong
value is named together with its origin. Names are TRL's where TRL has them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import tomlkit
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from tomlkit.exceptions import TOMLKitError

from lowmem_grpo.errors import ConfigError, nearest

__all__ = ["Config", "build_config", "config_toml", "load_config", "parse_assignment", "read_toml"]

Positive = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Auto = Literal["auto"]


class _Section(BaseModel):
    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        use_attribute_docstrings=True,
        allow_inf_nan=False,
        strict=False,
    )


class ModelConfig(_Section):
    name: str = "smollm2-135m"
    """Hub id, local directory, .gguf file, or smollm2-135m (the demo model)."""
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
    """A file with a chat template, for a model that has none."""


class LoraSection(_Section):
    r: Positive = 16
    """Rank."""
    lora_alpha: Positive = 32
    """The adapter's product is scaled by lora_alpha / r."""
    target_modules: str | list[str] = "all-linear"
    """all-linear, or the names of the linear layers to adapt."""
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


class TaskConfig(_Section):
    name: str = "arithmetic"
    """arithmetic[:options], reasoning_gym:NAME, or records:PATH."""
    seed: int = 0
    """Order of the problems, and which ones a generator makes."""
    system_prompt: str | None = None
    """Put before every problem."""
    prompt_column: str = "prompt"
    """Column of a record that holds its prompt."""
    answer_column: str = "answer"
    """Column of a record that holds its answer."""
    eval_fraction: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.1
    """Share of the records that is held out for evaluation."""
    eval_path: str | None = None
    """A file of its own for evaluation, instead of a held-out share."""


class RewardsConfig(_Section):
    functions: list[str] = []
    """number, math, task, format:REGEX or FILE.py:function; empty means the task's own."""
    weights: list[float] | None = None
    """One factor for each function; all 1 when left out."""


class RolloutConfig(_Section):
    num_generations: Annotated[int, Field(ge=2)] = 8
    """G, completions of each problem."""
    problems_per_step: Positive = 4
    """B, problems of each step."""
    max_prompt_length: Positive = 512
    """Longest prompt in tokens; a longer one is an error."""
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


class GrpoConfig(_Section):
    beta: Annotated[float, Field(ge=0.0)] = 0.04
    """Weight of the KL penalty towards the reference; 0 skips the reference's forward pass."""
    epsilon: Fraction = 0.2
    """Lower clip of the ratio: 1 - epsilon."""
    epsilon_high: Annotated[float, Field(ge=0.0)] | None = None
    """Upper clip of the ratio: 1 + epsilon_high; epsilon when left out."""
    loss_type: Literal["grpo", "dapo", "dr_grpo"] = "grpo"
    """How tokens are averaged."""
    num_iterations: Positive = 1
    """Optimizer steps on each batch of groups."""
    scale_rewards: Literal["group", "none"] = "group"
    """Divide advantages by the group's standard deviation, or not."""

    @property
    def upper_epsilon(self) -> float:
        """`epsilon_high`, or `epsilon` where that is not set."""
        return self.epsilon if self.epsilon_high is None else self.epsilon_high


class OptimizerConfig(_Section):
    optim: Literal["adamw_torch", "adamw_8bit", "paged_adamw_8bit"] = "adamw_torch"
    """float32 moments, 8-bit moments, or 8-bit moments paged to the host."""
    learning_rate: Annotated[float, Field(gt=0.0)] = 2e-5
    """Peak learning rate."""
    lr_scheduler_type: Literal["constant", "linear", "cosine"] = "constant"
    """After the warm-up."""
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    """Steps of linear warm-up."""
    adam_beta1: Fraction = 0.9
    """Decay of the first moment."""
    adam_beta2: Fraction = 0.999
    """Decay of the second moment."""
    adam_epsilon: Annotated[float, Field(gt=0.0)] = 1e-8
    """Added to the root of the second moment."""
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.0
    """Decoupled weight decay."""
    max_grad_norm: Annotated[float, Field(ge=0.0)] = 1.0
    """Gradients are scaled down to this norm; 0 leaves them."""


class MemoryConfig(_Section):
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


class EvalConfig(_Section):
    num_problems: Positive = 100
    """Held-out problems of an evaluation; all there are, if fewer."""
    every: Annotated[int, Field(ge=0)] = 0
    """Evaluate every so many steps during training; 0: never."""
    max_completion_length: Positive | None = None
    """Longest completion of an evaluation; rollout.max_completion_length when left out."""
    batch_size: Positive | Auto = "auto"
    """Completions decoded at once; auto leaves it to the memory plan."""


class RunConfig(_Section):
    seed: int = 0
    """Of the adapters' initialisation and of sampling."""
    steps: Positive = 100
    """Optimizer steps."""
    output: str = "runs/grpo"
    """The run directory."""
    save_every: Annotated[int, Field(ge=0)] = 50
    """Steps between checkpoints; 0: only at the end or when stopped."""
    keep_last: Positive = 2
    """Checkpoints that are kept."""
    log_rollouts: Annotated[int, Field(ge=0)] = 8
    """Rollouts of each step that are written to rollouts.jsonl."""
    tensorboard: bool = False
    """Write TensorBoard events to OUTPUT/tensorboard."""


class Config(_Section):
    """A run. `sources` maps "section.key" to where its value came from."""

    model: ModelConfig = ModelConfig()
    lora: LoraSection = LoraSection()
    task: TaskConfig = TaskConfig()
    rewards: RewardsConfig = RewardsConfig()
    rollout: RolloutConfig = RolloutConfig()
    grpo: GrpoConfig = GrpoConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    memory: MemoryConfig = MemoryConfig()
    eval: EvalConfig = EvalConfig()
    run: RunConfig = RunConfig()
    sources: dict[str, str] = Field(default_factory=dict, exclude=True)

    @model_validator(mode="after")
    def _consistent(self) -> Config:
        r = self.rollout
        if r.min_completion_length > r.max_completion_length:
            raise ValueError(
                f"rollout.min_completion_length = {r.min_completion_length} is above "
                f"rollout.max_completion_length = {r.max_completion_length}"
            )
        if self.optimizer.warmup_steps >= self.run.steps:
            raise ValueError(
                f"optimizer.warmup_steps = {self.optimizer.warmup_steps} leaves nothing of "
                f"run.steps = {self.run.steps}"
            )
        weights = self.rewards.weights
        if (
            weights is not None
            and self.rewards.functions
            and len(weights) != len(self.rewards.functions)
        ):
            raise ValueError(
                f"rewards.weights has {len(weights)} values for "
                f"{len(self.rewards.functions)} rewards.functions"
            )
        return self

    def settled(self, values: dict[str, Any], origin: str) -> Config:
        """The same run with other values ("section.key": value), which came from `origin`."""
        sections: dict[str, dict[str, Any]] = {}
        for name, value in values.items():
            section, key = name.split(".")
            sections.setdefault(section, {})[key] = value
        changed = {s: getattr(self, s).model_copy(update=v) for s, v in sections.items()}
        sources = {**self.sources, **dict.fromkeys(values, origin)}
        return self.model_copy(update={**changed, "sources": sources})

    @property
    def chosen(self) -> list[str]:
        """The settings that the memory plan chose; their sources say why."""
        return [key for key, source in self.sources.items() if source.startswith("plan: ")]

    def check_trainable(self) -> None:
        """Refuse what can be sampled but not trained on. Raises ConfigError."""
        for key, neutral in (("top_p", 1.0), ("top_k", 0), ("min_p", 0.0)):
            value = getattr(self.rollout, key)
            if value != neutral:
                # The trainer scores the whole distribution: with tokens cut off, its log-probs
                # would be those of another one than was sampled, and every ratio would start away
                # from 1.
                raise ConfigError(
                    f"rollout.{key} = {value} samples from another distribution than the trainer "
                    f"scores: use rollout.{key} = {neutral} for training (temperature is free)"
                )


def build_config(layers: list[tuple[str, dict[str, dict[str, Any]]]]) -> Config:
    """Merge (origin, {section: {key: value}}) layers, later ones first in rank, and validate.
    Raises ConfigError.
    """
    values: dict[str, dict[str, Any]] = {}
    sources: dict[str, str] = {}
    for origin, sections in layers:
        for section, entries in sections.items():
            _known(section, _section_names(), origin, "section")
            if not isinstance(entries, dict):
                raise ConfigError(
                    f"{origin}: '{section}' must be a section ([{section}]) with keys"
                )
            fields = Config.model_fields[section].annotation.model_fields
            for key, value in entries.items():
                _known(f"{section}.{key}", [f"{section}.{k}" for k in fields], origin, "key")
                values.setdefault(section, {})[key] = value
                sources[f"{section}.{key}"] = origin
    try:
        return Config.model_validate({**values, "sources": sources})
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"] if not isinstance(part, int))
        where = ".".join(where.split(".")[:2])
        message = first["msg"].removeprefix("Value error, ")
        origin = f" (from {sources[where]})" if where in sources else ""
        given = f" = {first['input']!r}" if where.count(".") == 1 else ""
        raise ConfigError(f"{where}{given}{origin}: {message}" if given else message) from error


def load_config(
    run_file: str | None, *, profile: tuple[str, dict] | None, assignments: list[tuple[str, dict]]
) -> Config:
    """Defaults < `profile` (origin, sections) < `run_file` < `assignments` ((origin, sections), in
    order).
    """
    layers = [profile] if profile else []
    if run_file is not None:
        layers.append((run_file, read_toml(run_file)))
    return build_config([*layers, *assignments])


def read_toml(path: str) -> dict[str, Any]:
    """A TOML file as plain dicts. Raises ConfigError with the line that is wrong."""
    try:
        return tomlkit.parse(Path(path).read_text(encoding="utf-8")).unwrap()
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    except (TOMLKitError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid TOML: {error}") from error


def parse_assignment(text: str) -> dict[str, dict[str, Any]]:
    """`section.key=value` -> {section: {key: value}}; a value that is not TOML is taken as a
    string.
    """
    name, equals, raw = text.partition("=")
    section, dot, key = name.strip().partition(".")
    if not (equals and dot and section and key):
        raise ConfigError(f"--set {text}: expected section.key=value, such as grpo.beta=0.04")
    try:
        value = tomlkit.parse(f"value = {raw.strip()}").unwrap()["value"]
    except TOMLKitError:
        value = raw.strip()
    return {section: {key: value}}


def config_toml(config: Config) -> str:
    """Every value in force as TOML, its origin as a comment; unset values stand as comments."""
    document = tomlkit.document()
    for section in _section_names():
        table = tomlkit.table()
        for key, value in getattr(config, section).model_dump(mode="json").items():
            origin = config.sources.get(f"{section}.{key}", "default")
            if value is None:
                table.add(tomlkit.comment(f"{key} is not set"))
                continue
            item = tomlkit.item(value)
            item.comment(origin)
            table.add(key, item)
        document.add(section, table)
    return tomlkit.dumps(document)


def _section_names() -> list[str]:
    return [name for name in Config.model_fields if name != "sources"]


def _known(name: str, known: list[str], origin: str, kind: str) -> None:
    if name not in known:
        raise ConfigError(f"{origin}: unknown {kind} '{name}'{nearest(name, known)}")
