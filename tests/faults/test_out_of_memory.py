"""Out of memory is not the end: the phase is repeated with less at once, and the run is the same up
to rounding.
"""

import json

import pytest
import torch
from safetensors.torch import load_file

import lowmem_grpo.pool
import lowmem_grpo.run.evaluate
import lowmem_grpo.train
from lowmem_grpo.config import build_config, read_toml
from lowmem_grpo.errors import PlanError
from lowmem_grpo.retry import TRIES, Fitting
from tests.faults.shortage import WORDS, failing, limited
from tests.runs import TINY, assert_same_run, call, metrics, train

RUN = [
    *("--reward", "overlong:max=6,cache=5"),  # by which completions differ
    *("--steps", "3", "--eval-every", "2", "--set", "eval.num_problems=4"),
    *("--set", "memory.micro_batch_tokens=60", "--set", "memory.rollout_batch_size=8"),
    *("--set", "eval.batch_size=4"),
]
PHASES = {
    "rollout": ("roll_out", 300, "memory.rollout_batch_size", (8, 4, 2)),
    "reference": ("score_reference", 500, "memory.micro_batch_tokens", (60, None, None)),
    "update": ("accumulate", 2200, "memory.micro_batch_tokens", (60, None, None)),
    # Where the moments have moved and the adapters not.
    "optimizer": ("apply_update", 120, "memory.micro_batch_tokens", (60, None, None)),
    "evaluation": ("evaluate", 300, "eval.batch_size", (4, 2, 1)),
}


@pytest.fixture(scope="module")
def whole(tiny_model_dir, tmp_path_factory):
    path = tmp_path_factory.mktemp("whole") / "run"
    train(tiny_model_dir, path, *RUN)
    return path


def apart(one, other, step=3):
    """How far the adapters of two runs are apart, over how far they have come."""

    def read(run, step):
        file = run / f"checkpoints/step-{step:06d}/adapter_model.safetensors"
        return torch.cat([tensor.flatten() for _, tensor in sorted(load_file(file).items())])

    end = read(one, step)
    return ((end - read(other, step)).norm() / (end - read(one, step - 1)).norm()).item()


@pytest.mark.parametrize("phase", PHASES)
def test_the_phase_is_repeated_with_less(whole, tiny_model_dir, tmp_path, monkeypatch, phase):
    name, operation, setting, values = PHASES[phase]
    function = getattr(lowmem_grpo.train, name)
    short = failing(function, times=2, operation=operation)
    monkeypatch.setattr(lowmem_grpo.train, name, short)
    done = train(tiny_model_dir, tmp_path / "run", *RUN)
    assert done.stderr.count("out of memory in the") == 2
    assert apart(whole, tmp_path / "run") < 1e-3
    # What was found to fit is the run's from then on, and says where it comes from.
    section, key = setting.split(".")
    now = read_toml(str(tmp_path / "run/config.toml"))[section][key]
    events = [e for m in metrics(tmp_path / "run") for e in m["out_of_memory"]]
    assert (events[0]["setting"], events[0]["was"]) == (setting, values[0])
    assert events[1]["was"] == events[0]["now"]
    assert events[1]["now"] == now < values[0] / 2
    assert values[2] in (now, None)
    assert events[0]["error"] == WORDS
    assert "ran out of memory with" in (tmp_path / "run/config.toml").read_text()
    assert [m["step"] for m in metrics(tmp_path / "run")] == [1, 2, 3]
    lines = (tmp_path / "run/eval.jsonl").read_text()
    assert lines == (whole / "eval.jsonl").read_text()


def test_no_step_is_taken_twice_where_moments_had_moved(whole, tiny_model_dir, tmp_path):
    """The optimizer's step ran out of memory at its end: it begins again from the disk."""
    moved = []
    function = lowmem_grpo.train.apply_update

    def seen(parameters, optimizer, **how):
        with pytest.MonkeyPatch.context() as patch:
            step = optimizer.step

            def half():
                step()
                moved.append(True)
                raise torch.OutOfMemoryError(WORDS)

            if not moved and optimizer.state:
                patch.setattr(optimizer, "step", half)
            return function(parameters, optimizer, **how)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lowmem_grpo.train, "apply_update", seen)
        train(tiny_model_dir, tmp_path / "run", *RUN)
    assert moved == [True]
    assert apart(whole, tmp_path / "run") < 1e-3


def test_moments_that_are_damaged_are_not_gone_on_from(tiny_model_dir, tmp_path, monkeypatch):
    run = tmp_path / "run"

    def damaged(*args, **how):
        path = run / "checkpoints/step-000000/adapter_model.safetensors"
        path.write_bytes(path.read_bytes()[:-1])
        raise torch.OutOfMemoryError(WORDS)

    monkeypatch.setattr(lowmem_grpo.train, "apply_update", damaged)
    ended = call("train", "--model", tiny_model_dir, "--output", run, *TINY, *RUN)
    assert ended.exit_code == 1
    assert "adapter_model.safetensors is not what was written" in ended.stderr


@pytest.mark.slow
def test_a_limit_is_met_by_halving(tiny_model_dir, tmp_path, monkeypatch):
    longer = ["--max-completion-length", "40", "--set", "rollout.min_completion_length=40"]
    longer += ["--reward", "repetition:ngram=2", "--set", "memory.micro_batch_tokens=400"]
    heavy = ["--set", "lora.r=1", "--set", "memory.gradient_checkpointing=false"]
    run = [*RUN, *longer, *heavy, "--steps", "2"]
    peaks, function = [], lowmem_grpo.train.accumulate
    monkeypatch.setattr(lowmem_grpo.train, "accumulate", limited(function, 2**40, peaks))
    train(tiny_model_dir, tmp_path / "free", *run)
    limit = int(max(peaks) * 0.5)
    monkeypatch.setattr(lowmem_grpo.train, "accumulate", limited(function, limit, peaks))
    done = train(tiny_model_dir, tmp_path / "run", *run)
    assert "out of memory in the update" in done.stderr
    assert max(peaks[-2:]) <= limit < peaks[2]
    assert apart(tmp_path / "free", tmp_path / "run", step=2) < 1e-3


def test_where_less_does_not_help_the_run_ends_and_goes_on_later(
    whole, tiny_model_dir, tmp_path, monkeypatch
):
    arguments = ["--model", tiny_model_dir, "--output", tmp_path / "run", *TINY, *RUN]
    calls, accumulate = [], lowmem_grpo.train.accumulate
    never = failing(accumulate, times=99, operation=1000)

    def once(*args, **how):
        calls.append(None)
        return (accumulate if len(calls) == 1 else never)(*args, **how)

    with monkeypatch.context() as patch:
        patch.setattr(lowmem_grpo.train, "accumulate", once)
        ended = call("train", *arguments)
    assert ended.exit_code == 3
    assert "out of memory in the update, with memory.micro_batch_tokens = " in ended.stderr
    assert "Traceback" not in ended.stderr
    assert len(calls) == 1 + TRIES
    state = json.loads((tmp_path / "run/checkpoints/step-000001/state.json").read_text())
    assert state["groups"][0]["rollouts"][0]["ref_logprobs"]  # only the update is to be repeated
    # Elsewhere there is room: the run's own settings, and the very same run.
    assert call("train", *arguments, "--resume").exit_code == 0
    assert_same_run(whole, tmp_path / "run", 3)


def test_an_evaluation_is_repeated_with_less(whole, monkeypatch):
    arguments = ["eval", whole, "--json", "--base", "--set", "eval.batch_size=4"]
    expected = json.loads(call(*arguments).stdout)
    short = failing(lowmem_grpo.run.evaluate.evaluate, times=2, operation=300)
    monkeypatch.setattr(lowmem_grpo.run.evaluate, "evaluate", short)
    done = call(*arguments)
    assert done.exit_code == 0, done.stderr
    assert done.stderr.count("out of memory in the evaluation") == 2
    assert json.loads(done.stdout) == expected
    never = failing(lowmem_grpo.run.evaluate.evaluate, times=99, operation=300)
    monkeypatch.setattr(lowmem_grpo.run.evaluate, "evaluate", never)
    ended = call(*arguments)
    assert ended.exit_code == 3
    assert "with eval.batch_size = 1 as well" in ended.stderr


@pytest.mark.parametrize("phase", ["rollout", "reference"])
def test_a_pool_is_filled_with_less(tiny_model_dir, tmp_path, monkeypatch, phase):
    name = {"rollout": "sample_groups", "reference": "score_reference"}[phase]
    function = getattr(lowmem_grpo.pool, name)
    sizes = ["--set", "memory.micro_batch_tokens=60", "--set", "memory.rollout_batch_size=8"]
    arguments = ["rollouts", "--model", tiny_model_dir, *TINY, *sizes, "--groups", "4"]
    assert call(*arguments, "--output", tmp_path / "whole").exit_code == 0
    monkeypatch.setattr(lowmem_grpo.pool, name, failing(function, times=2, operation=300))
    done = call(*arguments, "--output", tmp_path / "pool")
    assert done.exit_code == 0, done.stderr
    assert done.stderr.count(f"out of memory in the {phase} (planned ") == 2
    for one, other in zip(*map(groups_of, (tmp_path / "whole", tmp_path / "pool")), strict=True):
        for mine, theirs in zip(one["rollouts"], other["rollouts"], strict=True):
            assert mine["completion_ids"] == theirs["completion_ids"]
            assert mine["ref_logprobs"] == pytest.approx(theirs["ref_logprobs"], abs=1e-5)


def groups_of(pool):
    return [json.loads(line) for line in (pool / "groups.jsonl").read_text().splitlines()]


class Policy:
    device = torch.device("cpu")

    def release(self):
        pass


def test_a_phase_that_cannot_be_cut_is_not_tried_for_ever():
    warned = []
    config = build_config([("t", {"memory": {"micro_batch_tokens": 4096}})])
    fitting = Fitting(config, Policy(), {"update": 3 * 2**20}, warned.append)
    tried = []

    def run(error):
        for attempt in fitting.attempts("update", 3):
            with attempt as fits:
                tried.append(fits.memory.micro_batch_tokens)
                raise error

    with pytest.raises(PlanError, match=r"micro_batch_tokens = 1 as well: no room"):
        run(torch.OutOfMemoryError("no room\nand much more"))
    assert tried == [4096, 1]  # of three tokens at most, half
    assert "planned 3 MiB" in warned[0]
    with pytest.raises(ValueError, match="another"):
        run(ValueError("another error"))


MEMORY = {  # what libraries say, word for word
    "pinned pages": torch.AcceleratorError(
        "CUDA error: out of memory\nSearch for `cudaErrorMemoryAllocation' in https://docs.nvidia.com"
    ),
    "cuBLAS": RuntimeError(
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"
    ),
    "cuBLAS, as an accelerator's": torch.AcceleratorError(
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasLtMatmul( ... )`\nMore"
    ),
    "cuDNN 8": RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    "cuDNN 9": RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"),
    "cuSOLVER": RuntimeError(
        "cusolver error: CUSOLVER_STATUS_ALLOC_FAILED, when calling `cusolverDnCreate(handle)`"
    ),
    "expandable segments": RuntimeError("CUDA driver error: out of memory"),
    "Triton": RuntimeError("Triton Error [CUDA]: out of memory"),
    "the host's": RuntimeError(
        "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: "
        "you tried to allocate 281474976710656 bytes. Error code 12 (Cannot allocate memory)"
    ),
    "Python's": MemoryError(),
}
ANOTHER = {
    "an address": torch.AcceleratorError(
        "CUDA error: an illegal memory access was encountered\nCUDA kernel errors might be "
        "asynchronously reported, even an out of memory"
    ),
    "an assertion": torch.AcceleratorError("CUDA error: device-side assert triggered\nMore"),
    "a launch": torch.AcceleratorError("CUDA error: unspecified launch failure"),
    "cuBLAS": RuntimeError(
        "CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasGemmEx`"
    ),
    "shapes": RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
    "a value": ValueError("out of memory cells"),
}


def raise_in(phase, error):
    """The micro-batches that a phase was tried with that raises an error each time."""
    config, tried = build_config([("t", {"memory": {"micro_batch_tokens": 8}})]), []
    for attempt in Fitting(config, Policy(), {}, lambda text: None).attempts(phase, 8):
        with attempt as fits:
            tried.append(fits.memory.micro_batch_tokens)
            if len(tried) < 3:
                raise error
    return tried


@pytest.mark.parametrize("name", MEMORY)
def test_whatever_ran_out_of_memory_is_repeated(name):
    assert raise_in("update", MEMORY[name]) == [8, 4, 2]


@pytest.mark.parametrize("name", ANOTHER)
def test_no_other_error_is_repeated(name):
    with pytest.raises(type(ANOTHER[name])) as caught:
        raise_in("update", ANOTHER[name])
    assert caught.value is ANOTHER[name]
