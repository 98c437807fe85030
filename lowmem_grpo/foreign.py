"""A run directory that somebody else may have made: what its configuration does not get to do.

Continuing a run executes the reward functions that its `config.toml` names, and sends what a
judge's file asks for to where it says, with a key out of the environment. Of files that lie in the
run directory itself, that would be whoever made it deciding what runs here: they have to be named
on the command line. Files elsewhere are the user's own, as are the limits of what they may do;
those are said, and can be taken back. To refuse them would stop every run that its owner continues.
"""

from pathlib import Path

from lowmem_grpo.config import Config
from lowmem_grpo.errors import ConfigError

__all__ = ["check_code", "granted"]

HERE = ("command line", "--set")  # origins of what the person said just now


def check_code(config: Config) -> None:
    """Raises ConfigError for a reward whose file lies in the run directory and was not named on the
    command line.
    """
    if config.sources.get("rewards.functions") in HERE:
        return
    run = Path(config.run.output).resolve()
    for spec in config.rewards.functions:
        if (file := _file(spec)) and file.resolve().is_relative_to(run):
            raise ConfigError(
                f"--resume: the reward '{spec}' of the run's configuration is a file in the run "
                f"directory, which somebody else may have made: read it, and give it with "
                f"--reward {spec}, or keep it elsewhere"
            )


def _file(spec: str) -> Path | None:
    """What a reward is read from and goes by: FILE.py:function or judge:FILE.toml."""
    kind, _, rest = spec.partition(":")
    path = rest if kind == "judge" else spec.rpartition(":")[0]
    return Path(path).expanduser() if kind == "judge" or path.endswith(".py") else None


def granted(config: Config) -> list[str]:
    """What a run's configuration lets reward functions do that they may not by default, where the
    command line does not say so: a line each.
    """
    functions = [spec for spec in config.rewards.functions if _file(spec)]
    given = {
        "network": ("reach the network", "false"),
        "writable": (f"write in {', '.join(config.rewards.writable)}", "[]"),
    }
    return [
        f"the run's configuration lets {', '.join(functions)} {what}: "
        f"--set rewards.{key}={less} takes that back"
        for key, (what, less) in given.items()
        if functions
        and getattr(config.rewards, key)
        and config.sources.get(f"rewards.{key}") not in HERE
    ]
