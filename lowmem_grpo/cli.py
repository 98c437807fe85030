"""The command line: parses, and calls one function for each command.

Imports inside commands only: `--help` and `--version` answer without torch.
"""

import logging
import sys
from pathlib import Path
from typing import Any

import click

from lowmem_grpo import __version__
from lowmem_grpo.allocator_options import read_options
from lowmem_grpo.cli_export import export
from lowmem_grpo.cli_machine import doctor, model, profiles
from lowmem_grpo.cli_memory import memory, plan
from lowmem_grpo.cli_options import (
    ADAPTER,
    BEST,
    JSON,
    QUIET,
    SHAPE,
    SHARED,
    TRAIN,
    options,
    print_json,
    read_config,
    read_target,
    setting,
)
from lowmem_grpo.cli_rollouts import rollouts
from lowmem_grpo.cli_score import score

__all__ = ["main"]

OUTPUT = "lowmem_grpo.output"  # the run's directory in click's `meta`, once it is known


class _Group(click.Group):
    """Turns errors that are meant for a person into one message and an exit code."""

    def invoke(self, ctx: click.Context) -> Any:
        from lowmem_grpo.errors import UserError

        try:
            return super().invoke(ctx)
        except (click.exceptions.Exit, click.ClickException, click.Abort, SystemExit):
            raise
        except UserError as error:
            if ctx.params.get("debug"):
                raise
            click.echo(f"error: {error}", err=True)
            ctx.exit(error.exit_code)
        except Exception as error:
            if ctx.params.get("debug"):
                raise
            from lowmem_grpo.defects import keep_traceback

            first = (str(error).strip().splitlines() or ["no message"])[0]
            kept = keep_traceback(error, ctx.meta.get(OUTPUT))
            where = f"its traceback is in {kept}" if kept else "--debug shows where"
            click.echo(f"error: {type(error).__name__}: {first} ({where})", err=True)
            ctx.exit(1)


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="lowmem-grpo")
@click.option("--debug", is_flag=True, help="Show tracebacks.")
def main(debug: bool) -> None:
    """GRPO on a 4-bit base with LoRA adapters, the whole loop on one consumer GPU."""
    # At import bitsandbytes says that an optional CPU kernel is not installed: nothing that a
    # person must act on.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


for command in (doctor, export, memory, model, plan, profiles, rollouts, score):
    main.add_command(command)


@main.command()
@options(SHARED, ADAPTER, SHAPE, TRAIN)
@click.option(
    "--reward",
    "rewards",
    multiple=True,
    help="number, math, task, FILE.py:function, ... (see the README); repeatable.",
)
@click.option("--resume", is_flag=True, help="Continue the run in --output.")
@click.option(
    "--allow-changed",
    multiple=True,
    metavar="SECTION.KEY",
    help="With --resume: a setting that may differ, though it changes the run; repeatable.",
)
@click.option("--overwrite", is_flag=True, help="Replace the run in --output.")
@click.option("--rehearse", is_flag=True, help="Run the longest planned shapes first.")
@QUIET
def train(
    run_file,
    profile,
    assignments,
    rewards,
    resume,
    allow_changed,
    overwrite,
    rehearse,
    quiet,
    **flags,
) -> None:
    """Train a model's adapters with GRPO."""
    if resume and overwrite:
        raise click.UsageError(
            "--resume continues a run and --overwrite replaces it: give one of them"
        )
    if allow_changed and not resume:
        raise click.UsageError("--allow-changed is for a run that is continued: use --resume")
    if resume and run_file is None:
        # The run's own settings, whatever the defaults and the profile say today.
        from lowmem_grpo.run.directory import check_directory

        output = flags["run__output"] or "runs/grpo"
        check_directory(output, resume=True, overwrite=False)
        run_file, profile = str(Path(output) / "config.toml"), None
        flags["run__output"] = output  # wherever the run was made
    flags["rewards__functions"] = list(rewards) or None
    from lowmem_grpo.run.console import Console

    console = Console(quiet=quiet)
    config = read_config(run_file, profile, assignments, flags, console.say)
    click.get_current_context().meta[OUTPUT] = config.run.output
    if resume:
        from lowmem_grpo.foreign import check_code, granted

        check_code(config)
        for text in granted(config):
            console.warn(text)
    from lowmem_grpo.train import train as run_training

    how = {"resume": resume, "overwrite": overwrite, "rehearse": rehearse}
    how["allow_changed"] = allow_changed
    sys.exit(run_training(config, console=console, **how))


@main.command(name="eval")
@click.argument("target", metavar="RUN|MODEL|ADAPTER")
@click.option("--profile", default="auto", help="For a model: auto, a name, or a file.")
@click.option(
    "--set", "assignments", multiple=True, metavar="SECTION.KEY=VALUE", help="Any setting."
)
@options(
    (
        setting("--task", "task.name", help="Another task than the run's."),
        setting("--num-problems", "eval.num_problems", int, help="Held-out problems."),
        setting("--num-generations", "eval.num_generations", int, help="Completions of each."),
        setting("--temperature", "eval.temperature", float, help="0: the likeliest tokens."),
        setting("--max-completion-length", "eval.max_completion_length", int, help="In tokens."),
    )
)
@BEST
@click.option("--base", is_flag=True, help="The base as well, on the same problems.")
@click.option("--show", type=click.IntRange(min=0), default=0, help="Print that many completions.")
@JSON
@QUIET
def evaluate(target, profile, assignments, best, base, show, as_json, quiet, **flags) -> None:
    """pass@1 on held-out problems, strict and lenient; of several completions pass@k and maj@k."""
    read_options()  # before torch
    from lowmem_grpo.hardware import detect
    from lowmem_grpo.memory.card import machine_card
    from lowmem_grpo.memory.plan import Planner
    from lowmem_grpo.memory.settle import settle_evaluation
    from lowmem_grpo.memory.shapes import evaluated
    from lowmem_grpo.retry import Fitting
    from lowmem_grpo.run.console import Console
    from lowmem_grpo.run.evaluate import evaluate as run_evaluation
    from lowmem_grpo.setup import (
        evaluation_settings,
        left_out,
        open_policy,
        open_task,
        texts_of,
    )
    from lowmem_grpo.tasks.base import held_out

    console = Console(quiet=quiet or as_json)
    config, adapter = read_target(
        target, profile, assignments, flags, console.say, best, console.warn
    )
    task = open_task(config)
    held_out(task, config.eval.num_problems)
    for line in left_out(task, config):
        console.say(line)
    config = settle_evaluation(Planner(config, machine_card(detect(config.model.device))), config)
    policy = open_policy(config, console.say, adapter=adapter)
    fitting, results = Fitting(config, policy, {}, console.warn), []
    for adapters in (False, True) if base else (True,):
        for attempt in fitting.attempts("evaluation", evaluated(config)):
            with attempt as fits, console.progress("evaluation", None) as advance:
                how = {"adapters": adapters, "advance": advance}
                how["texts"] = texts_of(config, policy.tokenizer)
                result = run_evaluation(policy, task, **evaluation_settings(fits), **how)
        results.append(result)
    before, found = (None, *results)[-2:]
    if as_json:
        extra = {} if before is None else {"base": before.summary()}
        print_json({"target": target, "task": task.name, **found.summary(), **extra})
        return
    if before is not None:
        click.echo(f"its base on {task.name}: {before.line()}")
    click.echo(f"{target} on {task.name}: {found.line()}")
    for problem, text, strict, lenient in found.completions[:show]:
        verdict = "strict" if strict else "lenient" if lenient else "wrong"
        click.echo(f"\n[{problem.id}] {verdict}, expected {problem.answer}\n{text}")


@main.command()
@click.argument("target", metavar="RUN|MODEL|ADAPTER")
@click.argument("prompt", required=False)
@click.option(
    "-n", "count", type=click.IntRange(min=1), default=1, help="Completions.", show_default=True
)
@click.option("--profile", default="auto", help="For a model: auto, a name, or a file.")
@click.option(
    "--set", "assignments", multiple=True, metavar="SECTION.KEY=VALUE", help="Any setting."
)
@options(
    (
        setting("--task", "task.name", help="Where a problem comes from when no PROMPT is given."),
        setting("--temperature", "rollout.temperature", float),
        setting("--top-p", "rollout.top_p", float),
        setting("--top-k", "rollout.top_k", int),
        setting("--min-p", "rollout.min_p", float),
        setting("--max-completion-length", "rollout.max_completion_length", int, help="In tokens."),
        setting("--seed", "run.seed", int, help="Of sampling."),
    )
)
@BEST
@QUIET
def sample(target, prompt, count, profile, assignments, best, quiet, **flags) -> None:
    """Look at completions of PROMPT, a text or a chat as JSON, or of a held-out problem."""
    read_options()  # before torch
    from lowmem_grpo.hardware import detect
    from lowmem_grpo.memory.card import machine_card
    from lowmem_grpo.memory.plan import Planner
    from lowmem_grpo.memory.settle import settle_sampling
    from lowmem_grpo.rollout.groups import sample_groups
    from lowmem_grpo.run.console import Console
    from lowmem_grpo.setup import open_policy, open_task, sampling_of, texts_of
    from lowmem_grpo.tasks.base import Problem, held_out
    from lowmem_grpo.tasks.messages import after_system, question, read_messages

    console = Console(quiet=quiet)
    config, adapter = read_target(
        target, profile, assignments, flags, console.say, best, console.warn
    )
    if prompt is None:
        (problem,) = held_out(open_task(config), 1)
    else:
        try:
            messages = after_system(read_messages(prompt), config.task.system_prompt)
        except ValueError as error:
            raise click.BadParameter(str(error), param_hint="PROMPT") from error
        problem = Problem("prompt", messages, "")
    planner = Planner(config, machine_card(detect(config.model.device)))
    config = settle_sampling(planner, config, count)
    policy = open_policy(config, console.say, adapter=adapter)
    r = config.rollout
    with console.progress("sampling", count * r.max_completion_length) as advance:
        (group,) = sample_groups(
            policy,
            [problem],
            num_generations=count,
            sampling=sampling_of(config, "rollout"),
            seed=config.run.seed,
            step=0,
            max_prompt_length=r.max_prompt_length,
            batch_size=config.memory.rollout_batch_size,
            chat_template_kwargs=config.model.chat_template_kwargs,
            texts=texts_of(config, policy.tokenizer),
            advance=advance,
        )
    if not quiet:
        click.echo(f"> {question(problem.messages)}")
    for rollout in group.rollouts:
        click.echo(rollout.text)
