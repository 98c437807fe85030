"""What child processes print: read as they go, so that none of them waits, and kept within bounds.

Nobody has said where it goes while rewards are loaded. Until then it is kept; `send_to` says where.
Of one call `PER_CALL` bytes are kept. A `LogFile` that is full becomes NAME.1, in the place of an
older one, so that there are never more than twice `MOST` bytes, and the last ones are always there.
"""

from __future__ import annotations

import logging
import os
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

__all__ = ["LogFile", "Output"]

PER_CALL, MOST = 64 * 2**10, 8 * 2**20
_PENDING = 64  # pieces
_PIECE = 64 * 2**10
_log = logging.getLogger(__name__)


class Output:
    """What the children of several workers print. Several threads may use it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._pending: list[bytes] = []
        self._sink: Callable[[bytes], None] | None = None
        self._left: dict[str, int] = {}
        self._heads: dict[str, str] = {}
        self._children: weakref.WeakSet[Any] = weakref.WeakSet()

    def add(self, worker: Any) -> None:
        """Let `close` close that worker, too."""
        self._children.add(worker)

    def close(self) -> None:
        """End the children of the workers, and take what they have printed until then."""
        for worker in list(self._children):
            worker.close()

    def follow(self, stream: IO[bytes], name: str) -> threading.Thread:
        """Read what the child of that name prints until it ends."""
        self.begin(name, "loading")
        thread = threading.Thread(target=self._read, args=(stream, name), daemon=True)
        thread.start()
        return thread

    def begin(self, name: str, what: str) -> None:
        """From here on a child prints for something else, which gets a line if it prints."""
        with self._lock:
            self._left[name] = PER_CALL
            self._heads[name] = f"--- {time.strftime('%Y-%m-%d %H:%M:%S')} {name}, {what}\n"

    def send_to(self, sink: Callable[[bytes], None]) -> None:
        """Hand over what was printed, and from now on what is."""
        with self._lock:
            self._sink = sink
            for piece in self._pending:
                self._hand_over(piece)
            self._pending.clear()

    def _read(self, stream: IO[bytes], name: str) -> None:
        with stream:
            while piece := stream.read1(_PIECE):
                with self._lock:
                    self._take(piece, name)

    def _take(self, piece: bytes, name: str) -> None:
        left = self._left[name]
        if left <= 0:
            return
        kept = self._heads.pop(name, "").encode() + piece[:left]
        self._left[name] = left - len(piece)
        if self._left[name] <= 0:
            kept += f"\n... (of one call {PER_CALL} bytes are kept)\n".encode()
        if self._sink is not None:
            self._hand_over(kept)
        elif len(self._pending) < _PENDING:
            self._pending.append(kept)

    def _hand_over(self, piece: bytes) -> None:
        try:
            self._sink(piece)
        except OSError as error:  # a full disk ends a run where it writes what matters
            _log.warning("warning: what rewards print cannot be written: %s", error)
            self._sink = lambda _: None


class LogFile:
    """A file of bounded size that is added to."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __call__(self, piece: bytes) -> None:
        """Add to it. Raises OSError."""
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0)
        with open(os.open(self._path, flags, 0o666), "ab") as file:
            file.write(piece)
            full = file.tell() > MOST
        if full:
            self._path.replace(self._path.with_name(f"{self._path.name}.1"))
