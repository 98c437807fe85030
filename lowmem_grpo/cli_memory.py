"""Commands about memory: plan, replay. No torch at import."""

from pathlib import Path

import click

from lowmem_grpo.cli_options import JSON, SHAPE, SHARED, options, print_json, read_config

__all__ = ["memory", "plan"]


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


@click.command()
@options(SHARED, SHAPE)
@JSON
def plan(run_file, profile, assignments, as_json, **flags) -> None:
    """Memory of every phase on a card, before anything is loaded: no GPU, no weights.

    Exits with 3 when it does not fit the card.
    """
    from lowmem_grpo.hardware import detect
    from lowmem_grpo.memory.plan import make_plan, plan_card
    from lowmem_grpo.profiles import choose_profile

    config = read_config(run_file, profile, assignments, flags)
    chosen = choose_profile(profile, detect(config.model.device)).value
    found = make_plan(config, plan_card(chosen), chosen.name)
    if as_json:
        print_json(found.to_json())
    else:
        from rich.console import Console

        Console().print(_plan_table(found))
    if found.fits and not as_json:
        click.echo(found.verdict())
    if not found.fits:
        click.echo(f"error: {found.verdict()}", err=True)
        raise SystemExit(3)


def _plan_table(found):
    """A row for each phase, in MiB: its peaks, and the largest of what is alive at the first."""
    from rich.table import Table

    mib = 1024**2
    table = Table(title=f"{found.model} on {found.card.name}: predicted (MiB)")
    table.add_column("phase", no_wrap=True)
    for title in ("allocated", "reserved"):
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("largest components")
    for phase in found.phases:
        largest = sorted(phase.components.items(), key=lambda item: -item[1])[:4]
        table.add_row(
            phase.name,
            f"{phase.peak_allocated_bytes / mib:.0f}",
            f"{phase.peak_reserved_bytes / mib:.0f}",
            ", ".join(f"{name} {size / mib:.0f}" for name, size in largest if size),
        )
    return table
