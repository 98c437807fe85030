"""Strict reading of JSON: what the standard reader would take is an error, in words."""

import math

import pytest

from lowmem_grpo.plain_json import parse_json


def test_json_is_what_it_says():
    assert parse_json(b'\xef\xbb\xbf{"a": [1, {"b": null}]}') == {"a": [1, {"b": None}]}
    assert parse_json('"\\ud800"') == "\ud800"
    assert math.isnan(parse_json("[NaN]")[0])


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b'{"a": 1, "b": {"c": 1, "c": 1}}', "the name 'c' comes twice"),
        (b'{"a": "\xed\xa0\x80"}', "can't decode"),
        ('{"a": 1}'.encode("utf-16"), "can't decode"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"a": ' * 50_000, "nested too deeply"),
        (b"9" * 5000, "4300 digits"),
        (b"", "Expecting value"),
    ],
)
def test_what_is_refused(data, says):
    with pytest.raises(ValueError, match=says):
        parse_json(data)
