"""Chat templates that do not come to their end."""

import threading
from copy import copy
from types import SimpleNamespace

import pytest
from transformers import AutoTokenizer

from lowmem_grpo import chat_template
from lowmem_grpo.chat_template import TemplateTimeout, apply_chat_template
from tests.runs import TINY, call

ASKED = [{"role": "user", "content": "1+1?"}]
# transformers allows a range of 100,000 and no more; within each other, 10^15 rounds.
LOOP = "{% for i in range(99999) %}" * 3 + "{% set x = i %}" + "{% endfor %}" * 3
HOSTILE = {
    "loops": LOOP,
    "loops that write": LOOP.replace("{% set x = i %}", "{{ i }}"),
    "a macro that calls itself in loops": "{% macro f(n) %}{% for i in range(9) %}"
    "{{ f(n - 1) if n }}{% endfor %}{% endmacro %}{{ f(40) }}",
}


@pytest.fixture(scope="module")
def tokenizer_of_tiny(tiny_model_dir):
    return AutoTokenizer.from_pretrained(tiny_model_dir)


@pytest.fixture
def soon(monkeypatch):
    monkeypatch.setattr(chat_template, "SECONDS", 0.2)


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("elsewhere", [False, True], ids=["main thread", "another"])
def test_a_template_that_loops_ends(tokenizer_of_tiny, soon, name, elsewhere):
    tokenizer = copy(tokenizer_of_tiny)
    tokenizer.chat_template = HOSTILE[name]
    caught = []

    def ask():
        with pytest.raises(TemplateTimeout, match=r"did not end within 0\.2 s"):
            apply_chat_template(tokenizer, ASKED)
        caught.append(True)

    if elsewhere:
        thread = threading.Thread(target=ask)
        thread.start()
        thread.join()
    else:
        ask()
    assert caught
    for thread in threading.enumerate():  # nothing is left that goes on looping
        if thread.name == "chat template":
            thread.join(60)
            assert not thread.is_alive()


def test_errors_and_words_are_the_templates(tokenizer_of_tiny):
    tokenizer = copy(tokenizer_of_tiny)
    tokenizer.chat_template = "{{ messages[0].content }}{{ more }}"
    assert apply_chat_template(tokenizer, ASKED, more="!") == "1+1?!"
    tokenizer.chat_template = "{{ raise_exception('not me') }}"
    with pytest.raises(Exception, match="not me"):
        apply_chat_template(tokenizer, ASKED)


def test_a_process_that_was_stopped_for_a_while_has_not_looped(monkeypatch, soon):
    monkeypatch.setattr(chat_template.time, "process_time", lambda: 0.0)
    waiting = threading.Event()
    threading.Timer(0.5, waiting.set).start()
    slow = SimpleNamespace(apply_chat_template=lambda *args, **how: str(waiting.wait(60)))
    assert apply_chat_template(slow, ASKED) == "True"


def test_training_with_one_ends_at_the_start(tiny_model_dir, tmp_path, soon):
    file = tmp_path / "loops.jinja"
    file.write_text("{% for m in messages %}{{ m.content }}{% endfor %}" + LOOP)
    template = ["--set", f"model.chat_template={file}"]
    ended = call("train", "--model", tiny_model_dir, "--output", tmp_path / "run", *TINY, *template)
    assert ended.exit_code == 2
    assert "a chat template did not end within 0.2 s: does it loop?" in ended.stderr
    assert "model.chat_template=FILE" in ended.stderr
