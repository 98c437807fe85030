"""Numbers that are not finite, a base or a reference that changes, adapters that do not: each is
planted here, and each is met.
"""

import json

import pytest
import torch
from safetensors.torch import load_file

import lowmem_grpo.run.discard
import lowmem_grpo.train
from lowmem_grpo.grpo import update
from lowmem_grpo.grpo.loss_scale import LossScale
from lowmem_grpo.grpo.objective import Objective
from lowmem_grpo.policy.base import Policy
from lowmem_grpo.policy.integrity import named_tensors
from lowmem_grpo.rollout import sampler
from lowmem_grpo.run.checkpoint import newest_sound
from tests.runs import TINY, call, metrics, train

NAN = float("nan")
# Completions differ in their lengths, so there is something to learn.
RUN = ["--reward", "overlong:max=6,cache=5"]


def nth(function, calls, spoil):
    """The same function, with what it returns spoilt in these calls (from 1)."""
    count = 0

    def called(*args, **how):
        nonlocal count
        count += 1
        found = function(*args, **how)
        return spoil(found) if count in calls else found

    return called


def spoilt_scores(scored):
    scored.logprobs_N.data[1] = NAN
    return scored


def plant(patch, what, calls):
    """Let a number be NaN or infinite in the second batch."""
    if what == "sampler":
        # Seven draws a batch of six tokens at most: its prefill's, and those of the others.
        spoil = lambda drawn: (drawn[0], drawn[1] * NAN, drawn[2])  # noqa: E731
        patch.setattr(sampler, "choose", nth(sampler.choose, calls, spoil))
    elif what == "loss":
        spoil = lambda found: (found[0] * float("inf"), found[1])  # noqa: E731
        patch.setattr(Objective, "__call__", nth(Objective.__call__, calls, spoil))
    elif what == "gradient":

        def infinite(stats):
            planted[0].grad[0, 0] = float("inf")
            return stats

        planted = []
        accumulate = nth(lowmem_grpo.train.accumulate, calls, infinite)

        def seen(policy, *args, **how):
            planted[:] = policy.adapter_parameters().values()
            return accumulate(policy, *args, **how)

        patch.setattr(lowmem_grpo.train, "accumulate", seen)
    else:  # Scoring is called by the reference, and then by the update
        scoring = nth(update.Scoring.__call__, calls, spoilt_scores)
        patch.setattr(update.Scoring, "__call__", scoring)


@pytest.fixture(scope="module")
def whole(tiny_model_dir, tmp_path_factory):
    path = tmp_path_factory.mktemp("whole") / "run"
    train(tiny_model_dir, path, *RUN, "--steps", "3")
    return path


def adapters(run, step):
    return load_file(run / f"checkpoints/step-{step:06d}/adapter_model.safetensors")


@pytest.mark.parametrize(
    ("what", "calls", "says"),
    [
        ("sampler", {8}, "the model's logits are not finite"),
        ("reference", {3}, "the reference's log-probs are NaN or infinite in micro-batch 1 of 1"),
        ("policy", {4}, "the policy's log-probs are NaN or infinite in micro-batch 1 of 1"),
        ("loss", {2}, "the loss is NaN or infinite in micro-batch 1 of 1"),
        ("gradient", {2}, "the gradient norm is"),
    ],
)
def test_no_step_is_taken_on_what_is_not_finite(
    whole, tiny_model_dir, tmp_path, monkeypatch, what, calls, says
):
    plant(monkeypatch, what, calls)
    run = tmp_path / "run"
    done = train(tiny_model_dir, run, *RUN, "--steps", "2")
    assert "step 2 is not taken" in done.stderr
    assert says in done.stderr
    found = json.loads((run / "discarded/batch-000002.json").read_text())
    assert says in found["error"]
    assert found["step"] == 2
    assert bool(found["groups"]) == (what != "sampler")
    records = metrics(run)
    assert [r["discarded_batches"] for r in records] == [0, 1]
    # The first step is as it was, and the second is of the third batch.
    assert all(bool(x.isfinite().all()) for x in adapters(run, 2).values())
    assert json.loads((run / "checkpoints/step-000002/state.json").read_text())["batch"] == 3
    assert records[0] == metrics(whole)[0]


def test_the_run_ends_after_too_many(tiny_model_dir, tmp_path, monkeypatch):
    run = tmp_path / "run"
    arguments = ["--model", tiny_model_dir, "--output", run, *TINY, *RUN, "--steps", "3"]
    with monkeypatch.context() as patch:
        plant(patch, "loss", range(2, 100))
        ended = call("train", *arguments, "--set", "run.max_discarded=2")
    assert ended.exit_code == 1
    assert "3 batches in a row came to nothing, the last since the loss is" in ended.stderr
    assert ended.stderr.count("is not taken") == 2
    assert len(list((run / "discarded").iterdir())) == 3
    assert [m["step"] for m in metrics(run)] == [1]
    # Nothing that was good is lost, and it can go on from there.
    assert call("train", *arguments, "--resume").exit_code == 0
    assert [m["step"] for m in metrics(run)] == [1, 2, 3]


def test_what_is_kept_for_inspection_is_bounded(tiny_model_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(lowmem_grpo.run.discard, "KEPT", 2)
    plant(monkeypatch, "loss", range(2, 5))
    train(tiny_model_dir, tmp_path / "run", *RUN, "--steps", "2")
    names = sorted(path.name for path in (tmp_path / "run/discarded").iterdir())
    assert names == ["batch-000003.json", "batch-000004.json"]


def changing(monkeypatch, act):
    """Do something to the policy before the second update."""
    policies = []
    accumulate = lowmem_grpo.train.accumulate

    def called(policy, *args, **how):
        policies.append(policy)
        if len(policies) == 2:
            act(policy)
        return accumulate(policy, *args, **how)

    monkeypatch.setattr(lowmem_grpo.train, "accumulate", called)


def flip(policy):
    weights = [x for _, x in named_tensors(policy.model) if x.dtype == torch.uint8]
    weights[0].data.view(-1)[3] ^= 16


def leak(policy):
    """The reference is the policy from here on."""
    policy.as_reference = policy.as_sampler


@pytest.mark.parametrize(
    ("act", "says"), [(flip, "are not what was loaded"), (leak, "the reference is not what it was")]
)
@pytest.mark.parametrize("every", [1, pytest.param(0, marks=pytest.mark.slow)])
def test_a_base_or_reference_that_changes_ends_the_run(
    tiny_model_dir, tmp_path, monkeypatch, act, says, every
):
    monkeypatch.setattr(Policy, "as_reference", Policy.as_reference)
    changing(monkeypatch, act)
    run = tmp_path / "run"
    arguments = ["--model", tiny_model_dir, "--output", run, *TINY, *RUN, "--steps", "3"]
    # Adapters that have hardly moved are hardly another reference.
    arguments += ["--set", "optimizer.learning_rate=0.3", "--set", f"run.check_every={every}"]
    ended = call("train", *arguments)
    assert ended.exit_code == 1
    assert says in ended.stderr
    assert not (run / "adapter").exists()
    # What may have been computed with it is not gone on from.
    last = "step-000001" if every else "step-000000"
    assert newest_sound(run).name == last
    assert "are set aside, --resume goes on from there" in ended.stderr
    monkeypatch.undo()
    again = call("train", "--output", run, "--resume")
    assert again.exit_code == 0, again.stderr
    assert f"resumed from {run / 'checkpoints' / last}" in again.stderr
    assert [m["step"] for m in metrics(run)] == [1, 2, 3]


def test_adapters_that_do_not_move_are_told(tiny_model_dir, tmp_path, monkeypatch):
    def still(parameters, optimizer, **how):
        for group in optimizer.param_groups:
            group["lr"] = 0.0
        return 1.0, 0.0

    monkeypatch.setattr(lowmem_grpo.train, "apply_update", still)
    done = train(tiny_model_dir, tmp_path / "run", *RUN, "--steps", "2")
    assert "the adapters did not change" in done.stderr
    assert "adapters_still" in metrics(tmp_path / "run")[0]["alarms"]


def test_a_sampler_that_is_apart_from_the_trainer_is_told(tiny_model_dir, tmp_path, monkeypatch):
    spoil = lambda drawn: (drawn[0], drawn[1] - 1.0, drawn[2])  # noqa: E731
    monkeypatch.setattr(sampler, "choose", nth(sampler.choose, range(1, 1000), spoil))
    done = train(tiny_model_dir, tmp_path / "run", *RUN, "--steps", "1")
    assert "sampler and trainer disagree" in done.stderr
    assert "sampler_apart" in metrics(tmp_path / "run")[0]["alarms"]


def overflowing(monkeypatch, above):
    """A run in float32 that scales its loss as in float16; from the second step on its gradients
    overflow with a scale above a number. Returns the scales of all updates.
    """
    own = LossScale(torch.device("cpu"), torch.float16)
    monkeypatch.setattr(lowmem_grpo.train, "LossScale", lambda device, dtype: own)
    accumulate, scales = lowmem_grpo.train.accumulate, []

    def called(policy, *args, **how):
        stats = accumulate(policy, *args, **how)
        scales.append(own.scaler.get_scale())
        if len(scales) > 1 and scales[-1] > above:
            next(iter(policy.adapter_parameters().values())).grad[0, 0] = torch.inf
        return stats

    monkeypatch.setattr(lowmem_grpo.train, "accumulate", called)
    return scales


def test_an_overflow_in_float16_repeats_the_update_on_the_same_rollouts(
    whole, tiny_model_dir, tmp_path, monkeypatch
):
    scales = overflowing(monkeypatch, above=2.0**14)
    run = tmp_path / "run"
    done = train(tiny_model_dir, run, *RUN, "--steps", "3")
    assert scales == [2.0**16, 2.0**16, 2.0**15, 2.0**14, 2.0**14]
    assert done.stderr.count("is repeated on the same rollouts") == 2
    # A power of two: the numbers are those of a run without any scale.
    found, expected = metrics(run), metrics(whole)
    assert [m.pop("loss_scale") for m in found] == [2.0**16, 2.0**16, 2.0**14]
    assert [m.pop("loss_scale") for m in expected] == [None] * 3
    assert found == expected
    for name, tensor in adapters(whole, 3).items():
        assert torch.equal(adapters(run, 3)[name], tensor)
    state = json.loads((run / "checkpoints/step-000003/state.json").read_text())
    assert state["scaler"]["scale"] == 2.0**14


def test_gradients_that_no_scale_makes_finite_cost_a_batch_and_not_the_scale(
    tiny_model_dir, tmp_path, monkeypatch
):
    scales = overflowing(monkeypatch, above=0.0)
    arguments = ["--set", "run.max_discarded=1", "--steps", "3"]
    run = tmp_path / "run"
    ended = call("train", "--model", tiny_model_dir, "--output", run, *TINY, *RUN, *arguments)
    assert ended.exit_code == 1
    assert "the gradients are not finite, with a loss scale of 1 either" in ended.stderr
    batch = [2.0**n for n in range(16, -1, -1)]
    assert scales == [2.0**16, *batch, *batch]
    assert len(metrics(run)) == 1
