"""What a person sees: a progress bar for the phase in hand with tokens a second, and one line a
step.

With `quiet`, nothing but errors and, at the end, results.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from rich.console import Console as RichConsole
from rich.progress import BarColumn, Progress, ProgressColumn, SpinnerColumn, TextColumn
from rich.text import Text

__all__ = ["Console"]


class _Rate(ProgressColumn):
    """Tokens a second since the phase began."""

    def render(self, task) -> Text:
        if not task.elapsed or not task.completed:
            return Text("")
        return Text(f"{task.completed:,.0f} tokens, {task.completed / task.elapsed:,.0f}/s")


class Console:
    """Standard error, so that standard output stays a program's own."""

    def __init__(self, *, quiet: bool = False):
        self.quiet = quiet
        self.rich = RichConsole(stderr=True, highlight=False, soft_wrap=True)

    def say(self, text: str) -> None:
        """A line for the person."""
        if not self.quiet:
            self.rich.print(text, markup=False)

    def warn(self, *texts: str) -> None:
        """Lines that also `quiet` does not swallow."""
        for text in texts:
            self.rich.print(f"warning: {text}", markup=False, style="yellow")

    @contextlib.contextmanager
    def progress(self, name: str, total: int | None) -> Iterator[Callable[[int], None]]:
        """A bar over `total` tokens (None: unknown); yields the function that is told of tokens
        done.
        """
        if self.quiet or not self.rich.is_terminal:
            yield lambda tokens: None
            return
        columns = SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), _Rate()
        with Progress(*columns, console=self.rich, transient=True) as bars:
            task = bars.add_task(name, total=total)
            yield lambda tokens: bars.advance(task, tokens)

    def step(self, record: dict[str, Any], steps: int) -> None:
        """The one line of a step."""
        self.say(step_line(record, steps))


def step_line(record: dict[str, Any], steps: int) -> str:
    """A step's record as a line: reward and spread, KL, entropy, lengths, seconds by phase."""
    seconds = record["seconds"]
    parts = [
        f"step {record['step']:>{len(str(steps))}}/{steps}",
        f"reward {record['reward_mean']:.3f} ±{record['reward_std']:.2f}",
        f"loss {record['loss']:+.4f}",
    ]
    if record["kl"] is not None:
        parts.append(f"kl {record['kl']:.4f}")
    if record["entropy"] is not None:
        parts.append(f"entropy {record['entropy']:.2f}")
    parts += [
        f"grad {record['grad_norm']:.2f}",
        f"length {record['completion_length_mean']:.0f}",
        f"{seconds.get('total', 0.0):.1f} s ("
        + ", ".join(f"{k} {v:.1f}" for k, v in seconds.items() if k != "total" and v >= 0.05)
        + ")",
    ]
    return "  ".join(parts)
