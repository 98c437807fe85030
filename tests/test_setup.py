"""What is configured reaches what computes."""

import dataclasses
import json
from contextlib import nullcontext

import pytest

from lowmem_grpo.config import build_config
from lowmem_grpo.errors import TaskError
from lowmem_grpo.grpo.objective import Objective
from lowmem_grpo.setup import check_prompts, open_task, update_settings
from lowmem_grpo.tasks import TaskOptions

OTHERS = {
    "epsilon": 0.1,
    "epsilon_high": 0.3,
    "beta": 0.5,
    "loss_type": "luspo",
    "importance_sampling_level": "sequence",
    "delta": 4.0,
    "kl_estimator": "k2",
    "use_bias_correction_kl": True,
    "off_policy_mask_threshold": 0.5,
    "entropy_coef": 0.01,
    "sapo_temperature_pos": 2.0,
    "sapo_temperature_neg": 3.0,
    "vespo_k_pos": 4.0,
    "vespo_lambda_pos": 5.0,
    "vespo_k_neg": 6.0,
    "vespo_lambda_neg": 7.0,
    "importance_sampling_clip_max": 2.0,
}


def configured(**grpo):
    return build_config([("test", {"grpo": grpo, "memory": {"micro_batch_tokens": 1000}})])


def test_every_setting_of_the_objective_is_the_configuration_s():
    assert OTHERS.keys() == {field.name for field in dataclasses.fields(Objective)}
    objective = update_settings(configured(**OTHERS))["objective"]
    assert dataclasses.asdict(objective) == OTHERS


def test_defaults_of_the_objective_are_the_configuration_s():
    objective = update_settings(configured())["objective"]
    assert objective == Objective(epsilon=0.2, epsilon_high=0.2, beta=0.04)


def test_every_option_of_a_task_is_the_configuration_s(monkeypatch):
    others = {"system_prompt": "s", "few_shot": 2, "path": "p", "prompt_column": "q"}
    others |= {"answer_column": "a", "eval_fraction": 0.5, "eval_path": "e", "shuffle": False}
    assert others.keys() == {field.name for field in dataclasses.fields(TaskOptions)}
    monkeypatch.setattr("lowmem_grpo.setup.load_task", lambda spec, **given: (spec, given))
    config = build_config([("test", {"task": {"name": "records", "seed": 3, **others}})])
    assert open_task(config) == ("records", {"seed": 3, "options": TaskOptions(**others)})
    assert open_task(configured()) == ("arithmetic", {"seed": 0, "options": TaskOptions()})


def test_prompts_are_checked_under_the_template_as_configured(tiny_model_dir, tmp_path):
    template = tmp_path / "t.jinja"
    template.write_text("{{ messages[0].content }}{% if think is defined %}{{ think }}{% endif %}")
    model = {"name": str(tiny_model_dir), "chat_template": str(template)}
    for kwargs, refused in (({}, False), ({"think": "x" * 90}, True)):
        config = build_config(
            [
                ("test", {"model": {**model, "chat_template_kwargs": kwargs}}),
                ("test", {"rollout": {"max_prompt_length": 90}, "run": {"steps": 1}}),
            ]
        )
        with pytest.raises(TaskError) if refused else nullcontext():
            check_prompts(open_task(config), config)


def test_prompts_that_are_too_long_are_left_out_where_that_is_set(tiny_model_dir, tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = [{"prompt": "q" * (1 + i), "answer": "1"} for i in range(60)]
    path.write_text("\n".join(map(json.dumps, rows)))
    settings = {
        "model": {"name": str(tiny_model_dir)},
        "rollout": {"max_prompt_length": 40},  # one token a letter, and 4 of the template
        "run": {"steps": 20},
        "eval": {"every": 1},
    }
    for name in (f"records:{path}", f"records:{path} + arithmetic"):
        for filtered in (False, True):
            task = {"name": name, "filter_overlong_prompts": filtered, "eval_fraction": 0.3}
            config, said = build_config([("test", {**settings, "task": task})]), []
            refused = pytest.raises(TaskError, match="filter_overlong_prompts")
            with nullcontext() if filtered else refused:
                check_prompts(open_task(config), config, said.append)
        (line,) = said
        assert line.startswith("left out for prompts of more than 40 tokens: ")
        assert "training problems and" in line


def test_an_evaluation_without_problems_is_refused_before_anything_is_loaded(
    tiny_model_dir, tmp_path
):
    path = tmp_path / "same.jsonl"
    path.write_text('{"prompt": "q", "answer": "1"}\n' * 3)
    for every in (0, 1):
        settings = {"model": {"name": str(tiny_model_dir)}, "eval": {"every": every}}
        config = build_config([("test", {**settings, "task": {"name": f"records:{path}"}})])
        with pytest.raises(TaskError, match="holds out no") if every else nullcontext():
            check_prompts(open_task(config), config)


def test_a_level_that_no_problem_has_is_refused(tiny_model_dir):
    for field, refused in (("operands", False), ("operand", True)):
        rollout = {"curriculum": 2, "curriculum_field": field}
        model = {"name": str(tiny_model_dir)}
        config = build_config([("test", {"model": model, "rollout": rollout})])
        says = r"operand: no problem of arithmetic has it \(did you mean 'operands'\?\)"
        with pytest.raises(TaskError, match=says) if refused else nullcontext():
            check_prompts(open_task(config), config)
