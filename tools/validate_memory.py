#!/usr/bin/env python3
"""Predict runs whose memory somebody published, and print predicted beside published.

    python tools/validate_memory.py [--snapshots DIRECTORY] [--differences] [--json]

Everything is traced on fake tensors and simulated: no GPU, no weights, about a minute. With
`--snapshots` (a directory that holds tinyllama_nf4_lora_fwd_bwd.pickle) the published numbers of
the first run are read from the recording itself, and `--differences` lists the allocation sizes
that do not agree. The runs lie in tools/published/: `tinyllama.py` a recorded run, `runs.py` what
the makers of other trainers report, `counted.py` what is counted by hand or not comparable.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from published.counted import counted_rows
from published.runs import RUNS, predict
from published.table import as_text
from published.tinyllama import RECORDED, differences, validate_tinyllama

from lowmem_grpo.quiet import quiet_libraries


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--snapshots", type=Path, help="directory of recorded snapshots")
    parser.add_argument("--differences", action="store_true", help="list sizes that do not agree")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    options = parser.parse_args()
    snapshot = options.snapshots and options.snapshots / RECORDED
    rows, events = validate_tinyllama(snapshot)
    with quiet_libraries():
        rows += [predict(run) for run in RUNS]
    rows += counted_rows()
    if options.json:
        json.dump([row.as_dict() for row in rows], sys.stdout)
        print()
        return
    print(as_text(rows))
    if options.differences and snapshot:
        for size, ours, theirs in differences(events, snapshot):
            print(f"{size:12} predicted {ours:5} recorded {theirs:5}")


if __name__ == "__main__":
    main()
