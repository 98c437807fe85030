"""The reward `json[:SCHEMA.json]`: 1.0 where the completion is JSON, and valid under a JSON Schema
if there is one, else 0.0.

What counts is the last ```json block of the completion, or, where there is none, all of it. Numbers
that JSON does not have (NaN) and names that come twice are not JSON. A schema may have patterns,
and these run on what the model wrote: so this is done in a child process.
"""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lowmem_grpo.errors import ConfigError
from lowmem_grpo.isolation.worker import Worker
from lowmem_grpo.plain_json import parse_json
from lowmem_grpo.rewards.base import RewardFunction
from lowmem_grpo.rewards.isolated import Isolated, answering

LIMIT_S = 10.0
"""For all completions of a step."""
_BLOCK = re.compile(r"```(?:json)?[ \t]*\n(.*?)```", re.DOTALL)


def json_reward(path: str) -> RewardFunction:
    """The reward function for the schema in the file at `path`, or for none. Raises `ConfigError`
    for a file that is no schema, and where the package jsonschema is missing.
    """
    schema = None
    if path:
        if importlib.util.find_spec("jsonschema") is None:
            raise ConfigError(
                f"reward 'json:{path}' needs the package jsonschema: "
                'pip install "lowmem-grpo[tasks]"'
            )
        schema = _read(path)
    worker = Worker("lowmem_grpo.rewards.json_schema:make_check", {"schema": schema})
    return Isolated(worker, LIMIT_S, apart=True)


def make_check(schema: Any) -> Callable[..., list | str]:
    """The child's side."""
    valid = None
    if schema is not None:
        from jsonschema.validators import validator_for

        valid = validator_for(schema)(schema).is_valid

    def check(completions: list[str], **_: Any) -> list[float]:
        return [float(_holds(text, valid)) for text in completions]

    return answering(check)


def _holds(text: str, valid: Callable[[Any], bool] | None) -> bool:
    blocks = _BLOCK.findall(text)
    try:
        value = json.loads(
            blocks[-1] if blocks else text, parse_constant=_refuse, object_pairs_hook=_once
        )
    except (ValueError, RecursionError):
        return False
    return valid is None or valid(value)


def _refuse(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name twice")
    return found


def _read(path: str) -> Any:
    from jsonschema.exceptions import SchemaError
    from jsonschema.validators import validator_for

    try:
        schema = parse_json(Path(path).expanduser().read_bytes())
        if not isinstance(schema, (dict, bool)):
            raise ConfigError(f"reward 'json:{path}': a schema is an object, not {schema!r:.60}")
        validator_for(schema).check_schema(schema)
    except OSError as error:
        raise ConfigError(f"reward 'json:{path}': cannot read it: {error.strerror}") from error
    except ValueError as error:
        raise ConfigError(f"reward 'json:{path}': not JSON: {error}") from error
    except SchemaError as error:
        raise ConfigError(f"reward 'json:{path}': not a schema: {error.message:.200}") from error
    return schema
