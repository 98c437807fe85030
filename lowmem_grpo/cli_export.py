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
    type=click.Choice(["adapter", "merged", "base16", "gguf"]),
    default="adapter",
    show_default=True,
    help="adapter: PEFT's; merged: one 16-bit model; base16: its base alone, in 16 bits; gguf: the "
    "adapter for llama.cpp.",
)
@click.option(
    "--output", required=True, type=click.Path(path_type=Path), help="A new or empty directory."
)
@click.option(
    "--base-model",
    metavar="OWNER/NAME",
    help="With adapter: the name under which others find its base.",
)
@BEST
@QUIET
def export(
    run: str, kind: str, output: Path, base_model: str | None, best: bool, quiet: bool
) -> None:
    """Take a trained adapter out of a run. What is written has been compared with the policy."""
    read_options()  # before torch
    from lowmem_grpo.run.console import Console
    from lowmem_grpo.run.export import adapter_directory, check_output, exported_step

    if base_model is not None and kind != "adapter":
        raise click.UsageError(f"--base-model is for --format adapter, not {kind}")
    source, console = Path(run), Console(quiet=quiet)
    adapter = adapter_directory(source, best, console.warn)
    config = read_config(str(source / "config.toml"), None, (), {})
    of = source, exported_step(adapter)
    check_output(output)
    if kind == "adapter":
        _export_adapter(config, adapter, output, base_model, console, of)
    elif kind == "gguf":
        _export_gguf(config, adapter, output, console, of)
    else:
        _export_plain(config, adapter, output, kind == "merged", console, of)


def _open(config, adapter: Path, console):
    """The policy, with the head as it is in the files, and the embedding where it can be written
    from.
    """
    from lowmem_grpo.setup import open_policy

    whole = config.settled({"model.lm_head_bits": 16, "memory.embedding_on_host": False}, "export")
    return open_policy(whole, console.say, adapter=adapter)


def _export_adapter(config, adapter: Path, output: Path, base_model, console, of) -> None:
    """The adapter with what others need to use it. `of`: the run, and the step that it is of."""
    from lowmem_grpo.run.card import model_card
    from lowmem_grpo.run.compare import check_adapter, probe_policy
    from lowmem_grpo.run.export import export_adapter, exported_to
    from lowmem_grpo.run.sharing import loading_snippet, shared_base

    policy, base = _open(config, adapter, console), shared_base(config.model.name, base_model)
    probed, state = probe_policy(policy), policy.adapter_state()
    device, tokenizer, dtype = policy.device, policy.tokenizer, str(policy.dtype)[len("torch.") :]
    policy.release()
    del policy  # plain PEFT is loaded in its place
    with exported_to(output) as partial:
        export_adapter(adapter, partial, base.name, tokenizer)
        check_adapter(partial, config.model.name, device, probed, state)
        use = loading_snippet(config, base, output.name, dtype)
        (partial / CARD).write_text(model_card(of[0], config, "LoRA adapter", of[1], base, use))
    click.echo(f"{output}: adapter from {adapter}")
    if base.remark is not None:
        click.echo("; ".join(filter(None, (base.remark, base.way_out))))


def _export_plain(config, adapter: Path, output: Path, adapters: bool, console, of) -> None:
    """The policy as a plain 16-bit model, with its adapters or without. `of`: the run, and the step
    that it is of.
    """
    from lowmem_grpo.run.card import model_card
    from lowmem_grpo.run.compare import check_plain, compare, probe_policy
    from lowmem_grpo.run.export import exported_to
    from lowmem_grpo.run.merge import merge

    policy = _open(config, adapter, console)
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


def _export_gguf(config, adapter: Path, output: Path, console, of) -> None:
    """The adapter as llama.cpp loads it. `of`: the run, and the step that it is of."""
    from lowmem_grpo.policy.skeleton import read_model_config
    from lowmem_grpo.run.card import model_card
    from lowmem_grpo.run.export import exported_to
    from lowmem_grpo.run.gguf_adapter import (
        check_architecture,
        check_gguf_adapter,
        write_gguf_adapter,
    )

    check_architecture(read_model_config(config.model.name).model_type)
    policy, file = _open(config, adapter, console), "adapter.gguf"
    with exported_to(output) as partial:
        write_gguf_adapter(policy, partial / file, of[0].name)
        layers = check_gguf_adapter(policy, partial / file)
        (partial / CARD).write_text(model_card(of[0], config, "LoRA adapter in GGUF", of[1]))
    click.echo(f"{output / file}: adapter from {adapter}, {layers} layers, for llama.cpp's --lora")
