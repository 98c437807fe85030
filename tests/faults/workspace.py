"""A directory in which everything is sound: models, data, settings, a pool, a run."""

from __future__ import annotations

import csv
import json
import pickle
import shutil
from pathlib import Path

import pyarrow
import pyarrow.parquet

from tests.memory.test_report import a_snapshot
from tests.runs import TINY, call, train
from tests.tiny import make_tiny_model, write_gguf

__all__ = ["build"]

ROWS = [{"prompt": f"{a}+{b}=", "answer": str(a + b), "level": a} for a in range(6) for b in (1, 2)]
RUN = """# a run
[lora]
r = 8
target_modules = "all-linear"
[task]
name = "arithmetic:digits=1"
seed = 3
shuffle = true
[rewards]
functions = ["number"]
weights = [2.0]
[grpo]
beta = 0.05
loss_type = "dapo"
[optimizer]
learning_rate = 0.01
lr_scheduler_type = "linear"
[run]
steps = 1
seed = 5
"""
JUDGE = """url = "http://127.0.0.1:9/v1"
model = "m"
prompt = "Rate {completion} of {question} from 0 to 10."
max_score = 10.0
pattern = "[0-9]+"
timeout = 1.0
retries = 0
concurrency = 2
max_tokens = 5
temperature = 0.5
"""
SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "integer", "minimum": 0}, "b": {"pattern": "^x+$"}},
    "required": ["a"],
}


def build(root: Path, whole: bool = True) -> None:
    """Make it at `root`; without the `whole`, only what takes no time."""
    root.mkdir()
    make_tiny_model(root / "model")
    (root / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    with (root / "data.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(ROWS[0]))
        writer.writeheader()
        writer.writerows(ROWS)
    table = pyarrow.Table.from_pylist(ROWS)
    pyarrow.parquet.write_table(table, root / "data.parquet", write_page_checksum=True)
    (root / "run.toml").write_text(RUN)
    (root / "judge.toml").write_text(JUDGE)
    (root / "schema.json").write_text(json.dumps(SCHEMA))
    shutil.copyfile("profiles/cpu.toml", root / "profile.toml")
    shutil.copyfile(root / "model/chat_template.jinja", root / "template.jinja")
    (root / "snapshot.pickle").write_bytes(pickle.dumps(a_snapshot()))
    (root / "taken").mkdir()
    (root / "taken/mine.txt").write_text("not a run")
    if not whole:
        train(root / "model", root / "run", "--steps", "2")
        return
    best = ["--eval-every", "1", "--metric-for-best", "strict_accuracy"]
    small = ["--set", "eval.num_problems=2", "--set", "eval.max_completion_length=3"]
    train(root / "model", root / "run", "--steps", "2", *best, *small)
    write_gguf(make_tiny_model(root / "qwen", "qwen2"), root / "tiny.gguf")
    model = ["--model", root / "model"]
    made = call("rollouts", *model, *TINY, "--groups", "4", "--output", root / "pool")
    assert made.exit_code == 0, made.stderr
    planned = call("plan", *model, "--profile", "cpu", "--json")
    (root / "plan.json").write_text(planned.stdout)
