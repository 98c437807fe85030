"""Strict reading of JSON: what the standard reader would take is an error, in words."""

import gzip
import json
import math

import pytest

from lowmem_grpo.plain_json import array_items, parse_json


def test_json_is_what_it_says():
    assert parse_json(b'\xef\xbb\xbf{"a": [1, {"b": null}]}') == {"a": [1, {"b": None}]}
    assert parse_json('"\\ud83d\\ude00"') == "\U0001f600"
    assert math.isnan(parse_json("[NaN]")[0])


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b'{"a": 1, "b": {"c": 1, "c": 1}}', "the name 'c' comes twice"),
        (b'{"a": "\xed\xa0\x80"}', "byte 7 is 0xed"),
        ('{"a": 1}'.encode("utf-16"), "UTF-16"),
        ('{"a": 1}'.encode("utf-16-be"), "UTF-16"),
        (gzip.compress(b"{}"), "gzip"),
        ('{"a": 1, "b": [{"c": "x \\ud83d y"}]}', r"\\ud83d in 'b'"),
        ('{"\\udfff": 1}', "half of a surrogate pair"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"a": ' * 50_000, "nested too deeply"),
        (b"9" * 5000, "4300 digits"),
        (b"", "Expecting value"),
    ],
)
def test_what_is_refused(data, says):
    with pytest.raises(ValueError, match=says):
        parse_json(data)


@pytest.mark.parametrize("text", ["[]", " [ ]\n", '[{"a": "],["}]', '[1 ,\r\n {"a":\n[2]},"x"]\n'])
def test_an_array_is_cut_where_its_items_end(text):
    assert [json.loads(text[start:end]) for start, end in array_items(text)] == json.loads(text)


@pytest.mark.parametrize(
    "text", ["{}", "", "[1", "[1,]", "[,1]", "[1 2]", "[1],", "[1][2]", "[" * 100_000]
)
def test_what_is_no_array_is_refused(text):
    with pytest.raises(ValueError, match=r"Expecting|Extra data|nested too deeply"):
        list(array_items(text))
