"""What the tracer sees: sizes and order on hand-made callables, and fake against real runs.

The fake twin of a policy has every tensor replaced by a fake CPU tensor; the code that runs is the
product's own.
"""

import copy
import gc
import weakref

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from lowmem_grpo.grpo.objective import Objective
from lowmem_grpo.grpo.optimizer import build_optimizer
from lowmem_grpo.grpo.packing import pack
from lowmem_grpo.grpo.update import Scoring, accumulate, apply_update, score_reference
from lowmem_grpo.memory.components import COMPONENTS, component
from lowmem_grpo.memory.simulate import simulate
from lowmem_grpo.memory.trace import Recorder, phase, trace
from lowmem_grpo.policy.base import AdapterSettings
from lowmem_grpo.policy.integrity import named_tensors
from lowmem_grpo.policy.load import load_policy
from tests.grpo.rollouts import make_groups

MODES = pytest.mark.parametrize("fake", [False, True], ids=["real", "fake"])


def record(step, fake, **options):
    if not fake:
        return trace(step, 1, **options)
    with FakeTensorMode():
        return trace(step, 1, **options)


def told(events):
    """("+" or "-", bytes), and that each free ends what was allocated."""
    live = {}
    for event in events:
        if event.action == "alloc":
            assert event.size > 0
            assert event.id not in live
            live[event.id] = event.size
        else:
            assert live.pop(event.id) == event.size
    return [("+" if event.action == "alloc" else "-", event.size) for event in events]


@MODES
def test_allocations_and_frees_in_order(fake):
    def step():
        a = torch.zeros(10)
        b = a + 1.0
        del a
        c = torch.cat([b, b])
        del b
        return c.double()

    expected = [("+", 40), ("+", 40), ("-", 40), ("+", 80), ("-", 40), ("+", 160), ("-", 80)]
    assert told(record(step, fake)) == [*expected, ("-", 160)]


@MODES
def test_views_in_place_operations_and_empty_tensors_allocate_nothing(fake):
    def step():
        a = torch.zeros(6, 4)
        views = [a[1:], a.t(), a.view(-1), a.detach(), a.unbind(0), a.expand(2, 6, 4)]
        a.add_(1.0)
        a[2].mul_(3.0)
        torch.add(a, a, out=a)
        torch.zeros(0)
        del a
        return views

    assert told(record(step, fake)) == [("+", 96), ("-", 96)]


@MODES
def test_a_storage_lives_as_long_as_its_last_view(fake):
    def step():
        a = torch.zeros(8)
        tail = a[6:]
        del a
        torch.ones(1)
        del tail
        torch.ones(2)

    steps = [("+", 32), ("+", 4), ("-", 4), ("-", 32), ("+", 8), ("-", 8)]
    assert told(record(step, fake)) == steps


@MODES
def test_constants_and_several_results(fake):
    def step():
        a = torch.tensor([3.0, 1.0, 2.0])
        return a.sort()

    found = told(record(step, fake))
    assert found[:3] == [("+", 12), ("+", 12), ("+", 24)]


@MODES
def test_gradients_are_added_in_place_as_without_a_watcher(fake):
    """Autograd adds what it alone holds in place, and keeps the first gradient of a leaf, but does
    neither while a mode is watching.
    """

    def step():
        leaf = torch.ones(10, requires_grad=True)
        for _ in range(2):
            x = leaf * 2.0
            (x * 3.0 + x * 5.0).sum().backward()
            del x

    found = told(record(step, fake))
    forward, backward = 4, 3  # two products and the one below them
    assert sum(size == 40 for sign, size in found if sign == "+") == 1 + 2 * (forward + backward)


@MODES
def test_a_gradient_that_others_hold_is_copied(fake):
    held = []

    def step():
        leaf = torch.ones(10, requires_grad=True)
        leaf.register_hook(held.append)
        (leaf * 3.0).sum().backward()
        torch.zeros(1)
        held.clear()

    # The leaf, its product, the gradient that the hook holds, the leaf's own.
    assert sum(size == 40 for sign, size in told(record(step, fake)) if sign == "+") == 4


def test_a_storage_that_is_resized_is_a_new_one():
    def step():
        a = torch.zeros(4)
        a.resize_(8)
        a.resize_(2)  # smaller: the storage stays as it is
        out = torch.empty(0)
        torch.cat([a, a], out=out)
        return out

    grown = [("+", 16), ("+", 32), ("-", 16)]
    assert told(trace(step, 1)) == [*grown, ("+", 16), ("-", 32), ("-", 16)]


def test_what_existed_before_is_left_out_unless_adopted():
    weight = torch.ones(5)
    assert told(trace(lambda: weight.view(-1).add_(1.0), 3)) == []
    with Recorder() as recorder:
        recorder.adopt([("layer.weight", weight), ("tied", weight.view(5, 1))])
        number = recorder.add(1000, component="optimizer")
        weight + 1.0
        recorder.remove(number)
    found = [(e.action, e.size, e.component) for e in recorder.events]
    assert found == [
        ("alloc", 20, "base_weights"),
        ("alloc", 1000, "optimizer"),
        ("alloc", 20, "other"),
        ("free", 20, "other"),
        ("free", 1000, "optimizer"),
    ]


def test_after_the_block_nothing_is_recorded_and_nothing_was_kept_alive():
    kept = torch.zeros(3)
    with Recorder() as recorder:
        inside = kept + 1.0
        gone = weakref.ref(kept.mul(2.0).untyped_storage())
        assert gone() is None
    count = len(recorder.events)
    watch = weakref.ref(inside.untyped_storage())
    del inside
    assert watch() is None
    torch.zeros(3)
    assert len(recorder.events) == count
    assert told(recorder.events)[0] == ("+", 12)


def test_the_recorder_ends_when_the_block_raises():
    def fail():
        torch.zeros(3)
        raise RuntimeError("as asked")

    hooks = torch.nn.modules.module._global_forward_pre_hooks
    with pytest.raises(RuntimeError, match="as asked"):
        trace(fail)
    assert not hooks
    assert told(trace(lambda: torch.zeros(2), 1)) == [("+", 8), ("-", 8)]


def test_it_is_called_by_the_name_that_others_use():
    import lowmem_grpo.memory

    step = torch.zeros
    assert told(lowmem_grpo.memory.trace(lambda: step(2), iterations=1)) == [("+", 8), ("-", 8)]
    with pytest.raises(AttributeError, match="no attribute 'traces'"):
        _ = lowmem_grpo.memory.traces


def test_no_iterations_are_refused():
    with pytest.raises(ValueError, match="iterations is 0"):
        trace(lambda: None, 0)


def test_only_one_kind_of_device():
    def step():
        return torch.zeros(3, device="meta"), torch.zeros(4)

    assert told(trace(step, 1)) == [("+", 16), ("-", 16)]
    assert told(trace(step, 1, device_type="cuda")) == []


class Layer(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.up = torch.nn.Linear(8, 16)
        self.down = torch.nn.Linear(16, 8)

    def forward(self, x):
        return x + self.down(self.up(x).relu())


class Stack(torch.nn.Module):
    """Two layers in a row, recomputed in backward or not."""

    def __init__(self, recompute=False):
        super().__init__()
        self.layers = torch.nn.ModuleList([Layer(), Layer()])
        self.recompute = recompute

    def forward(self, x):
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=False) if self.recompute else layer(x)
        return x


def stack_step(recompute):
    model = Stack(recompute)
    optimizer = torch.optim.AdamW(model.parameters(), foreach=True)
    x = torch.zeros(5, 8)

    def step():
        with phase("update"):
            model(x).square().sum().backward()
        with phase("optimizer"):
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0, foreach=True)
            optimizer.step()
            optimizer.zero_grad()

    return model, step


@pytest.mark.parametrize("recompute", [False, True])
def test_a_step_of_a_model_on_fake_and_real_tensors_is_the_same(recompute):
    model, step = stack_step(recompute)
    real = trace(step, 2, modules=model)
    with FakeTensorMode():
        model, step = stack_step(recompute)
        fake = trace(step, 2, modules=model)
    assert fake == real
    told(real)
    assert {event.phase for event in real} == {"update", "optimizer"}
    assert {event.component for event in real} <= set(COMPONENTS)


def test_modules_in_forward_and_backward():
    model, step = stack_step(False)
    events = trace(step, 1, modules=model)
    modules = [e.module for e in events if e.phase == "update" and e.action == "alloc"]
    forward = ["layers.0.up", "layers.0", "layers.0.down", "layers.0"]
    forward += ["layers.1.up", "layers.1", "layers.1.down", "layers.1"]
    assert modules[:8] == forward
    assert modules[8:10] == ["", ""]  # square, sum
    backward = [name for name in modules[10:] if name]
    assert backward[0] == "layers.1.down"
    assert backward[-1] == "layers.0.up"
    assert sorted(set(backward), reverse=True) == sorted(set(forward), reverse=True)


def test_components_of_an_update():
    """5 x 8 floats between the layers; what the last one returns is gone when backward needs it."""
    for recompute, kept in ((False, "activations"), (True, "checkpoints")):
        model, step = stack_step(recompute)
        with Recorder(modules=model) as recorder:
            recorder.adopt(named_tensors(model))
            step()
        update = [e for e in recorder.events if e.phase == "update" and e.action == "alloc"]
        returned = [e for e in update if e.module == "layers.0" and e.size == 160]
        assert returned[0].component == kept
        assert [e.size for e in update if e.component == "checkpoints"] == [160] * recompute
        gradients = sum(e.size for e in update if e.component == "adapters")
        assert gradients == sum(4 * p.numel() for p in model.parameters())
        moments = [e for e in recorder.events if e.phase == "optimizer" and e.action == "alloc"]
        assert {e.component for e in moments} == {"optimizer"}
        weights = [e for e in recorder.events if e.phase == "load"]
        assert {e.component for e in weights} == {"base_weights"}


def test_components_by_phase_module_and_rule():
    assert component("update", "model.layers.0.mlp", "gemm_4bit") == "workspace"
    assert component("load", "model.layers.0.q_proj.lora_A.default") == "adapters"
    assert component("load", "model.layers.0.q_proj") == "base_weights"
    assert component("optimizer", "") == "optimizer"
    assert component("rollout", "") == "logits"
    assert component("update", "model.lm_head") == "logits"
    assert component("update", "model.layers.0.mlp") == "activations"
    assert component("", "") == "other"


def test_what_a_rollout_keeps_inside_a_layer_is_cache():
    class Caching(Stack):
        def forward(self, x):
            self.kept = []
            for layer in self.layers:
                x = layer(x)
                self.kept.append(layer.up.state)
            return x

    class Remember(torch.nn.Linear):
        def forward(self, x):
            self.state = super().forward(x)
            return self.state

    model = Caching()
    for layer in model.layers:
        layer.up = Remember(8, 16)
    with Recorder(modules=model) as recorder, torch.no_grad(), recorder.phase("rollout"):
        out = model(torch.zeros(5, 8))
    cached = [e for e in recorder.events if e.component == "kv_cache"]
    assert [(e.module, e.size) for e in cached] == [("layers.0.up", 320), ("layers.1.up", 320)]
    assert out.shape == (5, 8)


# The product's own phases, on the tensors of a loaded model and on fake ones of the same shapes.


class Reads(TorchFunctionMode):
    """Every number that is read is a one: fake tensors have none."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is torch.Tensor.item:
            return 1.0
        if function is torch.Tensor.tolist:
            return [1.0] * args[0].numel()
        return function(*args, **(kwargs or {}))


def make_fake(policy):
    """Replace every tensor of a policy by a fake one; those that are tied stay tied."""
    made = {}

    def fake(tensor):
        if id(tensor) not in made:
            twin = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)
            if isinstance(tensor, torch.nn.Parameter):
                twin = torch.nn.Parameter(twin, tensor.requires_grad)
            if hasattr(tensor, "quant_state"):
                twin.quant_state = fake_state(tensor.quant_state)
            made[id(tensor)] = twin, tensor  # the original stays, so that its id is not used again
        return made[id(tensor)][0]

    def fake_state(state):
        twin = copy.copy(state)
        for name, value in vars(state).items():
            if isinstance(value, torch.Tensor):
                setattr(twin, name, torch.empty(value.shape, dtype=value.dtype))
        if state.state2 is not None:
            twin.state2 = fake_state(state.state2)
        return twin

    for module in policy.model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                tensors[name] = None if tensor is None else fake(tensor)
    policy.head_weight_VD = policy.causal_lm.get_output_embeddings().weight


def record_step(policy, groups, max_tokens, checkpointing):
    """Two steps of reference, update and optimizer."""
    parameters = policy.adapter_parameters()
    optimizer = build_optimizer(
        parameters.values(), optim="adamw_torch", learning_rate=1e-3, betas=(0.9, 0.99), eps=1e-8,
        weight_decay=0.01,
    )  # fmt: skip
    weights = [0.1] * sum(len(group.rollouts) for group in groups)
    scoring = Scoring(temperature=0.9, end_ids=(0,))
    layout = {"max_tokens": max_tokens, "min_completion_length": 2}
    gc.collect()
    with Recorder(modules=policy.model) as recorder:
        recorder.adopt(named_tensors(policy.model))
        for _ in range(2):
            with phase("reference"):
                score_reference(policy, pack(groups, weights, **layout), scoring, lambda n: None)
            with phase("update"):
                accumulate(
                    policy, pack(groups, weights, **layout), scoring,
                    Objective(epsilon=0.2, epsilon_high=0.28, beta=0.04),
                    checkpointing=checkpointing,
                )  # fmt: skip
            with phase("optimizer"):
                apply_update(
                    list(parameters.values()), optimizer, learning_rate=1e-3, max_grad_norm=1.0
                )
    return recorder.events


def peaks(events):
    """Most bytes allocated in each phase."""
    timeline, found = simulate(events).timeline.allocated, {}
    for event, allocated in zip(events, timeline, strict=True):
        found[event.phase] = max(found.get(event.phase, 0), allocated)
    return found


def fake_and_real(name, dtype, cases):
    """For each (shape, max_tokens, checkpointing): the events on fake and on real tensors."""
    policy = load_policy(
        str(name), device="cpu", dtype=dtype, attention="sdpa", seed=0, tile_tokens=64,
        tile_vocab=5000, adapters=AdapterSettings(r=4, lora_alpha=8),
    )  # fmt: skip
    # The steps write into their groups, so each run has its own.
    real = [record_step(policy, make_groups(shape, vocab=100), *how) for shape, *how in cases]
    made = [make_groups(shape, vocab=100) for shape, *_ in cases]
    with FakeTensorMode(), Reads():
        make_fake(policy)
        fake = [
            record_step(policy, groups, *how) for groups, (_, *how) in zip(made, cases, strict=True)
        ]
    return list(zip(fake, real, strict=True))


@pytest.mark.parametrize(
    "dtype", [pytest.param(torch.float32, marks=pytest.mark.slow), torch.bfloat16]
)
def test_the_phases_of_a_tiny_model_to_the_byte(tiny_model_dir, dtype):
    cases = [([(5, [4, 4])], 24, True)]
    if dtype == torch.float32:
        cases += [([(7, [5, 3, 1]), (4, [6, 6])], 24, checkpointing) for checkpointing in (0, 1)]
    for fake, real in fake_and_real(tiny_model_dir, dtype, cases):
        told(real)
        assert fake == real
        assert set(peaks(real)) == {"load", "reference", "update", "optimizer"}


@pytest.mark.slow
def test_the_phases_of_the_demo_model(demo_model):
    shapes = [[(40, [60, 50, 20, 60]), (30, [60] * 4)], [(100, [30] * 8)]]
    cases = [(shape, 400, True) for shape in shapes] + [(shapes[0], 400, False)]
    for fake, real in fake_and_real(demo_model, torch.bfloat16, cases):
        found, expected = peaks(fake), peaks(real)
        for name in ("reference", "update", "optimizer"):
            print(name, found[name], expected[name])
            assert found[name] == pytest.approx(expected[name], rel=0.01)
        assert fake == real
