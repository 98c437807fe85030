"""The whole run as one validated object: defaults < profile < run file < flags.

Sections are pydantic models (sections.py). Values are merged as plain nested dicts, each
remembering where it came from, and validated once, so an unknown key or a wrong value is named
together with its origin.
"""

from __future__ import annotations

import hashlib
from typing import Any

import tomlkit
from pydantic import Field, ValidationError, model_validator
from tomlkit.exceptions import TOMLKitError

from lowmem_grpo.errors import ConfigError, DamageError, nearest
from lowmem_grpo.section_grpo import GrpoConfig
from lowmem_grpo.sections import (
    EvalConfig,
    LoraSection,
    MemoryConfig,
    ModelConfig,
    OptimizerConfig,
    RewardsConfig,
    RolloutConfig,
    RunConfig,
    Section,
    TaskConfig,
)
from lowmem_grpo.text_files import read_text

__all__ = ["Config", "build_config", "config_toml", "load_config", "parse_assignment", "read_toml"]


_SEAL = "# sha256 of the lines below: "


class Config(Section):
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
        if self.grpo.kl_estimator == "exact" and self.model.lm_head_kernels == "triton":
            raise ValueError(
                "grpo.kl_estimator = exact has no kernels for model.lm_head_kernels = triton: use "
                "model.lm_head_kernels = torch, or another grpo.kl_estimator"
            )
        if r.pool is not None and self.grpo.old_policy != "base":
            raise ValueError(
                f"rollout.pool = {r.pool} was sampled by the base: use grpo.old_policy = base"
            )
        if self.model.adapter is not None and self.grpo.old_policy == "base":
            raise ValueError(
                f"model.adapter = {self.model.adapter}: grpo.old_policy = base samples from the "
                "base without it: use grpo.old_policy = sampler"
            )
        if self.rewards.step_separator:
            for key in ("multi_objective_aggregation", "scale_rewards", "baseline"):
                value = getattr(self.grpo, key)
                if value != type(self.grpo).model_fields[key].default:
                    raise ValueError(
                        "rewards.step_separator: the rewards of a group's steps are normalised "
                        f"together: leave out grpo.{key} = {value}"
                    )
        weights = self.rewards.weights
        if weights and not any(weights):
            raise ValueError(f"rewards.weights = {weights}: with 0 alone there is no reward")
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
        """The same run with other values ("section.key": value), which came from `origin`. Raises
        ConfigError for values that a run file could not have.
        """
        sections: dict[str, Any] = {name: getattr(self, name) for name in _section_names()}
        for name, value in values.items():
            section, key = name.split(".")
            sections[section] = {**dict(sections[section]), key: value}
        return _validated(sections, {**self.sources, **dict.fromkeys(values, origin)})

    @property
    def keeps_reference(self) -> bool:
        """Whether the reference is the base with a copy of the adapters: that of a run that starts
        from an adapter, and one that follows the policy.
        """
        return self.grpo.moves_reference or bool(self.model.adapter and self.grpo.beta)

    @property
    def chosen(self) -> list[str]:
        """The settings that the memory plan chose; their sources say why."""
        return [key for key, source in self.sources.items() if source.startswith("plan: ")]

    @property
    def asks_reference(self) -> bool:
        """Whether steps have a phase in which the reference is asked for its log-probs: those of a
        pool are in it.
        """
        return self.grpo.scores_reference and self.rollout.pool is None

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
    return _validated(values, sources)


def _validated(values: dict[str, Any], sources: dict[str, str]) -> Config:
    try:
        return Config.model_validate({**values, "sources": sources})
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"] if not isinstance(part, int))
        where = ".".join(where.split(".")[:2])
        message = first["msg"].removeprefix("Value error, ")
        origin = f" (from {sources[where]})" if where in sources else ""
        given = f" = {first['input']!r:.100}" if where.count(".") == 1 else ""
        raise ConfigError(f"{where}{given}{origin}: {message}" if given else message) from error


def load_config(
    run_file: str | None, *, profile: tuple[str, dict] | None, assignments: list[tuple[str, dict]]
) -> Config:
    """Defaults < `profile` (origin, sections) < `run_file` < `assignments` ((origin, sections), in
    order). Without a profile, the file is a run's own.
    """
    layers = [profile] if profile else []
    if run_file is not None:
        layers.append((run_file, read_toml(run_file, sealed=profile is None)))
    return build_config([*layers, *assignments])


def read_toml(path: str, sealed: bool = False) -> dict[str, Any]:
    """A TOML file as plain dicts. Raises ConfigError with the line that is wrong. `sealed`: raises
    DamageError where it begins with a checksum, and what follows is not what was written.
    """
    try:
        text = read_text(path)
        if sealed and not text.strip():
            raise DamageError(f"{path} is empty: put it back")
        if sealed and text.startswith(_SEAL):
            first, _, rest = text.partition("\n")
            if first.removeprefix(_SEAL) != _sha256(rest):
                raise DamageError(
                    f"{path} is not what was written (its sha256 differs): put it back, and change "
                    "settings with --set; or delete its first line, to have it taken as it is"
                )
        return tomlkit.parse(text).unwrap()
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    except (TOMLKitError, ValueError) as error:
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
    """Every value in force as TOML, its origin as a comment; unset values stand as comments. The
    first line is a comment with the sha256 of the others.
    """
    document = tomlkit.document()
    for section in _section_names():
        table = tomlkit.table()
        for key, value in getattr(config, section).model_dump(mode="json").items():
            origin = config.sources.get(f"{section}.{key}", "default")
            if value is None:
                table.add(tomlkit.comment(f"{key} is not set"))
                continue
            if isinstance(value, dict):
                # On one line: keys below a table with a header would be that table's.
                item = tomlkit.inline_table()
                item.update(value)
            else:
                item = tomlkit.item(value)
            item.comment(origin)
            table.add(key, item)
        document.add(section, table)
    text = tomlkit.dumps(document)
    return f"{_SEAL}{_sha256(text)}\n{text}"


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _section_names() -> list[str]:
    return [name for name in Config.model_fields if name != "sources"]


def _known(name: str, known: list[str], origin: str, kind: str) -> None:
    if name not in known:
        raise ConfigError(f"{origin}: unknown {kind} '{name}'{nearest(name, known)}")
