"""Options that commands share, and the configuration that they add up to. No torch at import."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from lowmem_grpo.config import Config

__all__ = [
    "ADAPTER",
    "JSON",
    "QUIET",
    "SHAPE",
    "SHARED",
    "TRAIN",
    "options",
    "print_document",
    "print_json",
    "read_config",
    "read_target",
    "setting",
]


def setting(flag: str, key: str, kind: Any = str, **options: Any):
    """A flag that is another way to write `--set key=value`."""
    options.setdefault("help", f"Sets {key}.")
    name = key.replace(".", "__")
    return click.option(flag, name, type=kind, default=None, **options)


SHARED = (
    click.argument(
        "run_file", required=False, type=click.Path(dir_okay=False), metavar="[RUN.toml]"
    ),
    click.option(
        "--profile", default="auto", help="auto, a profile's name, or a file.", show_default=True
    ),
    click.option(
        "--set",
        "assignments",
        multiple=True,
        metavar="SECTION.KEY=VALUE",
        help="Any setting; repeatable.",
    ),
    setting("--model", "model.name", help="Hub id, directory, .gguf file, or smollm2-135m."),
    setting(
        "--task",
        "task.name",
        help="arithmetic[:options], countdown[:options], gsm8k, reasoning_gym:NAME, records:PATH, "
        "records:hub:OWNER/NAME, or several: 2*TASK + TASK.",
    ),
)
SHAPE = (
    setting(
        "--num-generations", "rollout.num_generations", int, help="G, completions of each problem."
    ),
    setting(
        "--problems-per-step", "rollout.problems_per_step", int, help="B, problems of each step."
    ),
    setting("--max-prompt-length", "rollout.max_prompt_length", int, help="In tokens."),
    setting("--max-completion-length", "rollout.max_completion_length", int, help="In tokens."),
)
ADAPTER = (
    setting("--adapter", "model.adapter", help="A LoRA adapter to start from, in PEFT's format."),
)
TRAIN = (
    setting("--steps", "run.steps", int, help="Optimizer steps."),
    setting("--output", "run.output", help="The run directory."),
    setting("--seed", "run.seed", int, help="Of initialisation and sampling."),
    setting(
        "--save-every", "run.save_every", int, help="Steps between checkpoints that stay; 0: none."
    ),
    setting("--eval-every", "eval.every", int, help="Steps between evaluations; 0: never."),
    setting("--pool", "rollout.pool", help="Train on the groups in this directory."),
    setting(
        "--metric-for-best",
        "eval.metric_for_best",
        help="strict_accuracy or lenient_accuracy: keep the adapter that is best by it.",
    ),
)
BEST = click.option("--best", is_flag=True, help="The run's best adapter, by --metric-for-best.")
JSON = click.option("--json", "as_json", is_flag=True, help="One JSON document on standard output.")
QUIET = click.option("--quiet", "-q", is_flag=True, help="Errors and results only.")


def options(*groups):
    def decorate(function):
        for option in reversed([option for group in groups for option in group]):
            function = option(function)
        return function

    return decorate


def read_config(
    run_file: str | None,
    profile: str | None,
    assignments: tuple[str, ...],
    flags: dict[str, Any],
    say: Callable[[str], None] = lambda text: None,
) -> Config:
    """Defaults < profile < run file < --set and flags; no profile when it is None, and the file is
    a run's own. A run that starts from an adapter has that adapter's settings.

    `say` is told which profile was chosen and why.
    """
    from lowmem_grpo.allocator_options import read_options

    read_options()  # before torch, which some mistakes in them abort while it is loaded
    from lowmem_grpo.adapter_config import started
    from lowmem_grpo.config import load_config, parse_assignment, read_toml
    from lowmem_grpo.hardware import detect
    from lowmem_grpo.profiles import choose_profile

    layers = [("--set", parse_assignment(text)) for text in assignments]
    for name, value in flags.items():
        if value is not None:
            section, key = name.split("__")
            layers.append(("command line", {section: {key: value}}))
    base = None
    if profile is not None:
        device = "auto"
        for sections in [read_toml(run_file) if run_file else {}, *(s for _, s in layers)]:
            model = sections.get("model")
            device = str(model.get("device", device)) if isinstance(model, dict) else device
        chosen = choose_profile(profile, detect(device))
        say(f"profile {chosen.value.name}: {chosen.reason}")
        base = f"profile {chosen.value.name}", chosen.value.settings
    config = load_config(run_file, profile=base, assignments=layers)
    return config if profile is None else started(config)


def print_document(document: Any) -> None:
    """A long document, with lists of thousands of numbers, on one line."""
    click.echo(json.dumps(document, ensure_ascii=False))


def print_json(document: Any) -> None:
    click.echo(json.dumps(document, indent=2, ensure_ascii=False))


def read_target(
    target: str,
    profile: str,
    assignments: tuple[str, ...],
    flags: dict[str, Any],
    say: Callable[[str], None] = lambda text: None,
    best: bool = False,
    warn: Callable[[str], None] = lambda text: None,
) -> tuple[Config, Path | None]:
    """The configuration of a run and its adapter, that of an adapter and itself, or that of a plain
    model and None. `warn` is told of checkpoints that are damaged.
    """
    from lowmem_grpo.allocator_options import read_options

    read_options()  # before torch
    from lowmem_grpo.adapter_config import with_adapter
    from lowmem_grpo.errors import ConfigError
    from lowmem_grpo.policy.adapter_files import is_adapter, read_adapter_file
    from lowmem_grpo.run.export import adapter_directory, run_of

    path = Path(target)
    if (path / "config.toml").is_file():
        adapter = adapter_directory(path, best, warn)
        return read_config(str(path / "config.toml"), None, assignments, flags), adapter
    if best:
        raise ConfigError(f"--best: {target} is not a run")
    if is_adapter(path):
        if (run := run_of(path)) is not None:
            return read_config(str(run / "config.toml"), None, assignments, flags), path
        found = read_adapter_file(path)
        config = with_adapter(read_config(None, profile, assignments, flags, say), found)
        if found.base not in (None, config.model.name):
            say(f"its base, which it names as {found.base}, is {config.model.name} here")
        return config, path
    flags = {"model__name": target, **flags}
    return read_config(None, profile, assignments, flags, say), None
