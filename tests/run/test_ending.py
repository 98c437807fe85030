"""What an error leaves of a run, and in which words."""

import errno

import pytest

from lowmem_grpo.run.ending import Ending, StorageError


def leave(run, error, *, whole, resumed=None):
    with Ending(run, resumed, lambda: run / "checkpoints/step-000003", print) as ending:
        ending.whole = whole
        raise error


def test_an_error_of_the_run_s_files_is_told_as_one(tmp_path):
    full = OSError(errno.ENOSPC, "No space left on device", str(tmp_path / "metrics.jsonl"))
    with pytest.raises(StorageError, match=r"No space .*metrics.jsonl.*; there is no checkpoint"):
        leave(tmp_path, full, whole=False)
    known = tmp_path / "checkpoints/step-000002"
    with pytest.raises(StorageError, match="step-000002, which cannot be read now"):
        leave(tmp_path, full, whole=False, resumed=known)


def test_another_error_stays_what_it_is(tmp_path, capsys):
    with pytest.raises(ConnectionRefusedError):
        leave(tmp_path, ConnectionRefusedError(errno.ECONNREFUSED, "refused"), whole=True)
    assert f"saved in {tmp_path / 'checkpoints/step-000003'}" in capsys.readouterr().out
