#!/usr/bin/env python3
"""Measure the phases of a run on this device, compare them with their plan, and draw both.

    python tools/profile_memory.py DIRECTORY [options of `lowmem-grpo memory profile`]

Leaves in DIRECTORY: profile.json (plan, measurement and comparison), on a card snapshot.pickle (its
history of allocations, for `lowmem-grpo memory replay`), and a report with pictures. Progress goes
to standard error; the last line is one JSON object with the largest deviation.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from lowmem_grpo.memory.report import write_report

COMMAND = [sys.executable, "-m", "lowmem_grpo", "memory", "profile"]


def main(directory: Path, options: list[str]) -> int:
    directory.mkdir(parents=True, exist_ok=True)
    snapshot = directory / "snapshot.pickle"
    run = subprocess.run(
        [*COMMAND, *options, "--snapshot", str(snapshot), "--json"],
        stdout=subprocess.PIPE,
        text=True,
    )
    if run.returncode:
        return run.returncode
    profile = directory / "profile.json"
    profile.write_text(run.stdout, encoding="utf-8")
    report = write_report(profile, directory / "report")
    rows = json.loads(run.stdout)["comparison"]
    worst = max(rows, key=lambda row: abs(row["allocated_deviation"]))
    found = {"phase": worst["phase"], "allocated_deviation": worst["allocated_deviation"]}
    print(json.dumps({"profile": str(profile), "page": str(report.page), "worst": found}))
    return 0


if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
        sys.exit(__doc__)
    sys.exit(main(Path(sys.argv[1]), sys.argv[2:]))
