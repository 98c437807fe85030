"""A defect ends in one line and leaves its traceback in a file."""

import re
import tempfile
from pathlib import Path

import pytest

import lowmem_grpo.train
from tests.runs import call


@pytest.fixture
def defect(monkeypatch, tmp_path):
    """Training that has a defect once its run directory is there."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()

    def train(config, **_):
        raise TypeError("no such thing\nand more")

    monkeypatch.setattr(lowmem_grpo.train, "train", train)
    return lambda *more: call("train", "--output", tmp_path / "run", "--quiet", *more)


@pytest.mark.parametrize("is_run", [True, False])
def test_the_traceback_is_in_the_run_or_among_temporary_files(defect, tmp_path, is_run):
    run, precious = tmp_path / "run", tmp_path / "precious"
    run.mkdir()
    precious.write_text("kept")
    (run / "error.txt").symlink_to(precious)
    if is_run:
        (run / "run.lock").touch()
    result = defect()
    assert result.exit_code == 1
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: TypeError: no such thing (its traceback is in ")
    path = Path(re.search(r"is in (.*)\)$", line)[1])
    assert path.parent == (run if is_run else tmp_path / "temporary")
    text = path.read_text()
    assert "in train" in text
    assert "TypeError: no such thing\nand more" in text
    assert "torch " in text
    assert precious.read_text() == "kept"


def test_a_directory_with_nothing_but_a_traceback_is_free_for_a_run(defect, tmp_path):
    from lowmem_grpo.run.directory import check_directory

    run = tmp_path / "run"
    run.mkdir()
    (run / "run.lock").touch()
    defect()
    assert (run / "error.txt").is_file()
    assert not check_directory(run, resume=False, overwrite=False)


def test_what_a_person_can_mend_leaves_none(defect, tmp_path):
    assert defect("--set", "grpo.betta=1").exit_code == 2
    assert defect("--debug-me").exit_code == 2
    assert not list((tmp_path / "temporary").iterdir())
