"""--metric-for-best keeps the adapter of the best evaluation, and the first of equals."""

import json
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from lowmem_grpo.run.best import Best
from lowmem_grpo.run.directory import RunDirectory
from lowmem_grpo.sections import EvalConfig
from tests.runs import call, train


class Policy(SimpleNamespace):
    """What an adapter is saved from: one tensor that holds the step."""

    def adapter_state(self):
        return {"w": torch.tensor([float(self.step)])}

    def save_adapter_config(self, directory, base_name):
        (directory / "adapter_config.json").write_text("{}")


def like(metric, **settings):
    return EvalConfig(metric_for_best=metric, every=1, **settings)


def kept(run):
    return load_file(run / "best/adapter_model.safetensors")["w"].item()


def test_the_best_one_is_kept_also_across_a_resume(tmp_path):
    with RunDirectory(tmp_path / "run", resume=False, overwrite=False) as run:
        best = Best(run, like("strict_accuracy"), 0)
        for step, value in enumerate([0.2, 0.5, 0.5, 0.4]):
            offered = best.offer(step, {"strict_accuracy": value}, Policy(step=step), "base")
            assert offered == (step < 2)
        assert kept(run.path) == 1.0
        again = Best(run, like("strict_accuracy"), 4)
        assert not again.offer(4, {"strict_accuracy": 0.5}, Policy(step=4), "base")
        assert again.offer(5, {"strict_accuracy": 0.6}, Policy(step=5), "base")
        assert kept(run.path) == 5.0
        assert sorted(p.name for p in run.path.glob(".*")) == []
        # What was kept after step 5 is not there yet in a run that is at 4.
        behind = Best(run, like("strict_accuracy"), 4)
        assert behind.offer(5, {"strict_accuracy": 0.1}, Policy(step=5), "base")
        more = Best(run, like("strict_accuracy", num_problems=500), 9)  # another evaluation
        assert more.offer(9, {"strict_accuracy": 0.05}, Policy(step=9), "base")
        other = Best(run, like("lenient_accuracy"), 9)  # another metric
        assert other.offer(6, {"lenient_accuracy": 0.1}, Policy(step=6), "base")
        assert not Best(run, EvalConfig(), 9).offer(7, {}, None, "")


def test_a_run_keeps_its_best_adapter_and_commands_find_it(tiny_model_dir, tmp_path):
    run = tmp_path / "run"
    best = ["--metric-for-best", "lenient_accuracy", "--set", "eval.num_problems=4"]
    train(tiny_model_dir, run, "--steps", "2", "--eval-every", "1", *best)
    found = json.loads((run / "best/best.json").read_text())
    lines = [json.loads(line) for line in (run / "eval.jsonl").read_text().splitlines()]
    values = [line["lenient_accuracy"] for line in lines]
    assert found["value"] == max(values)
    assert found["step"] == values.index(max(values))
    assert call("export", run, "--best", "--output", tmp_path / "out", "-q").exit_code == 0
    assert load_file(tmp_path / "out/adapter_model.safetensors").keys()
    card = (tmp_path / "out/README.md").read_text()
    assert ("| 2 |" in card) == (found["step"] == 2)
    shown = call("eval", run, "--best", "--json", "--num-problems", "4")
    assert json.loads(shown.stdout)["lenient_accuracy"] == found["value"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["train", "--metric-for-best", "lenient_accuracy"], "--eval-every N"),
        (["train", "--metric-for-best", "accuracy", "--eval-every", "1"], "strict_accuracy"),
        (["eval", "smollm2-135m", "--best"], "is not a run"),
    ],
)
def test_what_cannot_be_kept_is_refused(arguments, says):
    refused = call(*arguments)
    assert refused.exit_code == 2
    assert says in refused.stderr
