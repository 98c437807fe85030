"""Show a run's reward curve and its held-out accuracy before and after: `python tools/show_curve.py
RUN`.
"""

import json
import sys
from pathlib import Path

from lowmem_grpo.run.directory import read_lines

BARS = " ▁▂▃▄▅▆▇█"


def main(run: Path) -> None:
    records = list(read_lines(run / "metrics.jsonl"))
    rewards = [record["reward_mean"] for record in records]
    low, high = min(rewards), max(rewards)
    levels = [round((r - low) / ((high - low) or 1) * (len(BARS) - 1)) for r in rewards]
    curve = "".join(BARS[n] for n in levels)
    print(f"mean reward, step 1 to {len(rewards)}: {curve}  {rewards[0]:.2f} -> {rewards[-1]:.2f}")
    evaluations = list(read_lines(run / "eval.jsonl"))
    before, after = evaluations[0], evaluations[-1]
    for name, meaning in (
        ("strict", "in the form that was asked for"),
        ("lenient", "any last number"),
    ):
        old, new = before[f"{name}_accuracy"], after[f"{name}_accuracy"]
        print(f"held-out accuracy, {name} ({meaning}): {old:.0%} before, {new:.0%} after")
    print(json.dumps({"run": str(run), "before": before, "after": after}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
