"""A run is continued with the files that it was started with, by their content."""

import json

import pytest

from lowmem_grpo.config import build_config
from lowmem_grpo.errors import ConfigError
from lowmem_grpo.run.inputs import changed_inputs, input_files, template_digest
from tests.runs import call, train


@pytest.fixture
def config(tmp_path):
    for name in ("a", "b", "held"):
        (tmp_path / f"{name}.jsonl").write_text('{"prompt": "1+1?", "answer": "2"}\n')
    (tmp_path / "mine.py").write_text("from helper import x\ndef f(completions): import late\n")
    (tmp_path / "helper.py").write_text("import json, deep.inner\nx = 1\n")
    (tmp_path / "late.py").write_text("")
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep/inner.py").write_text("")
    (tmp_path / "other.py").write_text("")
    (tmp_path / "schema.json").write_text("{}")
    (tmp_path / "judge.toml").write_text("")
    at = str(tmp_path)
    functions = [f"{at}/mine.py:f", f"json:{at}/schema.json", f"judge:{at}/judge.toml", "number"]
    task = {
        "name": f"2*records:{at}/a.jsonl + records:{at}/b.jsonl",
        "eval_path": f"{at}/held.jsonl",
    }
    return build_config([("test", {"task": task, "rewards": {"functions": functions}})])


@pytest.mark.parametrize(
    ("name", "setting"),
    [
        ("a.jsonl", "task.name"),
        ("b.jsonl", "task.name"),
        ("held.jsonl", "task.eval_path"),
        ("mine.py", "rewards.functions"),
        ("helper.py", "rewards.functions"),
        ("late.py", "rewards.functions"),
        ("deep/inner.py", "rewards.functions"),
        ("schema.json", "rewards.functions"),
        ("judge.toml", "rewards.functions"),
    ],
)
def test_every_file_is_told_by_its_content(config, tmp_path, name, setting):
    before = json.loads(json.dumps(input_files(config)))
    assert changed_inputs(before, input_files(config)) == []
    path = tmp_path / name
    path.write_text(path.read_text() + "\n")
    after = input_files(config)
    with pytest.raises(ConfigError, match=rf"{name} \({setting}\).*--allow-changed {setting}"):
        changed_inputs(before, after)
    assert changed_inputs(before, after, [setting]) == [setting]


def test_other_files_do_not_matter_and_templates_do(config, tmp_path):
    before = input_files(config)
    (tmp_path / "other.py").write_text("x = 2")
    assert changed_inputs(before, input_files(config)) == []
    was, now = ({"model.chat_template": template_digest(text)} for text in ("a", "b"))
    with pytest.raises(ConfigError, match="chat template"):
        changed_inputs(was, now)


@pytest.mark.slow
def test_a_run_is_not_continued_with_another_reward_or_data(tiny_model_dir, tmp_path):
    run, data, reward = tmp_path / "run", tmp_path / "data.jsonl", tmp_path / "mine.py"
    rows = [{"prompt": f"{i}+1?", "answer": str(i + 1)} for i in range(9)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    reward.write_text("def f(completions): return [float(len(c)) for c in completions]\n")
    task = ["--task", f"records:{data}", "--reward", f"{reward}:f"]
    train(tiny_model_dir, run, "--steps", "1", *task)
    on = ["train", "--resume", "--output", run, "--steps", "2", "--quiet"]
    reward.write_text(reward.read_text() + "# edited\n")
    result = call(*on)
    assert (result.exit_code, "mine.py" in result.stderr) == (2, True)
    assert call(*on, "--allow-changed", "rewards.functions").exit_code == 0
    data.write_text(data.read_text().replace('"2"', '"3"'))
    on[5] = "3"
    result = call(*on)
    assert (result.exit_code, "data.jsonl" in result.stderr) == (2, True)
    data.write_text(data.read_text().replace('"3"', '"2"', 1))
    assert call(*on).exit_code == 0
    template = tiny_model_dir / "chat_template.jinja"
    kept = template.read_text()
    try:
        template.write_text(kept.replace("<a>", "<a> "))
        on[5] = "4"
        result = call(*on)
    finally:
        template.write_text(kept)
    assert (result.exit_code, "model.chat_template" in result.stderr) == (2, True)
