"""The command `rollouts`: a pool of groups from the base, to train on."""

from pathlib import Path

import click

from lowmem_grpo.allocator_options import read_options
from lowmem_grpo.cli_options import QUIET, SHAPE, SHARED, options, read_config, setting

__all__ = ["rollouts"]


@click.command()
@options(SHARED, SHAPE, (setting("--seed", "run.seed", int, help="Of sampling."),))
@click.option(
    "--groups", "count", required=True, type=click.IntRange(min=1), help="How many, in all."
)
@click.option(
    "--output",
    required=True,
    type=click.Path(path_type=Path, file_okay=False),
    help="The pool's directory; one that was begun is gone on with.",
)
@QUIET
def rollouts(run_file, profile, assignments, count, output, quiet, **flags) -> None:
    """Sample groups from the base, score their tokens with it, and keep them: `train --pool`."""
    read_options()  # before torch
    from lowmem_grpo.hardware import detect
    from lowmem_grpo.memory.admit import admit
    from lowmem_grpo.memory.card import machine_card
    from lowmem_grpo.pool import fill, filling
    from lowmem_grpo.retry import Fitting
    from lowmem_grpo.run.console import Console
    from lowmem_grpo.setup import check_prompts, open_policy, open_task

    console = Console(quiet=quiet)
    assignments = (*assignments, "grpo.old_policy=base")
    config = read_config(run_file, profile, assignments, flags, console.say)
    config.check_trainable()
    config = config.settled({"rollout.pool": None}, "rollouts")  # which it makes
    task = open_task(config)
    check_prompts(task, config, console.say, training=count)
    config, plan, _ = admit(config, machine_card(detect(config.model.device)), console.say)
    with filling(output, config):
        policy = open_policy(config, console.say)
        predicted = {phase.name: phase.peak_allocated_bytes for phase in plan.phases}
        fitting = Fitting(config, policy, predicted, console.warn)
        with console.progress("groups", count) as advance:
            had = fill(policy, task, fitting, output, count, advance)
    console.say(f"{output}: {count} groups, {had} of them from before")
