"""A user's functions in their process: what values are taken, and what failures cost."""

from __future__ import annotations

import textwrap

import pytest

from lowmem_grpo.isolation.confine import Limits
from lowmem_grpo.rewards.user import open_file
from lowmem_grpo.tasks import Problem

PROBLEMS = [Problem(f"p/{i}", ({"role": "user", "content": "?"},), str(i)) for i in range(4)]
TEXTS = ["zero", "one", "two", "three"]

FILE = """
import asyncio, json, os, time
from decimal import Decimal

class Array:  # stands for a tensor or a numpy array
    def __init__(self, values): self.values = values
    def tolist(self): return self.values

class Scalar:
    def __init__(self, value): self.value = value
    def item(self): return self.value
    def __float__(self): return self.value

VALUES = {
    "tuple": (1, 0, 1, 0), "bools": [True, False] * 2, "array": Array([1.0, 0.0, 1.0, 0.0]),
    "scalars": [Scalar(1.0), Scalar(0.0)] * 2,
    "nan": float("nan"), "inf": float("inf"), "text": "1.0", "complex": 1j, "decimal": Decimal(1),
    "list": [[1.0]], "scalar nan": Scalar(float("nan")),
    "long": [1.0] * 5, "empty": [], "float": 1.0,
    "no list": Array(1.0), "None": None, "string": "1010", "dict": {0: 1.0, 1: 0.0, 2: 1, 3: 1},
    "generator": (x for x in range(4)),
}
def whole(completions, answer, problems, **_):
    assert [problem.answer for problem in problems] == answer
    return VALUES[WHICH]
def one(completions, **_):
    return [VALUES[WHICH] if text == "two" else 1.0 for text in completions]
async def later(completions, answer):
    await asyncio.gather(*(asyncio.sleep(0.01) for _ in completions))
    return [float(a) for a in answer]
def stepwise(completions, **_):
    return [[1, 0.5], (True,), Array([0.25]), [1.0, float("nan")]]
def partly(completions, **_):
    return [None if text == "one" else 0.5 for text in completions]

calls = []
class Two:
    def __init__(self, do): self.do = do
    def __call__(self, completions, **_):
        if "two" in completions: self.do()
        return [1.0] * len(completions)
def out_of_memory():
    bytearray(8 * 2**30)
def breaks():
    return 1 / 0
def reads(completions): return [json.loads(text)["score"] for text in completions]
def per_group(completions):
    calls.append(1)
    if len(completions) == 4: raise ValueError(f"call {len(calls)}")
    return [1.0] * len(completions)
def per_group_constant(completions): return [1.0]
two_raises, two_exits, two_dies = Two(breaks), Two(exit), Two(lambda: os._exit(9))
two_hangs, two_is_huge = Two(lambda: time.sleep(1000)), Two(out_of_memory)
def never(completions): time.sleep(1000)
def counts(completions): calls.append(1); return [float(len(calls))] * len(completions)
"""


@pytest.fixture
def call(tmp_path):
    path = tmp_path / "mine.py"

    def call(name, which="", limit_s=30.0, texts=TEXTS, repeat=1):
        path.write_text(textwrap.dedent(FILE) + f"WHICH = {which!r}\n")
        spec = f"{path}:{name}"
        fields = ("answer", "problems")
        function = open_file(str(path), [spec], fields, limit_s, Limits(2**31))[spec]
        problems = PROBLEMS[: len(texts)]
        for _ in range(repeat):
            found = function(
                completions=list(texts), problems=problems, answer=[p.answer for p in problems]
            )
        return found

    return call


@pytest.mark.parametrize("which", ["tuple", "bools", "array", "scalars"])
def test_numbers_of_every_kind_are_taken_as_floats(call, which):
    values = call("whole", which)
    assert values == [1.0, 0.0, 1.0, 0.0]
    assert all(type(value) is float for value in values)


@pytest.mark.parametrize(
    ("which", "shown"),
    [
        ("nan", "nan (float)"),
        ("inf", "inf (float)"),
        ("text", "'1.0' (str)"),
        ("complex", "1j (complex)"),
        ("decimal", "Decimal('1')"),
        ("list", "[[1.0]] (list)"),
        ("scalar nan", "nan (float)"),
    ],
)
def test_a_value_that_is_no_finite_number_costs_itself(call, which, shown):
    values = call("one", which)
    failure = values.pop(2)
    assert values == [1.0] * 3
    assert failure.reason == "invalid"
    assert shown in failure.message


@pytest.mark.parametrize(
    ("which", "says"),
    [
        ("long", "5 values for 4 completions"),
        ("empty", "0 values for 4"),
        ("float", "(float), not a list"),
        ("no list", "(Array), not a list"),
        ("None", "NoneType"),
        ("string", "str"),
        ("dict", "dict"),
        ("generator", "generator"),
    ],
)
def test_anything_but_one_value_for_each_completion_costs_all(call, which, says):
    failures = call("whole", which)
    assert len(failures) == 4
    assert {failure.reason for failure in failures} == {"invalid"}
    assert all(says in failure.message and "(mine.py:" in failure.message for failure in failures)


def test_a_function_may_be_async_and_may_say_that_it_does_not_apply(call):
    assert call("later") == [0.0, 1.0, 2.0, 3.0]
    assert call("partly") == [0.5, None, 0.5, 0.5]


def test_a_value_may_be_one_for_each_step(call):
    *values, failure = call("stepwise")
    assert values == [[1.0, 0.5], [1.0], [0.25]]
    assert failure.reason == "invalid"


@pytest.mark.parametrize(
    ("name", "reason", "says"),
    [
        ("two_raises", "raised", "ZeroDivisionError: division by zero (mine.py:"),
        ("reads", "raised", "JSONDecodeError: Expecting value: line 1 column 1 (char 0) (mine.py:"),
        ("two_exits", "raised", "SystemExit"),
        ("two_dies", "died", "exit status 9"),
        ("two_hangs", "timeout", "it took more than"),
        ("two_is_huge", "raised", "MemoryError"),
    ],
)
def test_a_call_that_fails_costs_the_scores_of_its_groups_and_is_not_made_again(
    call, name, reason, says
):
    values = call(name, limit_s=1.6 if name == "two_hangs" else 30.0)
    assert len(values) == 4
    assert {value.reason for value in values} == {reason}
    assert all(says in value.message for value in values)


@pytest.mark.parametrize("name", ["per_group", "per_group_constant"])
def test_a_function_is_never_asked_for_a_part_of_its_groups(call, tmp_path, name):
    found = call(name, limit_s=30.0)
    assert {value.reason for value in found} == {"raised" if name == "per_group" else "invalid"}
    assert call(name, repeat=3)[0].message == found[0].message.replace("call 1", "call 3")


def test_a_file_keeps_its_state_between_calls(call):
    assert call("counts", repeat=3) == [3.0] * 4
