"""Commands about memory: plan, profile, replay, report. No torch at import."""

from pathlib import Path

import click

from lowmem_grpo.allocator_options import read_options
from lowmem_grpo.cli_options import (
    ADAPTER,
    JSON,
    QUIET,
    SHAPE,
    SHARED,
    options,
    print_document,
    print_json,
    read_config,
)

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


@memory.command()
@click.argument("target", type=click.Path(path_type=Path), metavar="RUN|FILE")
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    help="Directory for the page and its pictures; by default RUN/report, or FILE-report.",
)
@click.option("--device", type=int, help="Which device's trace, where a snapshot has several.")
@JSON
def report(target: Path, output: Path | None, device: int | None, as_json: bool) -> None:
    """Write a page with tables and pictures of what memory held; prints its path.

    RUN is a run directory. FILE is what `plan --json` or `memory profile --json` printed, or a
    torch.cuda memory snapshot, which is read as plain data.
    """
    from lowmem_grpo.memory.report import write_report

    written = write_report(target, output, device)
    if as_json:
        print_json(written.to_json())
    else:
        click.echo(written.page)


@memory.command()
@options(SHARED, ADAPTER, SHAPE)
@click.option("--steps", type=click.IntRange(min=1), default=2, show_default=True)
@click.option("--snapshot", type=click.Path(path_type=Path), help="Keep CUDA's history there.")
@JSON
@QUIET
def profile(run_file, profile, assignments, steps, snapshot, as_json, quiet, **flags) -> None:
    """Run the phases for real on this device, at their longest, and compare them with the plan.

    Nothing is trained: adapters are fresh and thrown away.
    """
    read_options()  # before torch
    from lowmem_grpo.memory.profile import profile as run_profile
    from lowmem_grpo.run.console import Console

    console = Console(quiet=quiet or as_json)
    config = read_config(run_file, profile, assignments, flags, console.say)
    with console.progress("profile", None) as advance:
        found = run_profile(
            config, snapshot=snapshot, steps=steps, say=console.say, advance=advance
        )
    if as_json:
        print_document(found)
        return
    from rich.console import Console as RichConsole

    from lowmem_grpo.memory.report import comparison_table

    measured = found["measured"]
    title = f"{found['plan']['model']} on {measured['device']}: predicted and measured (MiB)"
    RichConsole().print(comparison_table(found["comparison"], title))
    click.echo(f"Measured: {measured['how']}.")


@click.command()
@options(SHARED, ADAPTER, SHAPE)
@click.option(
    "--solve",
    type=click.Choice(["max_completion_length", "num_generations"]),
    help="Find the largest value that fits, with memory settings on auto chosen for it.",
)
@JSON
def plan(run_file, profile, assignments, solve, as_json, **flags) -> None:
    """Memory of every phase on a card, before anything is loaded: no GPU, no weights.

    Exits with 3 when it does not fit the card.
    """
    read_options()  # before torch
    from lowmem_grpo.hardware import detect
    from lowmem_grpo.memory.admit import refusal, solved
    from lowmem_grpo.memory.card import machine_card, plan_card
    from lowmem_grpo.memory.plan import Planner
    from lowmem_grpo.memory.settle import settle
    from lowmem_grpo.profiles import choose_profile

    config = read_config(run_file, profile, assignments, flags)
    machine = detect(config.model.device)
    chosen = choose_profile(profile, machine).value
    card = machine_card(machine) if profile == "auto" else plan_card(chosen, machine)
    planner = Planner(config, card, chosen.name)
    if solve is not None:
        config = solved(planner, config, solve)
    settled, found = settle(planner, config)
    value = {} if solve is None else {solve: getattr(config.rollout, solve)}
    if as_json:
        print_document(found.to_json() | ({"solved": value} if value else {}))
    else:
        for name, most in value.items():
            click.echo(f"{name} = {most} ({config.sources[f'rollout.{name}']})")
        _print_plan(found, settled)
    if not found.fits:
        click.echo(f"error: {refusal(planner, config, found)}", err=True)
        raise SystemExit(3)


def _print_plan(found, config) -> None:
    from rich.console import Console

    Console().print(_plan_table(found))
    if found.card.options.line:
        click.echo(found.card.options.line)
    for key in config.chosen:
        click.echo(f"{key} = {found.settings[key]} ({config.sources[key]})")
    if found.fits:
        click.echo(found.verdict())


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
