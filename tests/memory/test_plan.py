"""Plans of tiny models: what they must agree with, what moves them, and what is refused.

The 8B model is planned in a test of its own (slow).
"""

import json
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from lowmem_grpo.config import build_config
from lowmem_grpo.errors import ConfigError, ModelError
from lowmem_grpo.grpo.packing import pack
from lowmem_grpo.hardware import Machine
from lowmem_grpo.memory.card import PlanCard, plan_card
from lowmem_grpo.memory.components import COMPONENTS
from lowmem_grpo.memory.decoding import decode
from lowmem_grpo.memory.phases import PHASES, Phases
from lowmem_grpo.memory.plan import Planner
from lowmem_grpo.memory.rules import CudaRules
from lowmem_grpo.memory.settle import settle
from lowmem_grpo.memory.shapes import Wave, fullest, groups_of, longest, pieces
from lowmem_grpo.memory.simulate import simulate
from lowmem_grpo.memory.trace import Recorder
from lowmem_grpo.memory.unreal import Values
from lowmem_grpo.policy.base import AdapterSettings
from lowmem_grpo.policy.integrity import named_tensors
from lowmem_grpo.policy.load import load_policy
from lowmem_grpo.policy.skeleton import read_model_config, skeleton_policy, without_weights
from lowmem_grpo.profiles import load_profile
from lowmem_grpo.rollout.sampler import Request, sample
from lowmem_grpo.rollout.sampling import Sampling
from lowmem_grpo.setup import sampling_of
from tests.runs import call
from tests.tiny import SHAPE

CONFIGS = Path(__file__).with_name("configs")
UNASKED = [name for name in PHASES if name not in ("reward", "evaluation")]
SAMPLING = (".sampling", ".together")
GIB = 1024**3
CARD = PlanCard("A card", 8 * GIB, (8, 9))
HOST = Machine("cpu", "A host", 16 * GIB, None, "A host", 2, 16 * GIB, None, {})
MODEL = {
    "model_type": "llama", **SHAPE, "vocab_size": 4096, "hidden_size": 256,
    "intermediate_size": 1024, "tie_word_embeddings": False,
}  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    directory = tmp_path_factory.mktemp("configured")
    (directory / "config.json").write_text(json.dumps(MODEL))
    return directory


def configured(model, **settings):
    sections = {
        "model": {"name": str(model)},
        "rollout": {
            "num_generations": 4,
            "problems_per_step": 2,
            "max_prompt_length": 64,
            "max_completion_length": 256,
        },
        "memory": {
            "micro_batch_tokens": 2048,
            "rollout_batch_size": 8,
            "gradient_checkpointing": True,
            "activation_offloading": False,
            "offload_overlap": False,
            "mlp_tile_tokens": 0,
            "kv_cache_bits": 16,
            "embedding_on_host": False,
            "logits_tile_tokens": 1024,
            "logits_tile_vocab": 16384,
        },
    }
    for key, value in settings.items():
        section, name = key.split("__")
        sections.setdefault(section, {})[name] = value
    return build_config([("test", sections)])


def planned(model, card=CARD, **settings):
    config = configured(model, **settings)
    return settle(Planner(config, card), config)[1]


def phase(plan, name):
    return next(phase for phase in plan.phases if phase.name == name)


@pytest.fixture(scope="module")
def plan(model):
    return planned(model)


def test_phases_and_components(plan):
    assert [phase.name for phase in plan.phases] == UNASKED
    for found in plan.phases:
        assert set(found.components) == set(COMPONENTS)
        assert sum(found.components.values()) == found.peak_allocated_bytes
        assert min(found.components.values()) >= 0
        assert found.peak_allocated_bytes <= found.peak_reserved_bytes
        assert found.components["other"] < 0.02 * found.peak_allocated_bytes
    assert plan.peak_reserved_bytes == max(p.peak_reserved_bytes for p in plan.phases)
    assert plan.fits
    assert plan.headroom_bytes == 8 * GIB - 600 * 2**20 - plan.peak_reserved_bytes


def test_the_components_are_what_can_be_counted(plan, model):
    config = configured(model)
    layers, size, rows = MODEL["num_hidden_layers"], MODEL["hidden_size"], 8
    head = size // MODEL["num_attention_heads"]
    per_token = 2 * MODEL["num_key_value_heads"] * head * 2  # bytes in one layer
    cache = layers * per_token * (rows * 255 + 2 * 64)
    assert phase(plan, "rollout").components["kv_cache"] == pytest.approx(cache, rel=0.01)
    projected = MODEL["num_key_value_heads"] * head
    shapes = [(size, size), (size, projected), (size, projected), (size, size)]
    shapes += [(size, MODEL["intermediate_size"])] * 3
    adapters = layers * sum((a + b) * config.lora.r * 4 for a, b in shapes)
    optimizer = phase(plan, "optimizer").components
    assert phase(plan, "load").components["adapters"] == pytest.approx(adapters, rel=0.02)
    assert optimizer["adapters"] == pytest.approx(2 * adapters, rel=0.02)  # and gradients
    assert plan.host_bytes == pytest.approx(3 * adapters, rel=0.01)
    packed = layers * sum(a * b for a, b in shapes) * (0.5 + 1 / 64 + 4 / 64 / 256)
    base = packed + 2 * MODEL["vocab_size"] * size * 2
    assert optimizer["base_weights"] == pytest.approx(base, rel=0.02)
    assert phase(plan, "update").components["checkpoints"] >= layers * 2048 * size * 2 * 0.7


def test_the_skeleton_is_what_loading_builds(tiny_model_dir):
    lora = AdapterSettings(r=4, lora_alpha=8)
    how = {"attention": "sdpa", "tile_tokens": 64, "tile_vocab": 64}
    real = load_policy(
        str(tiny_model_dir), device="cpu", dtype=torch.bfloat16, adapters=lora, seed=0, **how
    )
    model = without_weights(read_model_config(str(tiny_model_dir)), torch.bfloat16, lora)
    skeleton = skeleton_policy(model, device="meta", dtype=torch.bfloat16, **how)

    def told(policy):
        return {name: (tuple(t.shape), t.dtype) for name, t in named_tensors(policy.model)}

    assert told(skeleton) == told(real)
    names = [n for n, p in skeleton.model.named_parameters() if p.requires_grad]
    assert names == [n for n, p in real.model.named_parameters() if p.requires_grad]
    assert type(skeleton.model) is type(real.model)
    kinds = [
        # Which layers sample together is seen in a forward pass, which only the real one has made.
        [type(m) for name, m in policy.model.named_modules() if not name.endswith(SAMPLING)]
        for policy in (skeleton, real)
    ]
    assert kinds[0] == kinds[1]


def test_the_restated_loop_allocates_what_the_sampler_does(model):
    config = configured(model, rollout__max_completion_length=3, rollout__min_completion_length=1)
    lora = AdapterSettings(r=4, lora_alpha=8)

    def recorded(run):
        built = without_weights(read_model_config(str(model)), torch.bfloat16, lora)
        how = {"attention": "torch_varlen", "tile_tokens": 64, "tile_vocab": 64}
        policy = skeleton_policy(built, device="meta", dtype=torch.bfloat16, **how)
        values = Values(CudaRules(CARD))
        values.rows_per_problem = 4
        with values, Recorder(device_type="meta", rules=CudaRules(CARD)) as recorder:
            run(policy, recorder)
        usage = simulate(recorder.events)
        return [e.size for e in recorder.events if e.action == "alloc"], usage.peak_allocated

    def real(policy, recorder):
        requests = [Request([0] * 64, [np.zeros(3)] * 4)] * 2
        sampling = Sampling(min_completion_length=1, max_completion_length=3)
        with policy.as_sampler():
            sample(policy, requests, sampling, end_ids=(0,), batch_size=8)

    ours, peak = recorded(
        lambda policy, recorder: decode(
            policy,
            policy.as_sampler(),
            Wave((64, 64), 4, 3, 3),
            sampling_of(config, "rollout"),
            recorder,
        )
    )
    theirs, real_peak = recorded(real)
    assert ours == theirs
    assert peak == real_peak


def test_a_second_step_finds_what_the_first_left(model):
    config = configured(model)
    phases = Phases(
        config, read_model_config(str(model)), CARD, dtype=torch.bfloat16, attention="sdpa"
    )
    traced = phases.trace(config, longest(config))
    usage = simulate(traced.events)
    ends = [
        place
        for place, a in enumerate(traced.events)
        if a.action == "empty_cache" and a.phase == "optimizer"
    ]
    assert len(ends) == 2
    after = [usage.timeline.allocated[place] for place in ends]
    assert after[0] == after[1]


def test_a_head_in_eight_bits_is_sampled_by_the_runs_tiles(model):
    built, wave = read_model_config(str(model)), Wave((64, 64), 4, 3, 3)
    config = configured(model, model__lm_head_bits=8)
    phases = Phases(config, built, CARD, dtype=torch.bfloat16, attention="torch_varlen")

    def events(tile: int) -> int:
        key = "memory.logits_tile_vocab"
        return len(phases.alone(config.settled({key: tile}, "test"), wave).events)

    whole, halves, quarters = events(4096), events(2048), events(1024)
    phases.alone(config, (((2, (2,)),),))  # an update between has the configuration's own tiles
    eighths = events(512)
    tile = halves - whole
    assert tile > 0
    assert (quarters - whole, eighths - whole) == (3 * tile, 7 * tile)


@pytest.mark.parametrize(
    ("change", "grows"),
    [
        ({"rollout__max_completion_length": 512}, "rollout"),
        ({"rollout__max_prompt_length": 512}, "rollout"),
        ({"memory__rollout_batch_size": 4}, None),
        ({"memory__micro_batch_tokens": 4096, "rollout__max_completion_length": 512}, "update"),
        ({"memory__gradient_checkpointing": False}, "update"),
        ({"lora__r": 64}, "optimizer"),
    ],
)
def test_more_takes_more(plan, model, change, grows):
    other = planned(model, **change)
    if grows is None:
        shrunk = phase(other, "rollout").peak_allocated_bytes
        assert shrunk < phase(plan, "rollout").peak_allocated_bytes
    else:
        grown = phase(other, grows).peak_allocated_bytes
        assert grown > phase(plan, grows).peak_allocated_bytes


def test_without_a_penalty_there_is_no_reference(model):
    assert "reference" not in [p.name for p in planned(model, grpo__beta=0.0).phases]


def test_a_reference_that_moves_is_half_an_adapter_more_in_every_phase(plan, model):
    moves = planned(model, grpo__sync_ref_model=True)
    adapters = phase(plan, "load").components["adapters"]
    for before, after in zip(plan.phases[1:], moves.phases[1:], strict=True):  # loading is over
        more = after.peak_allocated_bytes - before.peak_allocated_bytes
        assert more == pytest.approx(adapters / 2, rel=0.05), after.name  # in 16 bits, not in 32
        assert after.components["adapters"] >= before.components["adapters"] + 0.9 * more
    assert moves.host_bytes - plan.host_bytes == pytest.approx(adapters / 2, rel=0.05)


@pytest.mark.parametrize("optim", ["adamw_8bit", "paged_adamw_8bit"])
def test_moments_in_eight_bits(plan, model, optim):
    less = phase(planned(model, optimizer__optim=optim), "optimizer").components["optimizer"]
    assert less < phase(plan, "optimizer").components["optimizer"]


def test_a_card_without_bf16_and_flash_attention(model):
    old = PlanCard("An older card", 16 * GIB, (7, 5))
    found = planned(model, card=old)
    assert found.settings["model.compute_dtype"] == "float16"
    assert found.settings["model.attention"] == "sdpa"
    assert [p.name for p in found.phases] == UNASKED


def test_micro_batches_are_full_and_whole(model):
    for budget in (100, 700, 1500, 10_000):
        config = configured(model, memory__micro_batch_tokens=budget)
        for shape in fullest(config):
            groups = groups_of(shape)
            rows = sum(len(lengths) for _, lengths in shape)
            (batch,) = pack(groups, [0.1] * rows, max_tokens=budget)
            assert batch.tokens <= max(budget, 64 + 255)
            assert len(shape) <= 2
            assert rows <= 8
    assert batch.tokens == 2 * (64 + 4 * 255)


@pytest.mark.parametrize("budget", [1, 319, 320, 574, 575, 830, 1083, 1084, 5000])
def test_what_cutting_a_group_costs_is_told(model, budget):
    config = configured(model, memory__micro_batch_tokens=budget)
    (group,) = groups_of(((64, (256,) * 4),))
    batches = pack([group], [0.25] * 4, max_tokens=budget)
    assert pieces(config) == len(batches)
    more = sum(batch.tokens for batch in batches) - (64 + 4 * 255)
    note = planned(model, memory__micro_batch_tokens=budget).reasons["update"]
    assert ("more tokens" in note) == (more > 0)
    if more:
        assert f"cut into {len(batches)}" in note
        assert f"{100 * more / 1084:.1f}% more tokens" in note


def test_an_attention_that_pads_is_planned_for_uneven_groups(model):
    config = configured(model, rollout__num_generations=16, memory__micro_batch_tokens=400)
    even, uneven = fullest(config), fullest(config, padded=True)
    assert uneven[: len(even)] == even
    assert len(uneven) > len(even)
    for batch in uneven[len(even) :]:
        ((prompt, lengths),) = batch
        assert len(lengths) == 16
        assert prompt + sum(lengths) - 16 <= 400
        assert max(lengths) > min(lengths) == 2
    plans = [
        planned(model, model__attention=kind, rollout__num_generations=16)
        for kind in ("sdpa", "auto")
    ]
    assert (
        phase(plans[0], "update").peak_allocated_bytes
        > phase(plans[1], "update").peak_allocated_bytes
    )


def test_json_is_what_interfaces_promise(plan):
    document = json.loads(json.dumps(plan.to_json()))
    assert set(document) == {
        "model", "profile", "card", "allocator", "fits", "settings", "reasons", "context_bytes",
        "phases", "peak_reserved_bytes", "headroom_bytes", "host_bytes", "method", "timeline",
    }  # fmt: skip
    assert document["method"] == "trace"
    assert document["card"] == {"name": "A card", "memory_bytes": 8 * GIB}
    low, high = document["context_bytes"]
    assert 0 < low < high
    assert set(document["phases"][0]) == {
        "name", "peak_allocated_bytes", "peak_reserved_bytes", "components",
    }  # fmt: skip
    assert set(document["settings"]) <= set(document["reasons"])


def test_the_command(model):
    arguments = ["plan", "--model", str(model), "--profile", "rtx-3060-12gb"]
    arguments += ["--max-completion-length", "128", "--set", "memory.micro_batch_tokens=1024"]
    result = call(*arguments)
    assert result.exit_code == 0, result.stderr
    assert "Fits: " in result.stdout
    assert "rollout" in result.stdout
    result = call(*arguments, "--json")
    assert result.exit_code == 0
    assert json.loads(result.stdout)["profile"] == "rtx-3060-12gb"


def test_the_command_solves(model):
    arguments = ["plan", "--model", str(model), "--profile", "rtx-3060-12gb"]
    arguments += ["--solve", "max_completion_length", "--max-prompt-length", "200"]
    result = call(*arguments, "--json")
    assert result.exit_code == 0, result.stderr
    document = json.loads(result.stdout)
    # No window in the configuration but Llama's own, and a card that is large for this model.
    assert document["settings"]["rollout.max_completion_length"] == 512 - 200
    assert document["reasons"]["rollout.max_completion_length"] == (
        "the largest that fits NVIDIA GeForce RTX 3060"
    )
    assert document["solved"] == {"max_completion_length": 512 - 200}
    first = call(*arguments).stdout.splitlines()[0]
    assert first == "max_completion_length = 312 (the largest that fits NVIDIA GeForce RTX 3060)"
    result = call(*arguments, "--max-prompt-length", "600")
    assert result.exit_code == 2
    assert "rollout.max_prompt_length = 600 leaves nothing of the model's window" in result.stderr
    result = call("plan", "--model", str(model), "--solve", "beta")
    assert result.exit_code == 2
    assert "num_generations" in result.stderr


def test_the_machine_at_hand_is_planned_for_without_a_profile(model):
    result = call("plan", "--model", str(model), "--max-completion-length", "16", "--json")
    assert result.exit_code == 0, result.stderr
    document = json.loads(result.stdout)
    assert document["profile"] == "cpu"
    assert document["card"]["memory_bytes"] > GIB


def test_what_does_not_fit(model, tmp_path):
    small = tmp_path / "small.toml"
    small.write_text(
        '[card]\nname = "Small"\nvisible_mib = 640\ncompute_capability = [8, 6]\n'
        "[rollout]\nmax_prompt_length = 64\nmax_completion_length = 128\n"
        "[memory]\nmicro_batch_tokens = 2048\n"
    )
    result = call("plan", "--model", model, "--profile", small, "--json")
    assert result.exit_code == 3, result.stderr
    document = json.loads(result.stdout)
    assert not document["fits"]
    assert document["headroom_bytes"] < 0
    assert "are missing" in result.stderr
    assert f"{-document['headroom_bytes'] / GIB:.2f} GiB" in result.stderr


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": None}, "has no hidden_size"),
        ({"num_hidden_layers": 0}, "num_hidden_layers = 0 must be"),
        ({"vocab_size": "many"}, "vocab_size = 'many' must be"),
        ({"model_type": None}, "has no model_type"),
        ({"model_type": "llamma"}, "does not know the architecture llamma"),
        ({"num_attention_heads": 3}, "heads"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantised by gptq"),
    ],
)
def test_bad_configurations(tmp_path, change, message):
    fields = {key: value for key, value in {**MODEL, **change}.items() if value is not None}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    result = call("plan", "--model", tmp_path, "--profile", "rtx-4090-24gb")
    assert result.exit_code == 2, result.stderr
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert not result.stdout


def test_no_json_no_model_no_card(tmp_path, model):
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelError, match="cannot read"):
        read_model_config(str(tmp_path))
    with pytest.raises(ModelError, match="no such file"):
        read_model_config(str(tmp_path / "absent.json"))
    with pytest.raises(ModelError, match="give a local directory"):
        read_model_config("nobody/nothing")
    with pytest.raises(ConfigError, match="a card of 0 bytes"):
        PlanCard("None", 0, (8, 9))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama-3.1-8b", "qwen2.5-7b"])
def test_a_large_model(name):
    profile = load_profile("rtx-4090-24gb")
    sections = {**profile.settings, "model": {"name": str(CONFIGS / f"{name}.json")}}
    config = build_config([("profile", sections)])
    begun = time.perf_counter()
    planner = Planner(config, plan_card(profile, HOST))
    found = settle(planner, config)[1]
    print(found.verdict(), f"{time.perf_counter() - begun:.1f} s")
    assert found.fits
