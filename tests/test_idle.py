"""Settings without effect are told, with who set them, and no others are."""

import pytest

from lowmem_grpo.config import build_config, config_toml, load_config
from lowmem_grpo.grpo.objective import LOSS_TYPES
from lowmem_grpo.idle import idle_settings
from tests.runs import TINY, call


def told(origin="--set", **grpo):
    return idle_settings(build_config([(origin, {"grpo": grpo})]))


def names(lines):
    return {line.split(" = ")[0].removeprefix("grpo.") for line in lines}


@pytest.mark.parametrize(
    ("settings", "idle"),
    [
        ({"epsilon": 0.1, "epsilon_high": 0.3}, set()),
        ({"loss_type": "dapo", "epsilon": 0.1}, set()),
        ({"loss_type": "cispo", "epsilon": 0.1, "epsilon_high": 5.0}, {"epsilon"}),
        ({"loss_type": "sapo", "epsilon": 0.1, "epsilon_high": 0.3}, {"epsilon", "epsilon_high"}),
        ({"loss_type": "vespo", "epsilon": 0.1, "vespo_k_pos": 1.0}, {"epsilon"}),
        (
            {"sapo_temperature_neg": 2.0, "vespo_k_neg": 2.0},
            {"sapo_temperature_neg", "vespo_k_neg"},
        ),
        ({"loss_type": "sapo", "sapo_temperature_pos": 2.0}, set()),
        ({"kl_estimator": "k2", "use_bias_correction_kl": True}, set()),
        (
            {"beta": 0.0, "kl_estimator": "exact", "use_kl_in_reward": False},
            {"kl_estimator"},
        ),
        ({"beta": 0.0, "use_bias_correction_kl": True}, {"use_bias_correction_kl"}),
        (
            {"beta": 0.0, "use_kl_in_reward": True, "sync_ref_model": True},
            {"use_kl_in_reward", "sync_ref_model"},
        ),
        ({"ref_model_sync_steps": 5}, {"ref_model_sync_steps"}),
        ({"sync_ref_model": True, "ref_model_sync_steps": 5}, set()),
        ({"use_kl_in_reward": True, "kl_estimator": "k2"}, {"kl_estimator"}),
    ],
)
def test_what_has_no_effect_is_told_and_nothing_else(settings, idle):
    lines = told(**settings)
    assert names(lines) == idle
    assert len(lines) == len(idle)


@pytest.mark.parametrize(
    ("sections", "idle"),
    [
        ({"task": {"path": "a.jsonl"}}, {"task.path"}),
        ({"task": {"name": "gsm8k", "path": "a.jsonl", "prompt_column": "q"}}, set()),
        ({"task": {"name": "records", "path": "a.jsonl", "shuffle": False}}, set()),
        ({"task": {"name": "records:b.jsonl", "path": "a.jsonl"}}, {"task.path"}),
        ({"task": {"name": "2*arithmetic + records", "path": "a.jsonl"}}, set()),
        (
            {"task": {"name": "countdown", "eval_path": "b", "answer_column": "x"}},
            {"task.eval_path", "task.answer_column"},
        ),
        (
            {"task": {"name": "records:a", "eval_path": "b", "eval_fraction": 0.2}},
            {"task.eval_fraction"},
        ),
        ({"rollout": {"curriculum_field": "level"}}, {"rollout.curriculum_field"}),
        ({"rollout": {"curriculum_field": "level", "curriculum": 2}}, set()),
    ],
)
def test_what_a_task_does_not_read_is_told(sections, idle):
    assert names(idle_settings(build_config([("--set", sections)]))) == idle


def test_a_line_names_the_value_who_set_it_and_why():
    (line,) = told("run.toml", loss_type="sapo", epsilon=0.1)
    assert line.startswith("grpo.epsilon = 0.1 (from run.toml) has no effect: ")
    assert line.endswith("grpo.loss_type = sapo does not clip by it")


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_defaults_are_nobody_s_wish(loss_type, tmp_path):
    level = "sequence" if loss_type == "luspo" else "token"
    high = 5.0 if loss_type == "cispo" else None
    grpo = {"loss_type": loss_type, "importance_sampling_level": level}
    grpo |= {} if high is None else {"epsilon_high": high}
    config = build_config([("--set", {"grpo": grpo})])
    assert idle_settings(config) == []
    saved = tmp_path / "config.toml"  # from which a resumed run takes every setting
    saved.write_text(config_toml(config))
    assert idle_settings(load_config(str(saved), profile=None, assignments=[])) == []


def test_training_begins_with_them(tiny_model_dir, tmp_path):
    # It stops at the task, before anything is loaded; the lines are there by then.
    arguments = ["--model", tiny_model_dir, "--output", tmp_path / "run", *TINY]
    refused = call(
        "train", *arguments, "--set", "grpo.vespo_k_pos=1", "--set", "rollout.max_prompt_length=1"
    )
    assert refused.exit_code == 2
    assert "warning: grpo.vespo_k_pos = 1.0 (from --set) has no effect" in refused.stderr
