"""The command `score`: rewards of given completions, without a model and without torch."""

from __future__ import annotations

from typing import Any

import click

from lowmem_grpo.cli_options import JSON, QUIET, options, print_json, setting

__all__ = ["score"]

_SHOWN = 72


@click.command()
@click.argument("run_file", required=False, type=click.Path(dir_okay=False), metavar="[RUN.toml]")
@click.option(
    "--set", "assignments", multiple=True, metavar="SECTION.KEY=VALUE", help="Any setting."
)
@options((setting("--task", "task.name", help="records:FILE, with a row for each completion."),))
@click.option(
    "--reward",
    "rewards",
    multiple=True,
    help="As in train; without one, what training would take for these answers; repeatable.",
)
@click.option(
    "--completion-column", default="completion", show_default=True, help="Where completions are."
)
@click.option(
    "--expected-column",
    help="A column that says whether a completion is right: true or false, or the total itself.",
)
@JSON
@QUIET
def score(
    run_file, assignments, rewards, completion_column, expected_column, as_json, quiet, **flags
) -> None:
    """Score given completions as training would, and say what was read out of each."""
    from lowmem_grpo.config import load_config, parse_assignment
    from lowmem_grpo.errors import RewardError
    from lowmem_grpo.isolation.output import Output
    from lowmem_grpo.score_file import NO_ANSWER, open_given_rewards, read_given, score_given

    layers = [("--set", parse_assignment(text)) for text in assignments]
    if flags["task__name"]:
        layers.append(("command line", {"task": {"name": flags["task__name"]}}))
    if rewards:
        layers.append(("command line", {"rewards": {"functions": list(rewards)}}))
    config = load_config(run_file, profile=None, assignments=layers)
    given = read_given(config, completion_column)
    output = Output()
    output.send_to(_to_standard_error)
    opened = open_given_rewards(given, config, output)
    specs = ", ".join(config.rewards.functions or given.task.default_rewards)
    if not quiet:
        for line in (f"rewards: {specs}", *given.lines):
            click.echo(line, err=True)
    scored = score_given(given, opened, config)
    output.close()
    expected = _expected(given, expected_column)
    agrees = [_agrees(each.total, wanted) for each, wanted in zip(scored, expected, strict=True)]
    if as_json:
        print_json([
            {
                "where": place,
                "completion": text,
                "rewards": each.values,
                "total": each.total,
                "why": each.why,
                **({} if agree is None else {"as_expected": agree}),
            }
            for place, text, each, agree in zip(
                given.places, given.completions, scored, agrees, strict=True
            )
        ])  # fmt: skip
    else:
        if not quiet:
            for row in zip(given.places, given.completions, scored, agrees, strict=True):
                _print_row(*row)
        _print_totals(scored, agrees, expected_column)
    for name in scored[0].values:
        asked = [each for each in scored if each.why.get(name) != NO_ANSWER]
        if asked and all(each.values[name] is None for each in asked):
            why = asked[0].why.get(name, "it returned None")
            raise RewardError(f"reward '{name}' has no value for any completion: {why}")


def _print_row(place: str, text: str, each: Any, agrees: bool | None) -> None:
    mark = "" if agrees is not False else "  NOT AS EXPECTED"
    click.echo(f"{place}: {_number(each.total)}{mark}  {_cut(text)}")
    for name, value in each.values.items():
        why = each.why.get(name)
        click.echo(f"    {name} {_number(value)}{f'  {why}' if why else ''}")


def _print_totals(scored: list[Any], agrees: list[bool | None], column: str | None) -> None:
    count = len(scored)
    for name in scored[0].values:
        values = [each.values[name] for each in scored]
        there = [value for value in values if value is not None]
        mean = f"mean {sum(there) / len(there):.3f}, " if there else ""
        full, zero = sum(value == 1.0 for value in there), sum(value == 0.0 for value in there)
        none = f", none for {count - len(there)}" if len(there) < count else ""
        click.echo(f"{name}: {mean}1 for {full} of {count}, 0 for {zero}{none}")
    click.echo(f"total: mean {sum(each.total for each in scored) / count:.3f}")
    if column is not None:
        said = [agree for agree in agrees if agree is not None]
        click.echo(f"as '{column}' says: {sum(said)} of {len(said)}")


def _expected(given: Any, column: str | None) -> list[Any]:
    from lowmem_grpo.errors import ConfigError, nearest

    if column is None:
        return [None] * len(given.rows)
    if column not in (names := given.rows[0]):
        raise ConfigError(
            f"--expected-column {column}: there is no such column{nearest(column, names)}"
        )
    return [row.get(column) for row in given.rows]


def _agrees(total: float, wanted: Any) -> bool | None:
    """Whether a total is as expected; None where nothing is."""
    if isinstance(wanted, str) and wanted.strip().lower() in ("true", "false"):
        wanted = wanted.strip().lower() == "true"
    if isinstance(wanted, bool):
        return (total > 0.0) == wanted
    try:
        return None if wanted is None else abs(total - float(wanted)) < 1e-6
    except (TypeError, ValueError):
        return False


def _number(value: float | None) -> str:
    return "none" if value is None else f"{value:.4g}"


def _cut(text: str) -> str:
    shown = repr(text)
    return shown if len(shown) <= _SHOWN else f"{shown[: _SHOWN - 3]}..."


def _to_standard_error(piece: bytes) -> None:
    """Where a person sees what functions print, and a program that reads the results does not."""
    click.echo(piece, err=True, nl=False)
