"""Commands about the machine and what lies ready on it: doctor, profiles, model. No torch at
import.
"""

from pathlib import Path

import click

from lowmem_grpo.cli_options import JSON, QUIET, print_json

__all__ = ["doctor", "model", "profiles"]


@click.command()
@click.option(
    "--profile", default="auto", help="auto, a profile's name, or a file.", show_default=True
)
@click.option("--device", default="auto", help="auto, cpu, cuda or cuda:N.", show_default=True)
@JSON
def doctor(profile: str, device: str, as_json: bool) -> None:
    """What this machine is, what was chosen for it and why."""
    from lowmem_grpo.allocator_options import read_options

    read_options()  # before torch, which some mistakes in them abort while it is loaded
    from lowmem_grpo.config import build_config
    from lowmem_grpo.doctor import examine, page
    from lowmem_grpo.hardware import detect
    from lowmem_grpo.policy.source import cache_directory
    from lowmem_grpo.profiles import choose_profile
    from lowmem_grpo.setup import choose

    chosen = choose_profile(profile, detect(device))
    origin = f"profile {chosen.value.name}"
    flags = ("--device", {"model": {"device": device}})
    machine, choices = choose(build_config([(origin, chosen.value.settings), flags]))
    report = examine(machine, {"profile": chosen, **choices}, cache_directory())
    print_json(report) if as_json else click.echo(page(report))


@click.group(invoke_without_command=True)
@click.pass_context
def profiles(ctx: click.Context) -> None:
    """Memory profiles, one a card."""
    if ctx.invoked_subcommand is None:
        ctx.invoke(profiles_list)


@profiles.command(name="list")
@JSON
def profiles_list(as_json: bool = False) -> None:
    """The profiles that are here."""
    from lowmem_grpo.profiles import list_profiles

    found = list_profiles()
    if as_json:
        print_json([profile.as_dict() for profile in found])
        return
    for profile in found:
        memory = profile.memory_bytes
        size = f"{memory / 2**30:5.1f} GiB" if memory else "   any   "
        click.echo(f"{profile.name:24} {size}  {profile.card['name']}")


@profiles.command(name="show")
@click.argument("name")
@JSON
def profiles_show(name: str, as_json: bool) -> None:
    """One profile: the card, the settings, and where the figures come from."""
    from lowmem_grpo.profiles import load_profile

    profile = load_profile(name)
    print_json(profile.as_dict()) if as_json else click.echo(
        profile.path.read_text("utf-8"), nl=False
    )


@profiles.command(name="detect")
@click.option("--write", is_flag=True, help="Write NAME.toml here instead of printing it.")
@JSON
def profiles_detect(write: bool, as_json: bool) -> None:
    """The profile that fits this machine, and one made for it."""
    from lowmem_grpo.errors import ConfigError
    from lowmem_grpo.hardware import detect
    from lowmem_grpo.profiles import choose_profile, detect_text, detected_name

    machine = detect()
    chosen = choose_profile("auto", machine)
    if as_json:
        print_json({"profile": chosen.value.as_dict(), "reason": chosen.reason})
        return
    click.echo(f"{chosen.value.name}: {chosen.reason}", err=True)
    if not write:
        click.echo(detect_text(machine), nl=False)
        return
    target = Path(f"{detected_name(machine)}.toml")
    if target.exists():
        raise ConfigError(f"{target} exists: move it away, or use it with --profile {target}")
    target.write_text(detect_text(machine), encoding="utf-8")
    click.echo(f"written to {target}; use it with --profile {target}")


@click.group()
def model() -> None:
    """Models in the local cache."""


@model.command(name="fetch")
@click.argument("name")
@QUIET
def model_fetch(name: str, quiet: bool) -> None:
    """Bring a model into the local cache: smollm2-135m, a Hub id, a .gguf file."""
    from lowmem_grpo.policy.source import fetch
    from lowmem_grpo.run.console import Console

    click.echo(str(fetch(name, Console(quiet=quiet).say)))
