"""Batches that came to nothing: a log-prob, the loss or the gradient was NaN or infinite. No step
is taken on one; it is kept for inspection, and the next problems are sampled.

    OUTPUT/discarded/batch-000012.json   the step, the error, and the groups as they were
"""

import contextlib
import json
from collections.abc import Callable, Iterator
from math import isfinite
from typing import Any

from lowmem_grpo.config import Config
from lowmem_grpo.errors import NonFiniteError
from lowmem_grpo.run.checkpoint import State, group_document
from lowmem_grpo.run.directory import RunDirectory, write_atomic

__all__ = ["discarding"]

FOLDER, KEPT = "discarded", 10


@contextlib.contextmanager
def discarding(
    state: State,
    config: Config,
    run: RunDirectory,
    undo: Callable[[], None],
    warn: Callable[[str], None],
) -> Iterator[None]:
    """Ends a NonFiniteError of a step: the batch in hand is written to OUTPUT/discarded and let go
    of, and `undo` called. Raises it again after more than `run.max_discarded` of them in a row.
    """
    try:
        yield
        return
    except NonFiniteError as found:
        error = found
    r = config.rollout
    if state.groups is None:  # it was never sampled, and would be no other when sampled again
        state.batch += 1
        state.problems += r.problems_per_step * r.curriculum
    file = _write(run, state, error)
    state.groups = None
    state.discarded += 1
    undo()
    if state.discarded > config.run.max_discarded:
        count, state.discarded = state.discarded, 0
        raise NonFiniteError(
            f"{count} batches in a row came to nothing, the last since {error} ({file}): a lower "
            "optimizer.learning_rate, or another model.compute_dtype?"
        ) from error
    warn(f"step {state.step + 1} is not taken: {error}; its batch is in {file}")


def _write(run: RunDirectory, state: State, error: NonFiniteError):
    run.check_is_there()
    folder = run / FOLDER
    folder.mkdir(exist_ok=True)
    file = folder / f"batch-{state.batch:06d}.json"
    groups = [group_document(group) for group in state.groups or []]
    document = {"step": state.step + 1, "batch": state.batch, "error": str(error)}
    write_atomic(file, json.dumps(_plain({**document, "groups": groups}), allow_nan=False))
    for old in sorted(folder.glob("batch-*.json"))[:-KEPT]:
        old.unlink()
    return file


def _plain(value: Any) -> Any:
    """The same with texts for the numbers that JSON has not."""
    if isinstance(value, dict):
        return {key: _plain(x) for key, x in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(x) for x in value]
    return str(value) if isinstance(value, float) and not isfinite(value) else value
