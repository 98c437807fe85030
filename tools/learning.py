"""What training teaches the demo model on the CPU: held-out accuracy before and after on generators
of reasoning-gym, and the curves.

    python tools/learning.py --output runs/learning --picture docs/generators.png

trains what is not there yet, one after another, which takes a while on two cores, prints a table
and draws the curves. Runs that are there are shown as they are.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from statistics import fmean

from lowmem_grpo.run.directory import read_lines

GENERATORS = {
    "chain_sum": "reasoning_gym:chain_sum:min_terms=2,max_terms=3,min_digits=1,max_digits=1",
    "letter_counting": "reasoning_gym:letter_counting:min_words=3,max_words=5",
    "needle_haystack": "reasoning_gym:needle_haystack:min_num_statements=3,max_num_statements=6",
    "gcd": "reasoning_gym:gcd:min_value=1,max_value=40",
}
SETTINGS = [
    *("--model", "smollm2-135m", "--profile", "cpu"),
    *("--problems-per-step", "4", "--num-generations", "8"),
    *("--max-prompt-length", "512", "--max-completion-length", "12"),
    *("--set", "task.system_prompt=Answer with the result alone, and nothing else."),
    *("--set", "task.few_shot=2", "--set", "rollout.dynamic_sampling=2"),
    *("--set", "optimizer.learning_rate=1e-4", "--set", "eval.num_problems=200"),
]
WINDOW = 10  # steps of a running mean


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("runs/learning"))
    parser.add_argument("--picture", type=Path)
    parser.add_argument("--steps", type=int, default=100)
    arguments = parser.parse_args()
    runs = {name: arguments.output / name for name in GENERATORS}
    for name, run in runs.items():
        if not (run / "adapter").is_dir():
            _train(run, GENERATORS[name], arguments.steps)
    print(
        "| generator | held-out problems | before | after | mean reward, first and last ten steps |"
    )
    print("|---|---|---|---|---|")
    for name, run in runs.items():
        print(_row(name, run))
    if arguments.picture:
        _draw(runs, arguments.picture)


def _train(run: Path, task: str, steps: int) -> None:
    command = [sys.executable, "-m", "lowmem_grpo", "train", "--task", task, "--output", str(run)]
    resume = ["--resume"] if (run / "config.toml").is_file() else []
    every = ["--steps", str(steps), "--eval-every", str(steps // 2)]
    subprocess.run([*command, *SETTINGS, *every, *resume], check=True)


def _row(name: str, run: Path) -> str:
    evaluations = list(read_lines(run / "eval.jsonl"))
    rewards = [record["reward_mean"] for record in read_lines(run / "metrics.jsonl")]
    cells = [name, str(evaluations[0]["problems"])]
    for found in (evaluations[0], evaluations[-1]):
        low, high = found["strict_interval"]
        cells.append(f"{found['strict_accuracy']:.1%} ({low:.0%} to {high:.0%})")
    cells.append(f"{fmean(rewards[:WINDOW]):.2f}, {fmean(rewards[-WINDOW:]):.2f}")
    return f"| {' | '.join(cells)} |"


def _draw(runs: dict[str, Path], picture: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4))
    for name, run in runs.items():
        rewards = [record["reward_mean"] for record in read_lines(run / "metrics.jsonl")]
        means = [fmean(rewards[max(0, i - WINDOW + 1) : i + 1]) for i in range(len(rewards))]
        (line,) = left.plot(range(1, len(means) + 1), means, label=name)
        left.plot(range(1, len(rewards) + 1), rewards, color=line.get_color(), alpha=0.2)
        found = list(read_lines(run / "eval.jsonl"))
        accuracies = [evaluation["strict_accuracy"] for evaluation in found]
        spread = [
            [a - e["strict_interval"][0] for a, e in zip(accuracies, found, strict=True)],
            [e["strict_interval"][1] - a for a, e in zip(accuracies, found, strict=True)],
        ]
        steps = [evaluation["step"] for evaluation in found]
        right.errorbar(steps, accuracies, spread, label=name, capsize=3, marker="o")
    left.set(xlabel="step", ylabel=f"mean reward, running mean of {WINDOW}")
    right.set(xlabel="step", ylabel="held-out accuracy, 95% interval", ylim=(0, 1))
    left.legend()
    right.legend()
    figure.tight_layout()
    figure.savefig(picture, dpi=110)
    print(json.dumps({"picture": str(picture)}))


if __name__ == "__main__":
    main()
