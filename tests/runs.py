"""Running the command line in tests, and comparing what runs leave behind."""

import json
from pathlib import Path
from unittest import mock

import torch
from click.testing import CliRunner
from safetensors.torch import load_file

from lowmem_grpo.cli import main
from lowmem_grpo.memory import plan
from lowmem_grpo.memory.phases import Phases

# Steps of a tiny model that take a fraction of a second, in float32 so that they are exact.
TINY = [
    "--profile", "cpu",
    "--num-generations", "4",
    "--problems-per-step", "2",
    "--max-completion-length", "6",
    "--set", "model.compute_dtype=float32",
    "--set", "model.device=cpu",
    "--set", "optimizer.learning_rate=1e-2",
    "--set", "run.log_rollouts=3",
    "--quiet",
]  # fmt: skip


class _Kept(Phases):
    """Phases whose traces are kept for the next run: most of a tiny run's time is its plan's."""

    def forget(self) -> None:
        pass


_PHASES: dict[tuple, _Kept] = {}
_MOST = 8


def _phases(config, model_config, card, **how) -> _Kept:
    """Those of an earlier run that was planned for the same."""
    sections = ("model", "lora", "rewards", "rollout", "grpo", "optimizer", "eval")
    key = (config.model_dump_json(include=set(sections)), repr(card), repr(how))
    if key not in _PHASES:
        if len(_PHASES) == _MOST:
            _PHASES.pop(next(iter(_PHASES)))
        _PHASES[key] = _Kept(config, model_config, card, **how)
    return _PHASES[key]


def call(*arguments: str):
    """Run `lowmem-grpo ARGUMENTS` in this process; the result has exit_code, stdout, stderr and
    exception.
    """
    with mock.patch.object(plan, "Phases", _phases):
        return CliRunner().invoke(main, [str(a) for a in arguments])


def train(model: Path, output: Path, *arguments: str):
    """Train the tiny model; fails the test unless it ends well."""
    result = call("train", "--model", model, "--output", output, *TINY, *arguments)
    assert result.exit_code == 0, result.stderr
    return result


def metrics(run: Path) -> list[dict]:
    """The records of a run without what differs from run to run: times and memory."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in r.items() if k not in ("seconds", "memory")} for r in records]


def assert_same_run(one: Path, other: Path, step: int) -> None:
    """Adapters, optimizer state, metrics and rollouts of two runs are equal to the bit."""
    name = f"checkpoints/step-{step:06d}"
    for file in (f"{name}/adapter_model.safetensors", f"{name}/optimizer.safetensors"):
        mine, theirs = load_file(one / file), load_file(other / file)
        assert mine.keys() == theirs.keys()
        for key, tensor in mine.items():
            assert torch.equal(tensor, theirs[key]), (file, key)
    assert metrics(one) == metrics(other)
    assert (one / "rollouts.jsonl").read_text() == (other / "rollouts.jsonl").read_text()
