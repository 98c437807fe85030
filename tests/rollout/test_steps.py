"""Steps of completions: no character and no token is lost, and ends are where the text says."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lowmem_grpo.rollout.steps import step_ends, step_texts
from lowmem_grpo.rollout.text import Texts

END = 0


class Tokenizer:
    """A token a character, and an end token that is not shown."""

    def decode(self, ids, skip_special_tokens):
        assert skip_special_tokens
        return "".join(chr(i) for i in ids if i != END)


@pytest.mark.parametrize(
    ("text", "steps"),
    [
        ("", [""]),
        ("a", ["a"]),
        ("a|b", ["a|", "b"]),
        ("a|b|", ["a|", "b|"]),
        ("a||b", ["a||", "b"]),
        ("| |a|b", ["| |a|", "b"]),
        ("||", ["||"]),
        ("a| |", ["a| |"]),
    ],
)
def test_texts(text, steps):
    assert step_texts(text, "|") == steps


@settings(deadline=None, derandomize=True)
@given(st.text(alphabet="ab |\n", max_size=30), st.sampled_from(["|", "\n\n", "ab"]))
def test_nothing_is_lost_and_ends_are_those_of_the_texts(text, separator):
    steps = step_texts(text, separator)
    assert "".join(steps) == text
    assert len(steps) == 1 or all(step.replace(separator, "").strip() for step in steps)
    ids = [*map(ord, text), END]
    ends = step_ends(Texts(Tokenizer(), True), ids, text, separator)
    assert ends[-1] == len(ids)
    assert ends[:-1] == [sum(map(len, steps[: i + 1])) for i in range(len(steps) - 1)]
