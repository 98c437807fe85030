"""SIGINT and SIGTERM: the first asks the run to stop after the phase in hand, the second stops it
at once.
"""

import signal
from collections.abc import Callable
from types import FrameType

__all__ = ["StopRequest"]


class StopRequest:
    """Within, a signal sets `requested` to its name. Use it in the main thread (Python delivers
    signals there).
    """

    requested: str | None = None

    def __init__(self, warn: Callable[[str], None] = lambda text: None):
        """`warn` is told that it was heard."""
        self._warn = warn

    def __enter__(self) -> "StopRequest":
        self._before = {s: signal.signal(s, self._ask) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = signal.Signals(number).name
        self._warn(f"{self.requested}: stops after the phase in hand; once more: at once")
