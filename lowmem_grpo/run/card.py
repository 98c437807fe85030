"""A model card: what a run was, in a page of Markdown beside what was exported."""

from pathlib import Path
from statistics import fmean
from typing import Any

from lowmem_grpo.run.directory import read_lines
from lowmem_grpo.run.sharing import SharedBase, shared_base

__all__ = ["model_card"]

ROWS = 10  # of the table of rewards
OUTPUT = "run", "output"  # a path of the machine it ran on


def model_card(
    run_path: Path,
    config,
    what: str,
    step: int,
    base: SharedBase | None = None,
    use: str | None = None,
) -> str:
    """The card of `what` was exported ("LoRA adapter", "merged 16-bit model") from a run, as it was
    after `step`. `base`: by another name than the run's; `use`: how it is loaded, in Markdown.
    """
    base = shared_base(config.model.name) if base is None else base
    metrics = _lines(run_path / "metrics.jsonl", step)
    evaluations = _lines(run_path / "eval.jsonl", step)
    named = f"base_model: {base.name}\n" if base.is_public else ""
    parts = [
        f"---\n{named}library_name: {'peft' if 'adapter' in what else 'transformers'}",
        "tags: [grpo, lora, lowmem-grpo]\n---\n",
        f"# {run_path.name}\n",
        f"A {what} trained by GRPO (arXiv 2402.03300) from {base.name} in NF4 on "
        f"`{config.task.name}`, {len(metrics)} steps, by lowmem-grpo.\n",
    ]
    if base.remark is not None:
        parts += [f"Note: {base.remark}.\n"]
    if use is not None:
        parts += ["## Use\n", use]
    if evaluations:
        parts += ["## Held-out problems\n", *_accuracies(evaluations), ""]
    if metrics:
        parts += ["## Reward\n", *_rewards(metrics), ""]
    parts += ["## Settings that are not the defaults\n", *_settings(config), ""]
    return "\n".join(parts)


def _accuracies(evaluations: list[dict[str, Any]]) -> list[str]:
    rows = ["| after step | problems | strict | 95% | lenient | 95% |", "|---|---|---|---|---|---|"]
    chosen = [evaluations[0], evaluations[-1]] if len(evaluations) > 1 else evaluations
    for found in chosen:
        cells = [str(found["step"]), str(found["problems"])]
        for name in ("strict", "lenient"):
            low, high = found[f"{name}_interval"]
            cells += [f"{found[f'{name}_accuracy']:.1%}", f"{low:.1%} to {high:.1%}"]
        rows.append(f"| {' | '.join(cells)} |")
    return rows


def _rewards(metrics: list[dict[str, Any]]) -> list[str]:
    size = -(-len(metrics) // ROWS)
    rows = ["| steps | mean reward | completion tokens |", "|---|---|---|"]
    for at in range(0, len(metrics), size):
        part = metrics[at : at + size]
        reward = fmean(record["reward_mean"] for record in part)
        length = fmean(record["completion_length_mean"] for record in part)
        rows.append(f"| {part[0]['step']} to {part[-1]['step']} | {reward:.3f} | {length:.0f} |")
    return rows


def _settings(config) -> list[str]:
    defaults, own = type(config)().model_dump(mode="json"), config.model_dump(mode="json")
    return [
        f"- `{section}.{key} = {value!r}`"
        for section, entries in own.items()
        for key, value in entries.items()
        if value != defaults[section][key] and section != "memory" and (section, key) != OUTPUT
    ]


def _lines(path: Path, step: int) -> list[dict[str, Any]]:
    found = list(read_lines(path)) if path.is_file() else []
    return [record for record in found if record["step"] <= step]
