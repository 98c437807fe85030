"""Processes as this side numbers them."""

from pathlib import Path


def family(pid):
    """The process and all below it, as this side numbers them."""
    found = [pid]
    for one in found:
        found += map(int, Path(f"/proc/{one}/task/{one}/children").read_text().split())
    return found
