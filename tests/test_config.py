"""The configuration: precedence, origins, and errors that name the value and the way out."""

import pytest
import tomlkit

from lowmem_grpo.config import Config, build_config, config_toml, load_config, parse_assignment
from lowmem_grpo.errors import ConfigError, DamageError


def test_later_layers_win_and_are_named(tmp_path):
    run = tmp_path / "run.toml"
    run.write_text("[grpo]\nbeta = 0.1\nepsilon = 0.3\n[rollout]\nnum_generations = 6\n")
    config = load_config(
        str(run),
        profile=("profile cpu", {"rollout": {"num_generations": 4, "max_prompt_length": 99}}),
        assignments=[("--set", {"grpo": {"beta": 0.2}})],
    )
    assert config.rollout.max_prompt_length == 99  # profile over default
    assert config.rollout.num_generations == 6  # file over profile
    assert config.grpo.beta == 0.2  # flag over file
    assert config.grpo.epsilon == 0.3
    assert config.grpo.num_iterations == 1
    assert config.sources["grpo.beta"] == "--set"
    assert config.sources["rollout.max_prompt_length"] == "profile cpu"


def test_defaults_are_deepseekmaths():
    config = Config()
    assert (config.grpo.beta, config.grpo.epsilon, config.grpo.loss_type) == (0.04, 0.2, "grpo")


def test_saved_configuration_reads_back_the_same(tmp_path):
    config = build_config(
        [
            ("--set", {"rewards": {"functions": ["number", "format:a\\d"], "weights": [1.0, 0.5]}}),
            ("--set", {"task": {"system_prompt": 'say "no" # ever\nplease'}}),
            ("--set", parse_assignment("model.chat_template_kwargs={think=false, n=[1, {a=2}]}")),
        ]
    )
    path = tmp_path / "config.toml"
    path.write_text(config_toml(config))
    again = load_config(str(path), profile=None, assignments=[])
    assert again.model_dump() == config.model_dump()
    assert "# --set" in path.read_text()
    path.write_text(path.read_text().replace("beta = 0.04", "beta = 0.05"))
    with pytest.raises(DamageError, match="its sha256 differs"):
        load_config(str(path), profile=None, assignments=[])
    # As a file to begin another run from, it may be changed; and it may always be said to be right.
    assert load_config(str(path), profile=("none", {}), assignments=[]).grpo.beta == 0.05
    path.write_text(path.read_text().partition("\n")[2])
    assert load_config(str(path), profile=None, assignments=[]).grpo.beta == 0.05
    path.write_text(config_toml(config))
    assert tomlkit.parse(path.read_text())["grpo"]["beta"] == 0.04


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("grpo.beta=0", {"grpo": {"beta": 0}}),
        ("task.name=arithmetic:digits=2", {"task": {"name": "arithmetic:digits=2"}}),
        ("rewards.weights=[1, 0.5]", {"rewards": {"weights": [1, 0.5]}}),
        ("run.tensorboard = true", {"run": {"tensorboard": True}}),
        ("task.system_prompt=Be brief.", {"task": {"system_prompt": "Be brief."}}),
        ('model.name="a = b"', {"model": {"name": "a = b"}}),
    ],
)
def test_assignments_are_toml_or_text(text, expected):
    assert parse_assignment(text) == expected


@pytest.mark.parametrize("text", ["beta=1", "grpo.beta", "=1", ".beta=1", "grpo.=2"])
def test_malformed_assignments(text):
    with pytest.raises(ConfigError, match=r"expected section\.key=value"):
        parse_assignment(text)


@pytest.mark.parametrize(
    ("sections", "says"),
    [
        ({"grpo": {"betta": 1}}, "did you mean 'grpo.beta'"),
        ({"gropo": {"beta": 1}}, "unknown section 'gropo' (did you mean 'grpo'?)"),
        ({"rollout": {"max_tokens": 1}}, "unknown key 'rollout.max_tokens'"),
        ({"grpo": 3}, "must be a section"),
        ({"grpo": {"beta": -0.1}}, "grpo.beta = -0.1 (from here)"),
        ({"grpo": {"beta": float("nan")}}, "grpo.beta"),
        ({"grpo": {"loss_type": "ppo"}}, "'grpo', 'bnpo', 'dapo', 'dr_grpo'"),
        ({"grpo": {"loss_type": "cispo"}}, "set it, to 5 as a start"),
        ({"grpo": {"loss_type": "luspo"}}, "importance_sampling_level = token is not luspo: use"),
        (
            {"grpo": {"loss_type": "vespo", "importance_sampling_level": "sequence"}},
            "is not vespo: use token",
        ),
        ({"grpo": {"loss_type": "sapo", "delta": 4}}, "grpo.delta has no place in"),
        ({"grpo": {"delta": 1.0}}, "grpo.delta = 1.0 (from here)"),
        ({"grpo": {"kl_estimator": "k1"}}, "use k2 or k3, or grpo.use_bias_correction_kl"),
        (
            {"grpo": {"kl_estimator": "exact", "use_bias_correction_kl": True}},
            "leave that out",
        ),
        (
            {"grpo": {"use_kl_in_reward": True, "kl_estimator": "exact"}},
            "k1 of the tokens that were sampled: leave out grpo.kl_estimator = exact",
        ),
        (
            {"grpo": {"use_kl_in_reward": True, "mask_truncated_completions": True}},
            "leave out grpo.mask_truncated_completions = true",
        ),
        (
            {"grpo": {"kl_estimator": "exact"}, "model": {"lm_head_kernels": "triton"}},
            "use model.lm_head_kernels = torch, or another",
        ),
        (
            {
                "grpo": {
                    "multi_objective_aggregation": "normalize_then_sum",
                    "scale_rewards": "none",
                }
            },
            "leave out grpo.scale_rewards",
        ),
        ({"rollout": {"num_generations": 1}}, "greater than or equal to 2"),
        ({"eval": {"num_generations": 4}}, "are all the same: use eval.temperature = 1"),
        ({"rollout": {"num_generations": "many"}}, "rollout.num_generations = 'many'"),
        ({"rollout": {"temperature": 0}}, "rollout.temperature = 0"),
        # A value of another type is a mistake, and not what it could be turned into.
        ({"grpo": {"beta": True}}, "grpo.beta = True (from here)"),
        ({"lora": {"r": "16"}}, "lora.r = '16' (from here)"),
        ({"run": {"tensorboard": "off"}}, "run.tensorboard = 'off' (from here)"),
        ({"run": {"seed": 10**30}}, "seed = 1000000000000000000000000000000 (from here): Input sh"),
        ({"run": {"steps": 10**30}}, "at most 2.15e+09"),
        ({"grpo": {"beta": 1e300}}, "grpo.beta = 1e+300 (from here): Input should be at most"),
        ({"optimizer": {"adam_epsilon": 1e-300}}, "optimizer.adam_epsilon = 1e-300"),
        ({"task": {"name": ["x" * 999]}}, "task.name = ['xxx"),
        (
            {"rollout": {"min_completion_length": 9, "max_completion_length": 8}},
            "min_completion_length = 9 is above",
        ),
        ({"optimizer": {"warmup_steps": 100}}, "warmup_steps = 100 leaves nothing"),
        ({"lora": {"init_lora_weights": "pissa_niter_4"}}, "changes the base weights"),
        ({"rewards": {"functions": ["number"], "weights": [1, 2]}}, "2 values for 1"),
        ({"rewards": {"weights": [0, 0.0]}}, "with 0 alone there is no reward"),
        ({"rewards": {"weights": [1e300]}}, "rewards.weights = [1e+300] (from here): Input should"),
        ({"run": {"seed": -1}}, "run.seed = -1 (from here): Input should be greater than"),
        ({"task": {"seed": -1}}, "task.seed = -1 (from here)"),
        ({"optimizer": {"adam_beta1": 1.0}}, "optimizer.adam_beta1 = 1.0 (from here): Input"),
        ({"optimizer": {"adam_beta2": 1.0}}, "less than 1"),
        ({"run": {"output": "a\0b"}}, "without NUL"),
        ({"run": {"output": ""}}, "should not be blank"),
        ({"task": {"eval_path": " "}}, "task.eval_path = ' ' (from here): Input should not be"),
        ({"rewards": {"writable": [""]}}, "should not be blank"),
        ({"task": {"system_prompt": "\udcff"}}, "\\udcff is half of a character"),
        ({"model": {"chat_template_kwargs": {"a": ["\ud800"]}}}, "half of a character"),
    ],
)
def test_wrong_values_are_named_with_their_origin(sections, says):
    with pytest.raises(ConfigError) as caught:
        build_config([("here", sections)])
    message = str(caught.value)
    assert says in message
    assert len(message) < 250
    assert "\n" not in message


@pytest.mark.parametrize(("key", "value"), [("top_p", 0.9), ("top_k", 40), ("min_p", 0.05)])
def test_training_refuses_a_distribution_that_it_does_not_score(key, value):
    config = build_config([("--set", {"rollout": {key: value}})])
    with pytest.raises(ConfigError, match=f"rollout.{key} = {value}"):
        config.check_trainable()


def test_broken_files(tmp_path):
    with pytest.raises(ConfigError, match="cannot read"):
        load_config(str(tmp_path / "none.toml"), profile=None, assignments=[])
    bad = tmp_path / "bad.toml"
    bad.write_text("[grpo]\nbeta = = 1\n")
    with pytest.raises(ConfigError, match="line 2"):
        load_config(str(bad), profile=None, assignments=[])


def test_every_field_is_described():
    for section, field in Config.model_fields.items():
        if section != "sources":
            for key, entry in field.annotation.model_fields.items():
                assert entry.description, f"{section}.{key}"


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("memory.micro_batch_tokens", 0, "memory.micro_batch_tokens = 0 (from plan): Input should"),
        ("memory.kv_cache_bits", 4, "memory.kv_cache_bits = 4 (from plan): Input should be 8"),
        ("rollout.num_generations", 1, "rollout.num_generations = 1 (from plan): Input should be"),
        ("rollout.max_completion_length", 5, "min_completion_length = 6 is above"),
        ("eval.batch_size", 2.5, "eval.batch_size = 2.5 (from plan): Input should be"),
        ("run.steps", 3, "warmup_steps = 3 leaves nothing"),
    ],
)
def test_what_is_settled_later_keeps_to_the_same_rules(key, value, says):
    config = build_config(
        [("a", {"rollout": {"min_completion_length": 6}, "optimizer": {"warmup_steps": 3}})]
    )
    with pytest.raises(ConfigError) as caught:
        config.settled({key: value}, "plan")
    assert says in str(caught.value)


def test_settling_changes_nothing_else():
    config = Config()
    for section in (name for name in Config.model_fields if name != "sources"):
        for key, value in getattr(config, section):
            same = config.settled({f"{section}.{key}": value}, "plan")
            assert same.model_dump() == config.model_dump()
            assert same.sources == {f"{section}.{key}": "plan"}
