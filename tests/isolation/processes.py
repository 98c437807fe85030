"""Processes as this side numbers them."""

import time
from pathlib import Path


def family(pid):
    """The process and all below it, as this side numbers them."""
    found = [pid]
    for one in found:
        found += map(int, Path(f"/proc/{one}/task/{one}/children").read_text().split())
    return found


def gone(pids):
    """Whether they have ended, now or soon."""
    for _ in range(100):
        if not any(map(runs, pids)):
            return True
        time.sleep(0.05)
    return False


def runs(pid):
    try:
        return ") Z " not in Path(f"/proc/{pid}/stat").read_text()  # ended, and not yet waited for
    except FileNotFoundError:
        return False
