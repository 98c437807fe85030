"""The run directory: nothing is overwritten, nobody shares it, files are whole."""

import subprocess
import sys

import pytest

from lowmem_grpo.errors import ConfigError
from lowmem_grpo.run.directory import RunDirectory, read_lines, write_atomic


def open_run(path, resume=False, overwrite=False):
    return RunDirectory(path, resume=resume, overwrite=overwrite)


def test_an_existing_directory_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ConfigError, match="--resume continues it, --overwrite replaces it"):
        open_run(tmp_path)
    # Not a run of ours: not even --overwrite removes it.
    with pytest.raises(ConfigError, match="is not a run directory"):
        open_run(tmp_path, overwrite=True)
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_overwrite_clears_a_run_and_resume_keeps_it(tmp_path):
    target = tmp_path / "run"
    with open_run(target) as run:
        write_atomic(run / "config.toml", "a = 1\n")
        run.append("metrics.jsonl", {"step": 1})
    with open_run(target, resume=True) as run:
        assert list(read_lines(run / "metrics.jsonl")) == [{"step": 1}]
    with open_run(target, overwrite=True) as run:
        assert (target / "metrics.jsonl").is_file()  # until the new run really begins
        run.begin()
        assert [p.name for p in run.path.iterdir()] == ["run.lock"]


def test_what_a_killed_process_left_half_written_goes(tmp_path):
    write_atomic(tmp_path / "config.toml", "a = 1\n")
    (tmp_path / ".memory.json.partial").write_text("[")
    (tmp_path / ".best.partial").mkdir()
    (tmp_path / ".best.partial/adapter_config.json").write_text("{")
    with open_run(tmp_path, resume=True) as run:
        run.begin()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.toml", "run.lock"]


def test_a_directory_that_is_another_by_now_is_not_written_in(tmp_path):
    with open_run(tmp_path / "run") as run:
        run.append("metrics.jsonl", {"step": 1})
        run.path.rename(tmp_path / "elsewhere")
        run.path.mkdir()  # as where a mount has gone
        with pytest.raises(OSError, match="another directory is there"):
            run.append("metrics.jsonl", {"step": 2})
        assert not list(run.path.iterdir())


def test_resume_needs_a_run(tmp_path):
    with pytest.raises(ConfigError, match="holds no run"):
        open_run(tmp_path, resume=True)


def test_a_file_is_not_a_directory(tmp_path):
    (tmp_path / "x").write_text("")
    with pytest.raises(ConfigError, match="is a file"):
        open_run(tmp_path / "x")


def test_two_processes_do_not_share_a_run(tmp_path):
    with open_run(tmp_path / "run"):
        code = (
            "from lowmem_grpo.run.directory import RunDirectory\n"
            f"RunDirectory({str(tmp_path / 'run')!r}, resume=False, overwrite=False)"
        )
        other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert "another process is training in" in other.stderr
    with open_run(tmp_path / "run"):
        pass


def test_numbers_that_are_not_json_are_refused(tmp_path):
    with open_run(tmp_path / "run") as run, pytest.raises(ValueError, match="JSON"):
        run.append("metrics.jsonl", {"loss": float("nan")})


def test_a_failed_write_leaves_the_old_file(tmp_path):
    write_atomic(tmp_path / "x", "old")
    with pytest.raises(UnicodeEncodeError):
        write_atomic(tmp_path / "x", "new \ud800")
    assert (tmp_path / "x").read_text() == "old"
