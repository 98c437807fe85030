"""Commands about memory: replay. No torch at import."""

from pathlib import Path

import click

from lowmem_grpo.cli_options import JSON, print_json

__all__ = ["memory"]


@click.group()
def memory() -> None:
    """What a card's memory held, and how the allocator came to it."""


@memory.command()
@click.argument("snapshots", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--device", type=int, help="Which device's trace, where a snapshot has several.")
@JSON
def replay(snapshots: tuple[Path, ...], device: int | None, as_json: bool) -> None:
    """Replay torch.cuda memory snapshots through the allocator simulator.

    Compares every address, every new segment and the totals with what the card reported. Exits
    with 1 when something differs. The files are read as plain data: nothing in them is run.
    """
    from lowmem_grpo.memory.replay import replay as run_replay
    from lowmem_grpo.memory.report import replay_json, replay_table

    reports = [run_replay(path, device=device) for path in snapshots]
    if as_json:
        print_json(replay_json(reports))
    else:
        from rich.console import Console

        Console().print(replay_table(reports))
    if not all(report.exact for report in reports):
        raise SystemExit(1)
