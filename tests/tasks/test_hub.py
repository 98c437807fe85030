"""Data sets of the Hub, from a folder that stands for it, and what is said where there is none."""

from __future__ import annotations

import json

import pytest

from lowmem_grpo.errors import TaskError
from lowmem_grpo.tasks import TaskOptions, load_task

datasets = pytest.importorskip("datasets")


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A working directory in which `own/sums` is a folder with two splits, which the package takes
    for a data set of that name.
    """
    folder = tmp_path / "own" / "sums"
    folder.mkdir(parents=True)
    for split, numbers in (("train", range(40)), ("test", range(35, 45))):
        rows = [{"prompt": f"{i} + 1?", "answer": i + 1, "on": "2020-01-02"} for i in numbers]
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{split}.jsonl").write_text(lines)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path


def test_splits_of_a_data_set_are_records(hub):
    test = TaskOptions(eval_path="hub:own/sums/test")
    task = load_task("records:hub:own/sums", seed=0, options=test)
    assert (task.num_train, task.num_eval, task.num_excluded) == (35, 10, 5)
    epoch = [task.train_problem(i) for i in range(35)]
    assert sorted(int(p.answer) for p in epoch) == list(range(1, 36))
    assert epoch[0].id.startswith("hub:own/sums/row ")
    assert json.dumps(epoch[0].fields)
    assert task.default_rewards == ("number",)
    part = load_task("records:hub:own/sums@default/train[:10]", seed=0)
    assert part.num_train + part.num_eval == 10
    with pytest.raises(TaskError, match=r"hub:own/sums has no column 'q'.*prompt, answer, on"):
        load_task("records:hub:own/sums", seed=0, options=TaskOptions(prompt_column="q"))


@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("hub:own/nothing", "own/nothing"),
        ("hub:own/sums/validation", "validation"),
        ("hub:own/sums@other", "other"),
        ("hub:sums", "write hub:OWNER/NAME"),
    ],
)
def test_what_cannot_be_had_is_one_line_with_the_way_out(hub, path, says):
    with pytest.raises(TaskError) as caught:
        load_task(f"records:{path}", seed=0)
    message = str(caught.value)
    assert says in message
    assert "hub:OWNER/NAME" in message or "records:FILE" in message
    assert "\n" not in message
    assert len(message) < 400
