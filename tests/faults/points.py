"""Inside a child: which phases of a run begin and end, and what happens to it at one of them.

The loop's own functions are wrapped, in the child alone. A phase that is begun is a line of the
log, so that the phases of a run and of those that resumed it can be counted together.
"""

import functools
import importlib
import inspect
import os
from collections import Counter
from pathlib import Path
from typing import Any
from unittest import mock

__all__ = ["PHASES", "watch_phases"]

PHASES = {
    "rollout": "roll_out",
    "reward": "judge",
    "reference": "score_reference",
    "update": "accumulate",
    "optimizer": "apply_update",
    "evaluation": "evaluate",
}


def watch_phases(log: str, point: dict[str, Any] | None) -> None:
    """Write `begin NAME` and `end NAME` into `log`. `point`: {"phase", "where", "turn", "number"};
    the process gets signal `number` when the phase is there for the `turn`-th time: at its "begin",
    at its "end", or "inside", which is when some of its tokens are done.
    """
    loop = importlib.import_module("lowmem_grpo.train")
    turns: Counter[tuple[str, str]] = Counter()
    lines = Path(log).open("a", encoding="utf-8")  # noqa: SIM115 - as long as the process

    def reach(phase: str, where: str) -> None:
        turns[phase, where] += 1
        if where != "inside":
            lines.write(f"{where} {phase}\n")
            lines.flush()
        if point and [phase, where, turns[phase, where]] == [
            point["phase"], point["where"], point["turn"],
        ]:  # fmt: skip
            os.kill(os.getpid(), point["number"])

    for phase, name in PHASES.items():
        function = getattr(loop, name)
        mock.patch.object(loop, name, _wrapped(function, phase, reach)).start()


def _wrapped(function, phase: str, reach):
    signature = inspect.signature(function)

    @functools.wraps(function)
    def wrapped(*args, **kwargs):
        given = signature.bind(*args, **kwargs)
        if "advance" in given.arguments:
            advance = given.arguments["advance"]

            def inside(tokens: int) -> None:
                advance(tokens)
                reach(phase, "inside")

            given.arguments["advance"] = inside
        reach(phase, "begin")
        result = function(*given.args, **given.kwargs)
        reach(phase, "end")
        return result

    return wrapped
