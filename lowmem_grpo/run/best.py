"""The best adapter of a run, by its evaluations on held-out problems: OUTPUT/best, in PEFT's
format, with best.json beside it, from which a resumed run goes on comparing.

Of equally good ones the first is kept, so the base itself where training never beat it.
"""

import shutil
from pathlib import Path
from typing import Any

from lowmem_grpo.checksum import checksums, read_sealed, sealed
from lowmem_grpo.run.checkpoint import save_adapter
from lowmem_grpo.run.directory import PARTIAL, RunDirectory, replace_directory, write_atomic
from lowmem_grpo.sections import EvalConfig

__all__ = ["BEST", "FILE", "Best", "read_best"]

BEST, FILE = "best", "best.json"
_WAY_OUT = "bring it back, or remove it: a resumed run keeps its next best"


class Best:
    """`settings.metric_for_best`: the name of a value in an evaluation's summary, of which more is
    better; None keeps nothing. What is there counts where its evaluation was like these, and not of
    a later step than `step`, which a resumed run takes again.
    """

    def __init__(self, run: RunDirectory, settings: EvalConfig, step: int):
        self._run, self._metric = run, settings.metric_for_best
        self._how = settings.model_dump(mode="json", exclude={"every", "batch_size"})
        self._most = None
        if (run / BEST / FILE).is_file():
            kept = read_best(run / BEST)
            if kept["how"] == self._how and kept["step"] <= step:
                self._most = kept["value"]
            elif kept["how"] == self._how:  # the step is taken again: what was best before it
                lines = run.lines("eval.jsonl")
                self._most = max(
                    (x[self._metric] for x in lines if x["step"] <= step), default=None
                )

    def offer(self, step: int, summary: dict[str, Any], policy, base_name: str) -> bool:
        """The adapters as they are now, after `step`, had this evaluation. Whether they were
        kept.
        """
        if self._metric is None:
            return False
        value = summary[self._metric]
        if self._most is not None and value <= self._most:
            return False
        self._run.check_is_there()
        partial = self._run / f".{BEST}{PARTIAL}"
        shutil.rmtree(partial, ignore_errors=True)
        save_adapter(partial, policy, base_name)
        document = {"step": step, "metric": self._metric, "value": value, "how": self._how}
        write_atomic(partial / FILE, sealed({**document, "files": checksums(partial)}))
        replace_directory(partial, self._run / BEST)
        self._most = value
        return True


def read_best(directory: Path) -> dict[str, Any]:
    """`best.json`. Raises DamageError where it, or a file beside it, is not what was written."""
    return read_sealed(directory / FILE, _WAY_OUT)
