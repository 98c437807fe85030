"""What a run reads besides its model: whether the files are those that it was started with.

Files are told by the sha256 of their content, by the setting that names them: data, reward
functions with the modules beside them that they import, schemas, judges, and the chat template that
is in force. Left out: data sets of the Hub, what reward functions open themselves, and the weights
of reward models. (The base's weights are looked at in policy/integrity.py.)
"""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Collection, Iterator
from pathlib import Path

from lowmem_grpo.checksum import sha256_of
from lowmem_grpo.config import Config
from lowmem_grpo.errors import ConfigError
from lowmem_grpo.tasks.mixture import split_mixture

__all__ = ["TEMPLATE", "Inputs", "changed_inputs", "input_files", "template_digest"]

Inputs = dict[str, dict[str, str]]
"""By setting ("section.key") and file: the sha256 of its content."""
TEMPLATE = "model.chat_template"


def input_files(config: Config) -> Inputs:
    """Of all files that the configuration names. Raises ConfigError for one that cannot be read."""
    found: Inputs = {}
    for setting, path in _named(config):
        file = Path(path).expanduser()
        if file.is_file():  # a name that is none is for those who open it to refuse
            try:
                found.setdefault(setting, {})[path] = sha256_of(file)
            except OSError as error:
                raise ConfigError(f"{setting}: cannot read {path}: {error.strerror}") from error
    return found


def template_digest(text: str) -> dict[str, str]:
    """Of the chat template in force, wherever it is from."""
    return {"the chat template": hashlib.sha256(text.encode()).hexdigest()}


def changed_inputs(was: Inputs, now: Inputs, allowed: Collection[str] = ()) -> list[str]:
    """The settings, of those that are `allowed` to, whose files are others than they were. A
    setting that names other files is not for here to refuse. Raises ConfigError for a file that
    changed and may not have.
    """
    found = []
    for setting in was.keys() & now.keys():
        names = [
            name
            for name in sorted(was[setting].keys() | now[setting].keys())
            if was[setting].get(name) != now[setting].get(name)
        ]
        if names and setting not in allowed:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise ConfigError(
                f"--resume: {names[0]}{more} ({setting}) is not what the run was started with: its "
                "content has changed; bring that back, or start another run with another --output, "
                f"or --allow-changed {setting}"
            )
        found += [setting] if names else []
    return sorted(found)


def _named(config: Config) -> Iterator[tuple[str, str]]:
    """(setting, path) of what the configuration names."""
    for _, spec in split_mixture(config.task.name):
        kind, _, rest = spec.partition(":")
        if kind == "records" and rest:
            yield "task.name", rest
    for setting in ("path", "eval_path"):
        if value := getattr(config.task, setting):
            yield f"task.{setting}", value
    for spec in config.rewards.functions:
        kind, _, rest = spec.partition(":")
        if kind in ("json", "judge"):
            yield "rewards.functions", rest
        elif kind == "model":
            options = (option.partition("=") for option in rest.split(","))
            yield from (
                ("rewards.functions", path) for name, _, path in options if name == "template"
            )
        elif (path := spec.rpartition(":")[0]).endswith(".py"):
            yield "rewards.functions", path
            for module in _beside(Path(path).expanduser()):
                yield "rewards.functions", str(module)


def _beside(file: Path, seen: set[Path] | None = None) -> list[Path]:
    """The modules in the folder of `file` that it imports, and those that they import."""
    seen = {file} if seen is None else seen
    try:
        tree = ast.parse(file.read_bytes())
    except (OSError, SyntaxError, ValueError):  # which is said where it is loaded
        return []
    found = []
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            inner = [f"{node.module}.{alias.name}" for alias in node.names] if node.module else []
            names = [*([node.module] if node.module else []), *inner]
        for name in names:
            base = file.parent.joinpath(*name.split("."))
            for path in (base.with_suffix(".py"), base / "__init__.py"):
                if path.is_file() and path not in seen:
                    seen.add(path)
                    found += [path, *_beside(path, seen)]
    return found
