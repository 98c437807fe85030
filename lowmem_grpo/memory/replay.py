"""Read a memory snapshot from a file and replay it; see `memory/snapshot.py`."""

from __future__ import annotations

import os

from lowmem_grpo.errors import UserError
from lowmem_grpo.memory import plain_pickle
from lowmem_grpo.memory.allocator import AllocatorSettings
from lowmem_grpo.memory.snapshot import ReplayReport, replay_snapshot


class SnapshotError(UserError):
    """The file is not a snapshot that can be replayed. The message names the file and a way out."""


def replay(
    path: str | os.PathLike,
    settings: AllocatorSettings | None = None,
    device: int | None = None,
) -> ReplayReport:
    """Replay the trace of one device in the snapshot file `path`; nothing in the file is run.

    `settings` and `device`: see `replay_snapshot`. Raises `SnapshotError`.
    """
    file = os.fspath(path)
    try:
        with open(file, "rb") as stream:
            snapshot = plain_pickle.load(stream.read())
    except OSError as error:
        raise SnapshotError(f"{file}: {error.strerror}; give a snapshot file") from None
    except ValueError as error:
        raise SnapshotError(
            f"{file}: not a memory snapshot ({error}); give an undamaged file of plain containers "
            "from torch.cuda.memory._dump_snapshot"
        ) from None
    try:
        report = replay_snapshot(snapshot, settings, device)
    except ValueError as error:
        raise SnapshotError(f"{file}: {error}") from None
    report.file = file
    return report
