"""The command `export`: a trained adapter in the formats in which others take it."""

from __future__ import annotations

from pathlib import Path

import click

from lowmem_grpo.allocator_options import read_options
from lowmem_grpo.cli_options import BEST, QUIET, read_config

__all__ = ["export"]

CARD = "README.md"


@click.command()
@click.argument("run", metavar="RUN")
@click.option(
    "--format",
    "kind",
    type=click.Choice(["adapter", "merged", "base16"]),
    default="adapter",
    show_default=True,
    help="adapter: PEFT's; merged: one 16-bit model; base16: its base alone, in 16 bits.",
)
@click.option(
    "--output", required=True, type=click.Path(path_type=Path), help="A new or empty directory."
)
@BEST
@QUIET
def export(run: str, kind: str, output: Path, best: bool, quiet: bool) -> None:
    """Take a trained adapter out of a run. What is written has been compared with the policy."""
    read_options()  # before torch
    from lowmem_grpo.run.card import model_card
    from lowmem_grpo.run.console import Console
    from lowmem_grpo.run.export import (
        adapter_directory,
        check_output,
        export_adapter,
        exported_step,
        exported_to,
    )

    source, console = Path(run), Console(quiet=quiet)
    adapter = adapter_directory(source, best, console.warn)
    config = read_config(str(source / "config.toml"), None, (), {})
    step = exported_step(adapter)
    check_output(output)
    if kind == "adapter":
        with exported_to(output) as partial:
            export_adapter(adapter, partial)
            (partial / CARD).write_text(model_card(source, config, "LoRA adapter", step))
        click.echo(f"{output}: adapter from {adapter}")
        return
    _export_plain(config, adapter, output, kind == "merged", console, (source, step))


def _export_plain(config, adapter: Path, output: Path, adapters: bool, console, of) -> None:
    """The policy as a plain 16-bit model, with its adapters or without. `of`: run and step."""
    from lowmem_grpo.run.card import model_card
    from lowmem_grpo.run.compare import check_plain, compare, probe_policy
    from lowmem_grpo.run.export import exported_to
    from lowmem_grpo.run.merge import merge
    from lowmem_grpo.setup import open_policy

    # The head as it is in the files, and the embedding where it can be written from.
    whole = config.settled({"model.lm_head_bits": 16, "memory.embedding_on_host": False}, "export")
    policy = open_policy(whole, console.say, adapter=adapter)
    what = "merged 16-bit model" if adapters else "16-bit base"
    with exported_to(output) as partial:
        dtype = merge(policy, partial, adapters=adapters)
        said = check_plain(policy, partial, dtype, adapters)
        (partial / CARD).write_text(model_card(of[0], config, what, of[1]))
    name = str(dtype).removeprefix("torch.")
    if not adapters:
        click.echo(f"{output}: the base of {adapter}, {name}")
        return
    click.echo(f"{output}: merged from {adapter}, {name}")
    if config.model.lm_head_bits == 8:
        policy.round_head()  # what was trained
    click.echo(compare(probe_policy(policy), said).line())
