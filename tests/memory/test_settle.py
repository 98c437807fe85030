"""What the plan chooses for settings on "auto", and the largest run that fits."""

import dataclasses
import json
from functools import cache

import pytest

from lowmem_grpo.config import build_config
from lowmem_grpo.errors import PlanError
from lowmem_grpo.memory.admit import admit, refusal, solved
from lowmem_grpo.memory.card import MARGIN, PlanCard
from lowmem_grpo.memory.largest import _last_below_one, largest
from lowmem_grpo.memory.plan import Planner
from lowmem_grpo.memory.settle import (
    Search,
    settle,
    settle_evaluation,
    settle_sampling,
)
from lowmem_grpo.memory.shapes import equal_parts, rollout_sizes
from lowmem_grpo.policy.activations import PAGE_BYTES
from tests.memory.test_plan import GIB, MODEL, phase

MIB = 2**20
WINDOW, LAYERS = 4096, 30


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    directory = tmp_path_factory.mktemp("configured")
    fields = {**MODEL, "max_position_embeddings": WINDOW, "num_hidden_layers": LAYERS}
    (directory / "config.json").write_text(json.dumps(fields))
    return directory


def card(mib, **changes):
    """A card that has so many MiB for tensors."""
    whole = int((mib + 600) / (1 - MARGIN)) + 1
    figures = {"multiprocessors": 128, **changes}
    return PlanCard(f"A card for {mib} MiB", whole * MIB, (8, 9), **figures)


def configured(model, **settings):
    sections = {"model": {"name": str(model)}, "rollout": {"max_prompt_length": 64}}
    for key, value in settings.items():
        section, name = key.split("__")
        sections.setdefault(section, {})[name] = value
    return build_config([("test", sections)])


@cache
def planner(model, where):
    """One for each card, and one set of traces for all: the cards here differ in their memory
    alone, which no trace looks at.
    """
    found = Planner(configured(model), where)
    found.phases = phases(model)
    return found


@cache
def phases(model):
    return Planner(configured(model), LARGE).phases


def settled(model, where, **settings):
    return settle(planner(model, where), configured(model, **settings))


SMALL, LARGE = card(150), card(8000)
TIGHT = card(108)  # on which not every completion of the window fits
LONG = {"rollout__max_completion_length": 600}


def test_with_memory_to_spare_nothing_is_saved(model):
    config, plan = settled(model, LARGE)
    m, r = config.memory, config.rollout
    assert plan.fits
    assert m.gradient_checkpointing is False
    assert m.activation_offloading is False
    assert m.rollout_batch_size == r.problems_per_step * r.num_generations
    whole = r.problems_per_step * (64 + r.num_generations * (r.max_completion_length - 1))
    assert m.micro_batch_tokens == whole
    assert config.eval.batch_size == "auto"  # no evaluation: nothing to choose for


@pytest.mark.slow
def test_with_less_memory_less_is_done_at_once_and_it_still_fits(model):
    found = [settled(model, where, **LONG) for where in (LARGE, card(300), SMALL)]
    assert all(plan.fits for _, plan in found)
    rows = [config.memory.rollout_batch_size for config, _ in found]
    tokens = [config.memory.micro_batch_tokens for config, _ in found]
    assert rows == sorted(rows, reverse=True)
    assert tokens == sorted(tokens, reverse=True)
    assert rows[0] > rows[-1]
    assert tokens[0] > tokens[-1]
    assert [config.memory.gradient_checkpointing for config, _ in found][-1] is True


@pytest.mark.slow
def test_the_next_larger_value_would_not_fit(model):
    config, chosen = settled(model, SMALL, **LONG)
    assert chosen.headroom_bytes >= SMALL.margin_bytes
    r = config.rollout
    sizes = rollout_sizes(r.problems_per_step, r.num_generations)
    more = next(n for n in sizes if n > config.memory.rollout_batch_size)
    plan = planner(model, SMALL).plan(config.settled({"memory.rollout_batch_size": more}, "test"))
    room = SMALL.available_bytes - SMALL.margin_bytes
    assert phase(plan, "rollout").peak_reserved_bytes > room


@pytest.mark.slow
def test_reasons_say_only_what_was_tried(model):
    pinned = {"memory__activation_offloading": True}
    config, _ = settled(model, LARGE, **pinned, **LONG)
    assert "on the host" in config.sources["memory.gradient_checkpointing"]
    config, plan = settled(model, card(10), **LONG)
    assert not plan.fits
    assert "nothing fits" in config.sources["memory.gradient_checkpointing"]


@pytest.mark.slow
def test_adapters_that_do_not_fit_are_not_blamed_on_lengths(model):
    where = card(1700)  # update 1,381 MiB, optimizer 2,006
    big = configured(model, lora__r=512)
    own = Planner(big, where)
    assert largest(own, big, "max_completion_length") is None
    text = refusal(own, big, settle(own, big)[1])
    assert "lower lora.r" in text
    assert "would fit" not in text


@pytest.mark.slow
def test_what_is_pinned_stays(model):
    pinned = {
        "memory__rollout_batch_size": 3, "memory__micro_batch_tokens": 5000,
        "memory__gradient_checkpointing": True, "memory__logits_tile_vocab": 77,
    }  # fmt: skip
    config, plan = settled(model, LARGE, **pinned)
    for name, value in pinned.items():
        key = name.replace("__", ".")
        assert plan.settings[key] == value
        assert plan.reasons[key] == "test"
        assert key not in config.chosen
    assert config.sources["memory.logits_tile_tokens"].startswith("plan: ")
    assert set(config.chosen) == {
        "memory.logits_tile_tokens", "memory.activation_offloading", "memory.offload_overlap",
        "memory.mlp_tile_tokens", "memory.kv_cache_bits", "memory.embedding_on_host",
    }  # fmt: skip


@pytest.mark.slow
def test_layers_inputs_move_to_the_host_when_nothing_else_helps(model):
    long = {"rollout__max_completion_length": 3000, "rollout__num_generations": 2}
    long |= {"memory__gradient_checkpointing": True, "memory__mlp_tile_tokens": 0}
    long["memory__embedding_on_host"] = False
    kept = {"memory__activation_offloading": False}
    tokens = 64 + 3000 - 1
    pinned = tokens * LAYERS * MODEL["hidden_size"] * 2
    _, plan = settled(model, LARGE, memory__micro_batch_tokens=tokens, **kept, **long)
    needed = phase(plan, "update").peak_reserved_bytes
    where = card((needed - pinned * 2 // 3) // MIB)
    assert not settled(model, where, **kept, **long)[1].fits
    config, plan = settled(model, where, **long)
    assert plan.fits
    assert config.memory.activation_offloading is True
    assert "lie in host memory." in plan.verdict()
    rounded = -(-pinned // PAGE_BYTES) * PAGE_BYTES
    assert pinned < rounded <= plan.host_bytes < rounded + 42 * MIB
    assert phase(plan, "update").components["checkpoints"] < pinned / LAYERS * 2
    poor = dataclasses.replace(where, host_bytes=pinned // 2)
    _, plan = settled(model, poor, memory__activation_offloading=True, **long)
    assert not plan.fits
    assert "of host memory would be taken" in plan.verdict()


@pytest.mark.slow
def test_what_takes_the_least_is_tried_last_and_each_says_why(model):
    """One long completion on ever smaller cards: the settings that cost time, or change what is
    sampled from, come when nothing else is left.
    """
    long = {"rollout__max_completion_length": 3000, "rollout__num_generations": 2}
    found = [settled(model, card(mib), **long) for mib in (2000, 190, 115)]
    assert all(plan.fits for _, plan in found)
    keys = "activation_offloading", "offload_overlap", "kv_cache_bits", "embedding_on_host"
    assert [tuple(getattr(c.memory, key) for key in keys) for c, _ in found] == [
        (False, False, 16, False),
        (True, True, 16, False),
        (True, False, 8, True),
    ]
    assert [c.memory.mlp_tile_tokens for c, _ in found] == [4096, 4096, 1024]
    for config, _ in found:
        for key in (*keys, "mlp_tile_tokens"):
            assert config.sources[f"memory.{key}"].startswith("plan: ")


@pytest.mark.slow
def test_a_tied_embedding_stays_on_the_card(model, tmp_path):
    fields = json.loads((model / "config.json").read_text()) | {"tie_word_embeddings": True}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    config, _ = settle(Planner(configured(tmp_path), SMALL), configured(tmp_path))
    assert config.memory.embedding_on_host is False
    assert "head as well" in config.sources["memory.embedding_on_host"]


def test_an_evaluation_gets_its_own_batch(model):
    config, plan = settled(model, SMALL, eval__every=5, **LONG)
    assert plan.fits
    assert 1 <= config.eval.batch_size < 64
    assert phase(plan, "evaluation").peak_reserved_bytes <= SMALL.available_bytes
    assert settle_evaluation(planner(model, LARGE), configured(model)).eval.batch_size == 64
    for count in (6, 1):
        sampling = settle_sampling(planner(model, LARGE), configured(model), count)
        assert sampling.memory.rollout_batch_size == max(count, 2)


@pytest.mark.slow
def test_the_largest_completion_fits_and_a_little_more_does_not(model):
    config = configured(model)
    length = largest(planner(model, TIGHT), config, "max_completion_length")
    assert 64 < length < WINDOW - 64
    above = configured(model, rollout__max_completion_length=int(length * 1.03))
    assert Search(planner(model, TIGHT), above).smallest_share() > 1
    assert settled(model, TIGHT, rollout__max_completion_length=length)[1].fits
    longer = WINDOW - 96  # far beyond what choices leave free
    assert not settled(model, TIGHT, rollout__max_completion_length=longer)[1].fits
    assert largest(planner(model, card(10)), config, "max_completion_length") is None
    found = largest(planner(model, LARGE), config, "max_completion_length")
    assert found == WINDOW - 64


@pytest.mark.slow
def test_the_largest_group_decodes_at_once(model):
    config = configured(model, **LONG)
    size = largest(planner(model, SMALL), config, "num_generations")
    assert 2 <= size < 1024
    found = solved(planner(model, SMALL), config, "num_generations")
    assert found.rollout.num_generations == size


@pytest.mark.slow
def test_a_run_that_does_not_fit_is_refused_with_the_value_that_would(model):
    config = configured(model, rollout__max_completion_length=4000)
    with pytest.raises(PlanError, match=r"--max-completion-length (\d+) would fit") as caught:
        admit(config, TIGHT)
    assert caught.value.exit_code == 3
    length = int(str(caught.value).split()[-3])
    assert settled(model, TIGHT, rollout__max_completion_length=length)[1].fits
    with pytest.raises(PlanError, match="no completion fits"):
        admit(config, card(10))
    with pytest.raises(PlanError, match="no max_completion_length fits"):
        solved(planner(model, card(10)), config, "max_completion_length")
    pinned = configured(model, memory__rollout_batch_size=32, **LONG)
    plan = settle(planner(model, SMALL), pinned)[1]
    assert "lower memory.rollout_batch_size" in refusal(planner(model, SMALL), pinned, plan)


def test_admitting_says_what_was_chosen_and_why(model):
    said = []
    config, plan, _ = admit(configured(model), LARGE, said.append)
    assert said[0] == plan.verdict()
    assert any(
        line.startswith("memory.rollout_batch_size = 32 (plan: all completions") for line in said
    )
    assert len(said) == 1 + len(config.chosen)


def test_a_host_is_planned_for_as_well(model):
    host = PlanCard("A host", 8 * GIB, None)
    config, plan = settled(model, host, rollout__max_completion_length=20)
    assert plan.fits
    assert config.memory.activation_offloading is False
    for found in plan.phases:
        assert found.peak_reserved_bytes == found.peak_allocated_bytes
    assert plan.timeline["reserved"] is None
    assert dataclasses.asdict(plan)["card"]["compute_capability"] is None


def test_even_parts():
    assert equal_parts(8) == [1, 2, 3, 4, 8]
    assert equal_parts(1) == [1]
    assert rollout_sizes(4, 8) == [1, 2, 3, 4, 8, 16, 32]
    for problems in range(1, 6):
        for group in range(1, 9):
            sizes = rollout_sizes(problems, group)
            assert sizes == sorted(set(sizes))
            assert sizes[-1] == problems * group


@pytest.mark.parametrize("limit", [1, 2, 3, 17, 100, 4321, 99_999])
def test_the_search_finds_the_last_that_fits(limit):
    asked = []

    def share(value):
        asked.append(value)
        return 0.3 + 0.7 * value / limit if value <= limit else 1.001 + value / limit

    found = _last_below_one(share, 1, 100_000)
    assert found <= limit
    assert limit - found <= max(1, limit // 64)
    assert len(asked) < 25
    assert _last_below_one(lambda value: 0.5, 1, 100) == 100
    assert _last_below_one(lambda value: 2.0, 1, 100) is None


@pytest.mark.slow
def test_a_pool_s_groups_need_no_room_to_be_sampled(model):
    """Eight completions that no wave of the sampler holds on that card."""
    where = card(400)
    sampled = configured(model, rollout__max_completion_length=3500, grpo__old_policy="base")
    pooled = sampled.settled({"rollout.pool": "pool"}, "test")
    (share, none) = (Search(planner(model, where), c).rows_share() for c in (sampled, pooled))
    assert share > 0.0 == none
    config, plan = settle(Planner(pooled, where), pooled)
    assert "rollout" not in [phase.name for phase in plan.phases]
    assert config.memory.rollout_batch_size == 4 * 8
