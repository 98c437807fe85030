"""Checkpoints: what is damaged is not resumed from, what is newest and sound is, and nothing good
is lost on the way.
"""

import json
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

import lowmem_grpo.train
from lowmem_grpo.checksum import sealed, unsealed
from tests.runs import assert_same_run, call, train

STEPS = "4"


@pytest.fixture(scope="module")
def whole(tiny_model_dir, tmp_path_factory):
    """A run of four steps, and the run that it was after three, without its final adapter."""
    path = tmp_path_factory.mktemp("whole")
    train(tiny_model_dir, path / "run", "--steps", STEPS)
    return path / "run"


@pytest.fixture
def stopped(tiny_model_dir, tmp_path):
    train(tiny_model_dir, tmp_path / "run", "--steps", "3")
    return tmp_path / "run"


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def misspell(path):
    """A letter in a text of a JSON file, which stays JSON."""
    data = path.read_bytes()
    path.write_bytes(data.replace(b'"discarded"', b'"discardee"', 1))
    assert path.read_bytes() != data


def swap(one, other):
    middle = one.with_name("middle")
    one.rename(middle)
    other.rename(one)
    middle.rename(other)


DAMAGE = {
    "adapter_model.safetensors is not what was written": lambda new, old: flip(
        new / "adapter_model.safetensors"
    ),
    "optimizer.safetensors is missing": lambda new, old: (new / "optimizer.safetensors").unlink(),
    "state.json: it is not what was written": lambda new, old: misspell(new / "state.json"),
    "state.json: No such file": lambda new, old: (new / "state.json").unlink(),
    "is of step 2": lambda new, old: swap(new / "state.json", old / "state.json"),
    "adapter_config.json is not what": lambda new, old: os.truncate(new / "adapter_config.json", 5),
}


@pytest.mark.parametrize("says", DAMAGE)
def test_the_newest_sound_checkpoint_is_gone_on_from(whole, stopped, says):
    new, old = (stopped / f"checkpoints/step-00000{n}" for n in (3, 2))
    DAMAGE[says](new, old)
    result = call("train", "--output", stopped, "--resume", "--steps", STEPS)
    if says == "is of step 2":  # of which both have suffered
        assert result.exit_code == 1
        assert "no checkpoint in" in result.stderr
        assert "--overwrite" in result.stderr
        assert new.is_dir()
        return
    assert result.exit_code == 0, result.stderr
    assert f"not used: {new}" in result.stderr
    assert says in result.stderr
    assert "resumed from" in result.stderr
    assert "step-000002" in result.stderr
    assert_same_run(whole, stopped, 4)
    assert (stopped / "checkpoints/damaged-step-000003").is_dir()  # to be looked at


def test_a_damaged_adapter_is_not_evaluated_or_exported(stopped, tmp_path):
    flip(stopped / "adapter/adapter_model.safetensors")
    for command in (["eval", stopped], ["export", stopped, "--output", tmp_path / "out"]):
        result = call(*command)
        assert result.exit_code == 1
        assert "adapter_model.safetensors is not what was written" in result.stderr
    assert not (tmp_path / "out").exists()
    # The run's checkpoint has it still.
    assert call("train", "--output", stopped, "--resume", "--steps", "3", "-q").exit_code == 0
    assert call("export", stopped, "--output", tmp_path / "out").exit_code == 0


def test_a_sound_adapter_is_exported_whatever_became_of_its_checkpoints(stopped, tmp_path):
    for path in (stopped / "checkpoints").glob("step-*"):
        flip(path / "optimizer.safetensors")
    done = call("export", stopped, "--output", tmp_path / "out")
    assert done.exit_code == 0
    assert "the final adapter is sound" in done.stderr


def test_the_final_adapter_is_not_that_of_a_run_that_goes_on(stopped):
    """What a run had at its end is not what it has after more steps."""
    kept = (stopped / "adapter").rename(stopped.parent / "adapter")
    assert call("train", "--output", stopped, "--resume", "--steps", STEPS, "-q").exit_code == 0
    (stopped / "adapter").rename(stopped.parent / "newer")
    kept.rename(stopped / "adapter")
    shown = call("eval", stopped, "--num-problems", "2")
    assert "step-000004" not in shown.stdout  # which is about the target's name
    from lowmem_grpo.run.export import adapter_directory

    assert adapter_directory(stopped) == stopped / "checkpoints/step-000004"


def test_lasting_checkpoints_stay_beside_the_newest(tiny_model_dir, tmp_path):
    settings = ["--save-every", "2", "--set", "run.keep_last=1"]
    train(tiny_model_dir, tmp_path / "run", "--steps", "5", *settings)
    found = sorted(path.name for path in (tmp_path / "run/checkpoints").iterdir())
    assert found == ["step-000004", "step-000005"]
    settings = ["--save-every", "2", "--set", "run.resume_every=3"]
    train(tiny_model_dir, tmp_path / "other", "--steps", "5", *settings)
    found = sorted(path.name for path in (tmp_path / "other/checkpoints").iterdir())
    assert found == ["step-000002", "step-000004", "step-000005"]


@pytest.mark.parametrize("damage", ["adapter_model.safetensors", "state.json"])
def test_the_last_good_checkpoint_is_not_dropped_for_a_damaged_one(
    whole, tiny_model_dir, tmp_path, monkeypatch, damage
):
    """The one before the newest is damaged while the run goes on: an older one stays, until there
    is another that is sound.
    """
    folder, seen = tmp_path / "run/checkpoints", {}
    accumulate = lowmem_grpo.train.accumulate

    def damaging(*args, **how):
        there = sorted(path.name for path in folder.iterdir())
        seen[len(seen)] = there
        if len(seen) == 2:  # in the second step
            assert there == ["step-000000", "step-000001"]
            flip(folder / there[1] / damage)
        return accumulate(*args, **how)

    monkeypatch.setattr(lowmem_grpo.train, "accumulate", damaging)
    # Of a base that is checked each step, no older one stays for its sake.
    settings = ["--steps", STEPS, "--set", "run.check_every=1"]
    done = train(tiny_model_dir, tmp_path / "run", *settings)
    damaged = "damaged-step-000001"
    assert seen[2] == [damaged, "step-000000", "step-000002"]
    assert seen[3] == [damaged, "step-000002", "step-000003"]
    assert f"set aside as {damaged}: " in done.stderr
    assert damage in done.stderr
    assert_same_run(whole, tmp_path / "run", int(STEPS))


def test_another_base_is_refused(tiny_model_dir, stopped, tmp_path):
    again = ["train", "--output", stopped, "--resume", "-q"]
    state = stopped / "checkpoints/step-000003/state.json"
    saved = unsealed(state.read_text())
    assert saved["base"].startswith("cpu:")
    state.write_text(sealed({**saved, "base": "cpu:another"}))
    refused = call(*again, "--steps", STEPS)
    assert refused.exit_code == 2
    assert "are not those that the run was started with" in refused.stderr
    done = call(*again, "--steps", STEPS, "--allow-changed", "model.name")
    assert done.exit_code == 0, done.stderr
    # Quantised by another device it may have another digest: that says nothing.
    saved = unsealed((stopped / "checkpoints/step-000004/state.json").read_text())
    state = stopped / "checkpoints/step-000004/state.json"
    state.write_text(sealed({**saved, "base": "cuda:another"}))
    assert call(*again, "--steps", "5").exit_code == 0


def test_groups_of_another_base_are_not_trained_on(tiny_model_dir, tmp_path):
    run = tmp_path / "run"
    train(tiny_model_dir, run, "--steps", "1", "--set", "grpo.num_iterations=2")
    state = run / "checkpoints/step-000001/state.json"
    saved = unsealed(state.read_text())
    assert saved["groups"]
    state.write_text(sealed({**saved, "base": "cpu:another"}))
    again = ["train", "--output", run, "--resume", "--steps", "2"]
    done = call(*again, "--allow-changed", "model.name")
    assert (
        "changed since it was started: model.name: the groups in hand are not used" in done.stderr
    )
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [r["iteration"] for r in records] == [0, 0]


def test_a_reference_may_begin_to_move(tiny_model_dir, tmp_path):
    """There is none in the checkpoint: it begins as the base."""
    run = tmp_path / "run"
    train(tiny_model_dir, run, "--steps", "1")
    again = ["train", "--output", run, "--resume", "--steps", "2", "-q"]
    moves = ["--set", "grpo.sync_ref_model=true", "--allow-changed", "grpo.sync_ref_model"]
    done = call(*again, *moves)
    assert done.exit_code == 0, done.stderr
    assert (run / "checkpoints/step-000002/reference.safetensors").is_file()


VALUES = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False, allow_infinity=False),
    st.text(max_size=5),
)  # fmt: skip
DOCUMENTS = st.dictionaries(
    st.text(max_size=5).filter(lambda key: key != "sha256"),
    VALUES | st.lists(VALUES, max_size=3),
    max_size=4,
)


@given(DOCUMENTS, st.integers(0), st.characters(codec="ascii"))
def test_a_sealed_document_is_itself_or_refused(document, place, character):
    text = sealed(document)
    assert unsealed(text) == document
    place %= len(text)
    changed = text[:place] + character + text[place + 1 :]
    try:
        found = unsealed(changed)
    except ValueError:
        return
    assert found == document  # white space, or the same character


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"sha256": 3}', "[" * 100_000, json.dumps("x")])
def test_what_was_never_sealed_is_refused(text):
    with pytest.raises(ValueError, match=r"checksum|deep|Expecting"):
        unsealed(text)
