"""The phase of reward models in plans: what it takes, where, and what does not fit. A run that is
held to such a plan: tests/run/test_reward_model.py.
"""

import json
from functools import cache

import pytest
from transformers import AutoConfig

from lowmem_grpo.errors import ModelError
from lowmem_grpo.memory import reward_phase
from lowmem_grpo.memory.card import PlanCard
from lowmem_grpo.memory.plan import Planner
from lowmem_grpo.memory.reward_phase import heaviest, rows_of
from lowmem_grpo.memory.settle import settle
from lowmem_grpo.rewards.model import Batch
from tests.memory.test_plan import GIB, MODEL, configured, phase
from tests.runs import TINY, call
from tests.tiny import make_tiny_reward_model

MIB = 2**20
CARD = PlanCard("A card", 8 * GIB, (8, 9), host_bytes=GIB)
PINNED = [
    "--set", "model.compute_dtype=bfloat16", "--set", "rollout.max_prompt_length=30",
    "--set", "memory.micro_batch_tokens=60", "--set", "memory.gradient_checkpointing=false",
    "--set", "memory.mlp_tile_tokens=0", "--set", "memory.rollout_batch_size=8",
]  # fmt: skip
SHAPE = {
    **MODEL, "num_hidden_layers": 9, "num_labels": 1, "max_position_embeddings": 4096,
    "architectures": ["LlamaForSequenceClassification"],
}  # fmt: skip


def written(directory, **changes):
    """A directory with a config.json, which is all that a plan reads."""
    fields = {**SHAPE, **changes}
    kind = fields.pop("model_type")
    AutoConfig.for_model(kind, **fields).save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    directory = tmp_path_factory.mktemp("configured")
    (directory / "config.json").write_text(json.dumps(MODEL))
    return directory


@pytest.fixture(scope="module")
def reward(tmp_path_factory):
    return written(tmp_path_factory.mktemp("reward"))


@cache
def planner(model, where):
    """One for each card, and one set of traces for all: the cards differ in their memory alone."""
    found = Planner(configured(model), where)
    if where != CARD:
        found.phases = planner(model, CARD).phases
    return found


def planned(model, *specs, card=CARD):
    return planner(model, card).plan(configured(model, rewards__functions=list(specs)))


def test_on_a_card_the_weights_are_there_while_it_scores_and_on_the_host_otherwise(model, reward):
    plain, plan = planned(model), planned(model, f"model:{reward}")
    assert [p.name for p in plan.phases][:4] == ["load", "rollout", "reward", "reference"]
    size, wide = SHAPE["hidden_size"], SHAPE["intermediate_size"]
    shapes = [size * size, size * size, size * size // 2, size * size // 2, *[size * wide] * 3]
    packed = SHAPE["num_hidden_layers"] * sum(shapes) * (0.5 + 1 / 64 + 4 / 64 / 256)
    weights = packed + SHAPE["vocab_size"] * size * 2
    scoring = phase(plan, "reward")
    assert scoring.components["reward_model"] == pytest.approx(weights, rel=0.03)
    assert scoring.components["base_weights"] == phase(plan, "update").components["base_weights"]
    assert plan.host_bytes - plain.host_bytes == pytest.approx(weights, rel=0.03)
    for name in ("rollout", "reference", "update", "optimizer"):
        assert phase(plan, name).components["reward_model"] == 0
        one, other = (phase(p, name).peak_allocated_bytes for p in (plan, plain))
        assert one == other, name
    assert "lie in host memory" in plan.verdict()
    assert "of 640 tokens" in plan.reasons["reward"]  # twice 64 + 256


def test_a_few_layers_stand_for_all(model, reward, monkeypatch):
    few = planned(model, f"model:{reward}").phases
    monkeypatch.setattr(reward_phase, "alike", lambda config: False)
    planner(model, CARD).phases._rewards._loaded.clear()
    planner(model, CARD).phases._rewards.forget()
    assert few == planned(model, f"model:{reward}").phases


def test_larger_batches_take_more_and_two_models_come_one_after_the_other(model, reward):
    def scoring(*specs):
        return phase(planned(model, *specs), "reward").peak_allocated_bytes

    small, large = f"model:{reward},batch=1", f"model:{reward},batch=8192"
    assert scoring(small) < scoring(f"model:{reward}") < scoring(large)
    assert scoring(small) < scoring(f"{small},max=4000")
    assert scoring(small, large) == scoring(large)
    both = planned(model, small, large).host_bytes
    assert both > planned(model, large).host_bytes


@pytest.mark.parametrize("padded", [False, True])
def test_a_mask_is_made_where_rows_are_padded(model, reward, padded):
    config = configured(model, rewards__functions=[f"model:{reward}"])
    rewards = planner(model, CARD).phases._rewards
    rewards.loads(config)
    (part,) = rewards.scores(config, ((Batch(2, 301, padded),),))
    sizes = {event.size for event in part.events if event.component == "activations"}
    assert (2 * 301 * 301 in sizes) is padded


def test_what_does_not_fit_names_the_reward_model(tmp_path, model):
    large = written(tmp_path / "large", hidden_size=2048, intermediate_size=8192)
    tight = PlanCard("Tight", 1200 * MIB, (8, 9), host_bytes=GIB)
    assert planned(model, card=tight).fits
    plan = planned(model, f"model:{large},batch=16384", card=tight)
    assert not plan.fits
    assert "mostly for reward" in plan.verdict()
    assert "lower batch= and max= of the reward model" in plan.verdict()
    assert planned(model, f"model:{large},batch=1,max=64", card=tight).fits
    no_room = PlanCard("Without a host", 8 * GIB, (8, 9), host_bytes=100 * MIB)
    assert planned(model, card=no_room).fits
    plan = planned(model, f"model:{large}", card=no_room)
    assert not plan.fits
    assert "of host memory would be taken" in plan.verdict()
    assert "take a smaller reward model" in plan.verdict()


def test_nothing_is_lowered_where_a_reward_model_is_what_is_too_much(tmp_path, model):
    large = written(tmp_path, hidden_size=2048, intermediate_size=8192)
    tight = PlanCard("Tight", 1200 * MIB, (8, 9), host_bytes=GIB)
    config = configured(
        model, memory__micro_batch_tokens="auto", rewards__functions=[f"model:{large},batch=16384"]
    )
    settled, plan = settle(planner(model, tight), config)
    assert not plan.fits
    assert settled.memory.micro_batch_tokens > 64 + 255


@pytest.mark.parametrize("kind", ["gpt2", "deberta-v2"])
def test_other_architectures_can_be_planned(model, tmp_path, kind):
    written(tmp_path, model_type=kind, hidden_size=64, pooler_hidden_size=64)
    plan = planned(model, f"model:{tmp_path},max=40,batch=90")
    assert phase(plan, "reward").components["reward_model"] > 0
    assert phase(plan, "reward").components["activations"] > 0


def test_a_model_that_is_none_is_refused(model, tmp_path):
    written(tmp_path, architectures=["LlamaForCausalLM"])
    with pytest.raises(ModelError, match="which scores nothing"):
        planned(model, f"model:{tmp_path}")


def test_the_heaviest_batches_are_of_the_most_tokens_or_the_largest_mask():
    met = {Batch(1, 90, False), Batch(30, 3, True), Batch(2, 40, True), Batch(9, 2, False)}
    found = heaviest(met)
    assert found[:2] == (Batch(1, 90, False), Batch(30, 3, True))
    assert set(found) == {Batch(1, 90, False), Batch(30, 3, True), Batch(2, 40, True)}
    assert [len(row) for row in rows_of(Batch(3, 5, True))] == [5, 4, 4]
    assert [len(row) for row in rows_of(Batch(2, 5, False))] == [5, 5]


def test_on_a_cpu_the_phase_for_real_takes_what_was_planned(tiny_model_dir, tmp_path):
    kinds = {"llama": "max=120,batch=250", "bert": "max=70,batch=100"}
    for kind in kinds:
        make_tiny_reward_model(tmp_path / kind, kind, num_hidden_layers=6)
    specs = [f"model:{tmp_path / kind},{options}" for kind, options in kinds.items()]
    result = call(
        "memory", "profile", "--model", tiny_model_dir, *TINY, *PINNED,
        "--set", f"rewards.functions={json.dumps(specs)}", "--json",
    )  # fmt: skip
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    rows = {row["phase"]: row for row in found["comparison"]}
    assert list(rows) == ["load", "rollout", "reward", "reference", "update", "optimizer"]
    for name, row in rows.items():
        off = row["predicted_allocated_bytes"] - row["measured_allocated_bytes"]
        assert abs(off) <= 4096, name  # a table of bitsandbytes' for each of two steps
    # The host is the device: the weights are there all the time.
    held = {p["name"]: p["components"]["reward_model"] for p in found["plan"]["phases"]}
    assert held.pop("load") >= held["reward"] > 0
    assert len(set(held.values())) == 1
    assert found["plan"]["host_bytes"] < held["reward"]
