"""Solved examples before a question: right, from the training side, never the question itself."""

from __future__ import annotations

import json

import pytest

from lowmem_grpo.errors import TaskError
from lowmem_grpo.tasks import TaskOptions, load_task


def load(spec, seed=0, **options):
    return load_task(spec, seed=seed, options=TaskOptions(**options))


def parts(problem):
    """The system message or None, (question, reply) of each example, and the question."""
    messages = list(problem.messages)
    system = messages.pop(0)["content"] if messages[0]["role"] == "system" else None
    assert [m["role"] for m in messages] == ["user", "assistant"] * (len(messages) // 2) + ["user"]
    texts = [m["content"] for m in messages]
    return system, list(zip(texts[:-1:2], texts[1::2], strict=True)), texts[-1]


def test_examples_are_solved_training_problems_and_never_the_question():
    plain, task = load("arithmetic"), load("arithmetic", few_shot=3, system_prompt="Sums.")
    held = {parts(p)[2] for p in plain.eval_problems(100)}
    problems = [task.train_problem(i) for i in range(60)]
    usual = parts(task.eval_problems(1)[0])[1]
    first = {p.messages[0]["content"]: p.answer for p in map(plain.train_problem, range(9))}
    assert usual == list(first.items())[:3]
    for i, problem in enumerate(problems):
        system, examples, question = parts(problem)
        assert system == "Sums."
        assert len(examples) == 3
        assert question not in dict(examples)
        assert not held & dict(examples).keys()
        assert question == plain.train_problem(i).messages[0]["content"]
        assert (examples == usual) == (question not in dict(usual))
    assert task.is_correct_strict(problems[0], problems[0].answer)
    assert (task.name, task.default_rewards) == (plain.name, plain.default_rewards)


def test_held_out_problems_are_the_same_under_every_seed():
    one, two = load("countdown", few_shot=2), load("countdown", seed=1, few_shot=2)
    assert one.eval_problems(4) == two.eval_problems(4)
    assert one.train_problem(9) != two.train_problem(9)
    assert one.train_problem(9) == load("countdown", few_shot=2).train_problem(9)
    for question, reply in parts(one.train_problem(9))[1]:
        assert "Make" in question
        assert reply.startswith("<answer>")


def test_chats_stay_chats_and_too_few_examples_are_said(tmp_path):
    chat = [{"role": r, "content": c} for r, c in (("user", "a"), ("assistant", "b"))]
    rows = [
        {"prompt": [{"role": "system", "content": "S"}, *chat, {"role": "user", "content": q}]}
        for q in "xyz"
    ]
    path = tmp_path / "chat.jsonl"
    path.write_text("".join(json.dumps({**row, "answer": "1"}) + "\n" for row in rows))
    task = load(f"records:{path}", few_shot=1, eval_fraction=0, shuffle=False)
    assert [m["content"] for m in task.train_problem(2).messages] == list("Sabx1abz")
    assert [m["content"] for m in task.train_problem(0).messages] == list("Saby1abx")
    with pytest.raises(TaskError, match=r"few_shot = 3 needs 4 .* has 3"):
        load(f"records:{path}", few_shot=3, eval_fraction=0)
