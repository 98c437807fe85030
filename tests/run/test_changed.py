"""What may differ between a run and its continuation."""

import pytest

from lowmem_grpo.config import build_config
from lowmem_grpo.errors import ConfigError
from lowmem_grpo.run.changed import changed_mathematics


def configured(**sections):
    return build_config([("test", sections)])


def changes(before, after, allowed=()):
    return changed_mathematics(before.model_dump(mode="json"), after, allowed)


def test_how_memory_is_used_and_what_is_looked_at_is_free():
    after = configured(
        memory={"micro_batch_tokens": 64},
        eval={"num_problems": 3},
        run={"output": "elsewhere", "steps": 7, "save_every": 3, "check_every": 1},
        model={"device": "cpu", "attention": "sdpa"},
        rewards={"network": True, "timeout": 5.0},
    )
    assert changes(configured(), after) == []


@pytest.mark.parametrize(
    ("after", "allowed", "says"),
    [
        ({"grpo": {"beta": 0.1}}, (), r"grpo.beta is 0.1, .* started with 0.04.*--allow-changed"),
        ({"grpo": {"beta": 0.1}}, ["grpo.epsilon"], "grpo.beta is 0.1"),
        ({"grpo": {"beta": 0.1}}, ["grpo.betta"], "did you mean 'grpo.beta'"),
        ({"model": {"compute_dtype": "bfloat16"}}, (), "model.compute_dtype is 'bfloat16'"),
        ({"lora": {"r": 4}}, (), r"lora.r is 4, .* with another --output$"),
        ({"lora": {"r": 4}}, ["lora.r"], "the saved adapters and moments are of that"),
        (
            {"run": {"steps": 9}, "optimizer": {"lr_scheduler_type": "linear"}},
            ["optimizer.lr_scheduler_type"],
            r"run.steps is 9, on which the linear schedule depends, .* started with 100",
        ),
    ],
)
def test_another_run_is_refused(after, allowed, says):
    with pytest.raises(ConfigError, match=says):
        changes(configured(), configured(**after), allowed)


def test_what_is_allowed_is_told():
    after = configured(grpo={"beta": 0.1, "epsilon": 0.1}, memory={"micro_batch_tokens": 9})
    found = changes(configured(), after, ["grpo.beta", "grpo.epsilon", "run.seed"])
    assert sorted(found) == ["grpo.beta", "grpo.epsilon"]
