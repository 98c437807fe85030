"""Prompts by chat template: with all messages in them, and where a completion begins."""

from copy import copy

import pytest

from lowmem_grpo.errors import ModelError, TaskError
from lowmem_grpo.rollout.prompts import render, turn_added
from lowmem_grpo.tasks.messages import read_messages

ASKED = {"role": "user", "content": "1+1?"}
ROLES = "{% for m in messages %}<|{{ m.role }}|>\n{{ BODY }}<e>\n{% endfor %}"
GENERATION = "{% if add_generation_prompt %}<|assistant|>\nOPENED{% endif %}"
# DeepSeek's and Qwen's cut thoughts out of a message; Qwen 3's puts empty ones before the last.
CUT = "m.content.split('</think>')[-1] if m.role == 'assistant' else m.content"
LAST = "'<think>\n\n</think>\n\n' ~ m.content if m.role == 'assistant' and loop.last else m.content"


def template(body="m.content", opened=""):
    return ROLES.replace("BODY", body) + GENERATION.replace("OPENED", opened)


TEMPLATES = {
    "plain": template(),
    "trims": template("m.content | trim"),
    "thinks": template(CUT, "<think>\n"),
    "thinks not": template(opened="<think>\n\n</think>\n"),
    "empty thoughts": template(LAST),
    "no header": "{% for m in messages %}{% if m.role == 'user' %}[I]{{ m.content }}[/I]"
    "{% else %} {{ m.content }}<e>{% endif %}{% endfor %}",
    "no generation": ROLES.replace("BODY", "m.content"),
    "alternates": "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{% endfor %}" + template(),
    "channels": "{% for m in messages %}<|{{ m.role }}{{ '|>final' if m.role == 'assistant' }}|>"
    "{{ m.content }}{% endfor %}{% if add_generation_prompt %}<|assistant{% endif %}",
    "parts": "{% for m in messages %}<|{{ m.role }}|>\n{% for p in m.content %}"
    "{% if p.type == 'text' %}{{ p.text }}{% endif %}{% endfor %}<e>\n{% endfor %}"
    + GENERATION.replace("OPENED", ""),
}
USER, OURS = "<|user|>\n1+1?<e>\n", "<|assistant|>\n"


def rendered(policy, chat_template, *messages, **kwargs):
    tokenizer = copy(policy.tokenizer)
    tokenizer.chat_template = chat_template
    return tokenizer, render(tokenizer, list(read_messages(list(messages))), kwargs, "p")


@pytest.mark.parametrize("beginning", ["So: ", "\n 2", "<think>", "Well.\n<think>\n"])
@pytest.mark.parametrize(
    ("name", "head"),
    [
        ("plain", USER + OURS),
        ("trims", USER + OURS),
        ("thinks", USER + OURS),
        ("empty thoughts", USER + OURS),
        ("no header", "[I]1+1?[/I] "),
        ("no generation", USER + OURS),
        ("alternates", USER + OURS),
        ("channels", "<|user|>1+1?<|assistant|>final|>"),
        ("parts", USER + OURS),
    ],
)
def test_the_assistant_s_beginning_is_gone_on_from_as_it_stands(policy, name, head, beginning):
    last = {"role": "assistant", "content": beginning}
    _, text = rendered(policy, TEMPLATES[name], ASKED, last)
    assert text == head + beginning


def test_continued_as_transformers_does_where_a_template_leaves_messages_alone(policy):
    for name in ("plain", "no header", "no generation", "alternates", "channels"):
        last = {"role": "assistant", "content": "So: "}
        tokenizer, text = rendered(policy, TEMPLATES[name], ASKED, last)
        assert text == tokenizer.apply_chat_template(
            [ASKED, last], tokenize=False, continue_final_message=True
        )


@pytest.mark.parametrize(
    ("name", "beginning", "whole"),
    [
        ("thinks", "<think>\nOne", "<think>\nOne"),
        ("thinks", "One and one.\n</think>\nTwo", "<think>\nOne and one.\n</think>\nTwo"),
        ("thinks", "<think>a</think>Two", "<think>a</think>Two"),
        ("thinks not", "Two", "<think>\n\n</think>\nTwo"),
        ("thinks not", "<think>\nOne", "<think>\nOne"),
    ],
)
def test_thoughts_that_a_template_opens(policy, name, beginning, whole):
    last = {"role": "assistant", "content": beginning}
    _, text = rendered(policy, TEMPLATES[name], ASKED, last)
    assert text == USER + OURS + whole


@pytest.mark.parametrize(
    ("chat_template", "messages", "says"),
    [
        (
            "{{ messages[0].content }}{% if messages | length > 1 %}{{ raise_exception('1') }}"
            "{% endif %}",
            [ASKED, {"role": "assistant", "content": "So: "}],
            "'So: '.*leave the beginning out",
        ),
        (
            "{{ messages[-1].content }}",
            [{"role": "system", "content": "Be brief."}, ASKED],
            "leaves out message 1 of problem p",
        ),
        (template(), [{"role": "human", "content": "1+1?"}], "does not know the role 'human'"),
        (template() + "{{ '\\ud83d' }}", [ASKED], r"\\ud83d into problem p, half"),
    ],
)
def test_what_a_template_cannot_do_is_said(policy, chat_template, messages, says):
    with pytest.raises(ModelError, match=says) as caught:
        rendered(policy, chat_template, *messages)
    assert "model.chat_template" in str(caught.value)


def test_a_role_that_the_template_knows_and_an_empty_system_message(policy):
    knows = "{# tool #}" + template()
    empty, tool = {"role": "system", "content": ""}, {"role": "tool", "content": "2"}
    _, text = rendered(policy, knows, empty, ASKED, tool)
    assert text == "<|system|>\n<e>\n" + USER + "<|tool|>\n2<e>\n" + OURS


@pytest.mark.parametrize("text", ["<|user|>\n1+1?<e>\n<|assistant|>\n", " <s>1+1?", "[I]1+1?[/I]"])
def test_what_is_in_a_template_already_is_not_put_into_one_again(policy, text):
    name = "no header" if text.startswith("[I]") else "plain"
    with pytest.raises(TaskError, match="in a chat template already, since a message begins with"):
        rendered(policy, TEMPLATES[name], {"role": "user", "content": text})
    as_it_is = "{{ messages[0].content }}"
    assert rendered(policy, as_it_is, {"role": "user", "content": text})[1] == text


def test_a_turn_that_a_template_does_not_begin_is_begun_and_said(policy):
    for name, added in (("no generation", OURS), ("no header", ""), ("plain", "")):
        tokenizer, text = rendered(policy, TEMPLATES[name], ASKED)
        assert turn_added(tokenizer, [ASKED], {}, "p") == added
        bare = tokenizer.apply_chat_template([ASKED], tokenize=False, add_generation_prompt=True)
        assert text == bare + added
