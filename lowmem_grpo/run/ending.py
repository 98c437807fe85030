"""What an error leaves of a run: the last whole step, saved, and words that say where."""

from collections.abc import Callable
from pathlib import Path
from types import TracebackType

from lowmem_grpo.errors import DamageError, StorageError
from lowmem_grpo.policy.integrity import IntegrityError
from lowmem_grpo.run.checkpoint import newest_sound

__all__ = ["Ending"]


class Ending:
    """A context manager around the steps. `resumed`: the checkpoint that they go on from, if they
    do. `save()` writes what is in hand and returns where.

    `whole`: whether what is in hand may be saved. False until the run has begun, and from where the
    adapters begin to move until the step's lines are written: what was saved before goes on there.
    """

    def __init__(
        self,
        run_path: Path,
        resumed: Path | None,
        save: Callable[[], Path],
        warn: Callable[[str], None],
    ):
        self._run_path, self._save, self._warn = run_path, save, warn
        self.whole = False
        self._saved = resumed

    def saved(self, path: Path) -> Path:
        """A checkpoint was written; returns it. To be named where it can no longer be read."""
        self._saved = path
        return path

    def __enter__(self) -> "Ending":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        # A second Ctrl-C is no Exception, and waits for nothing. What was computed with a base that
        # has changed is not worth keeping.
        if not isinstance(error, Exception) or isinstance(error, IntegrityError):
            return
        # What it names tells it from a reward's, or a server's, that could not be reached.
        of_the_run = isinstance(error, OSError) and str(self._run_path) in str(
            error.filename or error
        )
        problem = error if of_the_run else None
        if self.whole:
            try:
                self._warn(f"the run ends here, saved in {self._save()}")
            except OSError as another:
                problem = another
        if problem is not None:
            raise StorageError(
                f"cannot write the run: {problem}; {self._last()}; mend it, then --resume"
            ) from error

    def _last(self) -> str:
        try:
            path = newest_sound(self._run_path)
        except (OSError, DamageError):
            path = None
        if path is not None:
            return f"the last good checkpoint is {path}"
        if self._saved is not None:
            return f"the last good checkpoint is {self._saved}, which cannot be read now"
        return "there is no checkpoint yet"
