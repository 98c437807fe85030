"""One step of the optimizer: clipping, refusal, the float16 scaler, its state and its schedule."""

import math

import pytest
import torch
from safetensors.torch import load_file, save_file

from lowmem_grpo.errors import ConfigError, ModelError, NonFiniteError
from lowmem_grpo.grpo import update
from lowmem_grpo.grpo.optimizer import (
    build_optimizer,
    learning_rate_at,
    load_optimizer_state,
    optimizer_state,
)
from lowmem_grpo.grpo.update import apply_update
from lowmem_grpo.memory.simulate import add_up
from lowmem_grpo.memory.trace import Recorder

# bitsandbytes keeps 8-bit moments for tensors of at least 4096 values, float32 for smaller ones.
SHAPES = {"a.weight": (64, 80), "b.weight": (16, 7), "c.weight": (67, 63)}
NAMES = list(SHAPES)


def make(optim="adamw_torch", weight_decay=0.0):
    generator = torch.Generator().manual_seed(0)
    parameters = [
        torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES.values()
    ]
    optimizer = build_optimizer(
        parameters,
        optim=optim,
        learning_rate=1.0,  # every step brings its own
        betas=(0.9, 0.99),
        eps=1e-8,
        weight_decay=weight_decay,
    )
    return parameters, optimizer


def fill(parameters, seed=0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    for parameter in parameters:
        parameter.grad = scale * torch.randn(parameter.shape, generator=generator)


def flat(tensors):
    return torch.cat([t.detach().flatten() for t in tensors])


def step(parameters, optimizer, *, learning_rate=0.01, max_grad_norm=0.0, scaler=None):
    return apply_update(
        parameters,
        optimizer,
        learning_rate=learning_rate,
        max_grad_norm=max_grad_norm,
        scaler=scaler,
    )


def test_a_step_is_adamw():
    parameters, optimizer = make(weight_decay=0.1)
    values, first, second = flat(parameters), 0.0, 0.0
    for t in range(1, 5):
        fill(parameters, seed=t)
        gradient = flat([p.grad for p in parameters])
        step(parameters, optimizer, learning_rate=0.01 * t)
        first = 0.9 * first + 0.1 * gradient
        second = 0.99 * second + 0.01 * gradient**2
        values = values * (1 - 0.01 * t * 0.1)
        root = (second / (1 - 0.99**t)).sqrt() + 1e-8
        values = values - 0.01 * t * first / (1 - 0.9**t) / root
    torch.testing.assert_close(flat(parameters), values)


def test_what_a_step_reports():
    parameters, optimizer = make()
    fill(parameters, scale=3.0)
    gradient, before = flat([p.grad for p in parameters]), flat(parameters)
    norm, change = step(parameters, optimizer, max_grad_norm=1.0)
    after = flat(parameters)
    assert norm == pytest.approx(gradient.norm().item())  # before it is clipped
    assert change == pytest.approx(((after - before).norm() / after.norm()).item(), rel=1e-5)
    assert all(p.grad is None for p in parameters)


@pytest.mark.parametrize(("limit", "factor"), [(0.0, 1.0), (1e9, 1.0), (2.0, 2.0)])
def test_gradients_are_clipped_to_the_norm(limit, factor):
    parameters, optimizer = make()
    fill(parameters)
    gradient = flat([p.grad for p in parameters])
    step(parameters, optimizer, max_grad_norm=limit)
    kept = factor / gradient.norm().item() if limit == 2.0 else 1.0
    moments = flat([optimizer.state[p]["exp_avg"] for p in parameters])
    torch.testing.assert_close(moments, 0.1 * kept * gradient, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("limit", [0.0, 1.0])
def test_a_gradient_that_is_not_finite_changes_nothing(bad, limit):
    parameters, optimizer = make()
    fill(parameters)
    step(parameters, optimizer)
    before, state = flat(parameters), optimizer_state(optimizer, NAMES)
    fill(parameters, seed=1)
    parameters[1].grad[3, 3] = bad
    with pytest.raises(NonFiniteError, match=r"is (nan|inf)"):
        step(parameters, optimizer, max_grad_norm=limit)
    assert torch.equal(flat(parameters), before)
    assert_same_state(optimizer_state(optimizer, NAMES), state)
    # And the next step starts clean.
    assert all(p.grad is None for p in parameters)


def test_without_a_gradient_momentum_goes_on():
    parameters, optimizer = make()
    fill(parameters)
    step(parameters, optimizer)
    norm, change = step(parameters, optimizer)
    assert norm == 0.0
    assert change > 0.0


def test_a_scaled_step_is_the_plain_one():
    parameters, optimizer = make()
    fill(parameters)
    step(parameters, optimizer, max_grad_norm=1.0)
    scaled, scaled_optimizer = make()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    scaler.scale(torch.zeros(()))
    fill(scaled, scale=2.0**16)
    norm, _ = step(scaled, scaled_optimizer, max_grad_norm=1.0, scaler=scaler)
    assert torch.equal(flat(scaled), flat(parameters))
    assert norm < 200
    assert scaler.get_scale() == 2.0**16


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_an_overflow_lowers_the_scale_and_leaves_the_step_out(bad):
    parameters, optimizer = make()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    fill(parameters, scale=2.0**16)
    parameters[0].grad[0, 0] = bad
    before = flat(parameters)
    norm, change = step(parameters, optimizer, scaler=scaler, max_grad_norm=1.0)
    assert not math.isfinite(norm)
    assert change == 0.0
    assert torch.equal(flat(parameters), before)
    assert scaler.get_scale() == 2.0**15
    assert optimizer_state(optimizer, NAMES) == {}
    fill(parameters, scale=2.0**15)
    _, change = step(parameters, optimizer, scaler=scaler, max_grad_norm=1.0)
    assert change > 0.0


def test_a_scaler_that_has_met_no_loss():
    # float16, beta 0 and equal rewards in the first step: no micro-batch, so nothing was scaled.
    parameters, optimizer = make()
    scaler = torch.amp.GradScaler("cpu")
    assert step(parameters, optimizer, scaler=scaler) == (0.0, 0.0)


def assert_same_state(found, expected):
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert found[key].dtype == tensor.dtype, key
        assert torch.equal(found[key], tensor), key


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_8bit"])
def test_saved_state_goes_on_bit_for_bit(optim, tmp_path):
    parameters, optimizer = make(optim, weight_decay=0.01)
    for seed in range(3):
        fill(parameters, seed)
        step(parameters, optimizer)
    save_file(optimizer_state(optimizer, NAMES), tmp_path / "optimizer.safetensors")
    values = [p.detach().clone() for p in parameters]

    resumed, other = make(optim, weight_decay=0.01)
    with torch.no_grad():
        for parameter, value in zip(resumed, values, strict=True):
            parameter.copy_(value)
    saved = load_file(tmp_path / "optimizer.safetensors")
    load_optimizer_state(other, NAMES, saved)
    assert_same_state(optimizer_state(other, NAMES), saved)
    for seed in range(3, 6):
        for these, which in ((parameters, optimizer), (resumed, other)):
            fill(these, seed)
            step(these, which)
    assert torch.equal(flat(resumed), flat(parameters))
    assert_same_state(optimizer_state(other, NAMES), optimizer_state(optimizer, NAMES))
    assert not torch.equal(flat(parameters), flat(values))


def test_state_is_named_by_parameter_and_copied():
    parameters, optimizer = make()
    assert optimizer_state(optimizer, NAMES) == {}
    load_optimizer_state(optimizer, NAMES, {})  # a run that stopped before its first step
    fill(parameters)
    step(parameters, optimizer)
    state = optimizer_state(optimizer, NAMES)
    assert set(state) == {f"{n}|{k}" for n in NAMES for k in ("step", "exp_avg", "exp_avg_sq")}
    assert state["b.weight|exp_avg"].shape == SHAPES["b.weight"]
    before = state["b.weight|exp_avg"].clone()
    fill(parameters, seed=1)
    step(parameters, optimizer)
    assert torch.equal(state["b.weight|exp_avg"], before)


def test_eight_bit_moments_are_eight_bits_and_step_alike():
    parameters, optimizer = make("adamw_8bit")
    exact, exact_optimizer = make()
    for seed in range(4):
        for these, which in ((parameters, optimizer), (exact, exact_optimizer)):
            fill(these, seed)
            step(these, which)
    state = optimizer_state(optimizer, NAMES)
    assert state["a.weight|state1"].dtype == state["c.weight|state2"].dtype == torch.uint8
    assert state["b.weight|state1"].dtype == torch.float32
    torch.testing.assert_close(parameters[1], exact[1])
    moved = flat(exact) - flat(make()[0])
    assert (flat(parameters) - flat(exact)).norm() < 0.1 * moved.norm()


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_8bit"])
def test_state_of_another_model_is_refused(optim):
    parameters, optimizer = make(optim)
    fill(parameters)
    step(parameters, optimizer)
    state = optimizer_state(optimizer, ["a.weight", "b.weight", "d.weight"])
    with pytest.raises(ModelError, match=r"d\.weight"):
        load_optimizer_state(make(optim)[1], NAMES, state)


def test_optimizers_that_cannot_be_had_are_named():
    with pytest.raises(ConfigError, match="paged_adamw_8bit needs a CUDA device"):
        make("paged_adamw_8bit")
    with pytest.raises(ConfigError, match="sgd"):
        make("sgd")


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [0.5, 1.0, 1.0, 1.0, 1.0, 1.0]),
        ("linear", [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]),
        ("cosine", [0.5, 1.0, 1.0, (1 + 0.5**0.5) / 2, 0.5, (1 - 0.5**0.5) / 2]),
    ],
)
def test_schedule(schedule, expected):
    found = [
        learning_rate_at(t, base=2.0, schedule=schedule, warmup_steps=2, total_steps=6)
        for t in range(1, 7)
    ]
    assert found == pytest.approx([2.0 * rate for rate in expected])


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_schedule_without_warm_up_starts_at_its_base(schedule):
    rates = [
        learning_rate_at(t, base=1e-4, schedule=schedule, warmup_steps=0, total_steps=4)
        for t in range(1, 5)
    ]
    assert rates[0] == 1e-4
    assert min(rates) > 0.0  # the last step still learns


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_8bit"])
def test_the_change_is_measured_without_a_copy_of_the_adapters(optim, monkeypatch):
    """In parts: the numbers are to the bit those of one step, and memory is that of a part."""
    found, peaks = [], []
    for limit in (2**30, 30_000):
        monkeypatch.setattr(update, "PART_BYTES", limit)
        parameters, optimizer = make(optim, weight_decay=0.1)
        for seed in range(3):
            before = flat(parameters)
            fill(parameters, seed)
            with Recorder() as recorder:
                result = step(parameters, optimizer, max_grad_norm=1.0)
        assert all(p.grad is None for p in parameters)
        change = (flat(parameters) - before).norm() / flat(parameters).norm()
        assert result[1] == pytest.approx(change.item(), rel=1e-5)
        found.append((flat(parameters), result, optimizer_state(optimizer, NAMES)))
        peaks.append(add_up(recorder.events).peak_allocated)
    assert peaks[1] < 0.6 * peaks[0]
    assert torch.equal(found[0][0], found[1][0])
    assert found[0][1] == found[1][1]
    assert_same_state(found[0][2], found[1][2])
