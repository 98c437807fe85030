"""What is text of a completion's tokens: tags that rewards look for, and beginnings of prompts."""

import pytest

from lowmem_grpo.rollout.groups import sample_groups
from lowmem_grpo.rollout.sampling import Sampling
from lowmem_grpo.rollout.text import Texts
from lowmem_grpo.run.evaluate import evaluate
from lowmem_grpo.tasks import load_task
from lowmem_grpo.tasks.base import Problem, chat
from tests.tiny import TEMPLATE, make_tokenizer

TAGS = ["<answer>", "</answer>", "[TOOL]", "<|fim|>"]


def tokenizer_with(*tags, template=TEMPLATE):
    tokenizer = make_tokenizer()
    named = {"extra_special_tokens": list(tags)}
    tokenizer.add_special_tokens(named, replace_extra_special_tokens=False)
    tokenizer.chat_template = template
    return tokenizer


def ids_of(tokenizer, text):
    return tokenizer(text, add_special_tokens=False).input_ids


def own(texts, tokenizer, text, ended=True):
    """Of the tokens of `text`, without the spaces between them that this tokenizer decodes to."""
    return texts.own(ids_of(tokenizer, text), ended).replace(" ", "")


@pytest.mark.parametrize(
    ("skip", "text"),
    [
        ("auto", "a<answer>7</answer>[TOOL]<|fim|>b"),
        (True, "a7b"),
        (False, "a<answer>7</answer>[TOOL]<|fim|><u>b<e>"),
    ],
)
def test_tags_are_text_and_ends_and_frames_of_turns_are_not(skip, text):
    tokenizer = tokenizer_with(*TAGS)
    whole = "a<answer>7</answer>[TOOL]<|fim|><u>b<e>"
    assert own(Texts(tokenizer, skip), tokenizer, whole) == text


def test_an_end_that_closes_a_tag_is_text_and_another_end_is_not():
    tokenizer = tokenizer_with("<answer>", "</answer>", "<|done|>")
    tokenizer.eos_token = "</answer>"
    texts = Texts(tokenizer)
    assert own(texts, tokenizer, "<answer>7</answer>") == "<answer>7</answer>"
    assert own(texts, tokenizer, "7<|done|>") == "7"
    assert own(texts, tokenizer, "7<|done|>", ended=False) == "7<|done|>"


OPENED = TEMPLATE.replace("<a>{% endif %}", "<a>OPENED{% endif %}")


@pytest.mark.parametrize(
    ("opened", "beginning", "expected"),
    [
        ("", None, ""),
        ("<think>\n", None, "<think>\n"),
        ("<think>\n\n</think>\n\n", None, ""),
        ("\n", None, ""),
        ("So ", None, "So "),
        ("", "The sum ", "The sum "),
        ("<think>\n", "Well</think>So ", "<think>\nWell</think>So "),
    ],
)
def test_the_beginning_of_the_turn_is_text(opened, beginning, expected):
    tokenizer = tokenizer_with(template=OPENED.replace("OPENED", opened))
    messages = chat("1+1?", None)
    if beginning is not None:
        messages = (*messages, {"role": "assistant", "content": beginning})
    problem = Problem("p", messages, "2")
    assert Texts(tokenizer).prefill(problem) == expected
    assert Texts(tokenizer, include_prefill=False).prefill(problem) == ""
    said = [line for line in Texts(tokenizer).lines(problem) if "include_prefill" in line]
    assert len(said) == bool(expected)


def test_groups_and_evaluations_have_such_texts(policy, monkeypatch):
    tokenizer = tokenizer_with(template=OPENED.replace("OPENED", "<think>"))
    monkeypatch.setattr(policy, "tokenizer", tokenizer)
    task = load_task("arithmetic:digits=1", seed=0)
    how = {"num_generations": 2, "sampling": Sampling(max_completion_length=8), "seed": 0}
    how |= {"max_prompt_length": 200, "batch_size": 8}
    (group,) = sample_groups(policy, [task.train_problem(0)], step=0, **how)
    found = evaluate(policy, task, num_problems=1, **how)
    texts = [rollout.text for rollout in group.rollouts] + [each[1] for each in found.completions]
    assert len(texts) == 4
    assert all(text.startswith("<think>") for text in texts)
