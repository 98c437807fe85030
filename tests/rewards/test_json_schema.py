"""The reward `json`."""

from __future__ import annotations

import json

import pytest

from lowmem_grpo.errors import ConfigError
from lowmem_grpo.rewards.json_schema import json_reward

SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "pattern": "^[A-Z]"}, "age": {"type": "integer"}},
    "required": ["name"],
}
TEXTS = [
    '{"name": "Ada", "age": 36}',
    'Here:\n```json\n{"name": "Ada"}\n```\nas you asked.',
    '{"name": "ada"}',
    '{"age": 36}',
    '{"name": "Ada", "age": NaN}',
    '{"name": "Ada", "name": "Bob"}',
    "[1, 2]",
    "Ada",
    "",
    "[" * 100_000,
]


@pytest.fixture
def schema(tmp_path):
    def write(value):
        path = tmp_path / "schema.json"
        path.write_text(value if isinstance(value, str) else json.dumps(value))
        return str(path)

    return write


def test_valid_under_the_schema(schema):
    found = json_reward(schema(SCHEMA))(completions=TEXTS, problems=[])
    assert found == [1.0, 1.0, *[0.0] * 8]


def test_any_json_without_one():
    assert json_reward("")(completions=TEXTS, problems=[]) == [1, 1, 1, 1, 0, 0, 1, 0, 0, 0]


@pytest.mark.parametrize(
    ("content", "says"),
    [("{", "not JSON"), ([1], "a schema is an object"), ({"type": "objct"}, "not a schema")],
)
def test_files_that_are_no_schema(schema, content, says):
    with pytest.raises(ConfigError, match=says):
        json_reward(schema(content))
    with pytest.raises(ConfigError, match="cannot read it"):
        json_reward("gone.json")
