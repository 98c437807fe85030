"""The loop: GRPO (Shao et al., DeepSeekMath, arXiv 2402.03300) on one 4-bit base, read top to
bottom.

    PLAN -> LOAD
    -> [ ROLLOUT -> REWARD -> REFERENCE -> UPDATE x num_iterations -> (EVAL) (SAVE) ] x steps

A step is one optimizer step; a batch of groups serves `grpo.num_iterations` of them. What is in
hand between two phases (`State`) is all that a run is: it is saved after each of them, so that a
run which was stopped, or killed, goes on with the same tokens. A phase that runs out of memory is
repeated with less at once, an update whose gradients overflow float16 with a lower loss scale, and
no step is taken where a number is NaN or infinite.

Left out: several devices, multi-turn episodes.
"""

import json
import time
from collections.abc import Collection
from contextlib import ExitStack
from pathlib import Path

from lowmem_grpo.batch import (
    complete,
    judge,
    most_completions,
    most_tokens,
    pack_groups,
    roll_out,
    set_advantages,
    trunk_tokens,
)
from lowmem_grpo.config import Config, config_toml
from lowmem_grpo.grpo.loss_scale import LossScale
from lowmem_grpo.grpo.update import Scoring, accumulate, apply_update, score_reference
from lowmem_grpo.hardware import detect
from lowmem_grpo.idle import idle_settings
from lowmem_grpo.isolation.output import LogFile, Output
from lowmem_grpo.memory.admit import admit
from lowmem_grpo.memory.card import machine_card
from lowmem_grpo.memory.shapes import evaluated, met
from lowmem_grpo.memory.watch import Watch
from lowmem_grpo.policy.integrity import Base
from lowmem_grpo.policy.source import resolve
from lowmem_grpo.pool import open_pool
from lowmem_grpo.retry import Fitting
from lowmem_grpo.rollout.groups import end_token_ids
from lowmem_grpo.run.alarms import Alarms
from lowmem_grpo.run.best import Best
from lowmem_grpo.run.checkpoint import Checkpoints, save_final
from lowmem_grpo.run.console import Console
from lowmem_grpo.run.directory import RunDirectory, check_directory, write_atomic
from lowmem_grpo.run.discard import discarding
from lowmem_grpo.run.ending import Ending
from lowmem_grpo.run.evaluate import evaluate
from lowmem_grpo.run.metrics import MetricsWriter, step_record
from lowmem_grpo.run.resume import Resumed
from lowmem_grpo.run.stop import StopRequest
from lowmem_grpo.setup import (
    check_prompts,
    evaluation_settings,
    learning_rate_of,
    open_models,
    open_optimizer,
    open_rewards,
    open_task,
    texts_of,
    update_settings,
)

__all__ = ["DONE", "STOPPED", "train"]

DONE, STOPPED = 0, 4


def train(
    config: Config,
    *,
    resume: bool,
    overwrite: bool,
    console: Console,
    rehearse: bool = False,
    allow_changed: Collection[str] = (),
) -> int:
    """Train as configured in `config.run.output`. Returns the exit code: 0 done, 4 stopped by a
    signal. `rehearse`: run the longest planned shapes first. `allow_changed`: settings that may
    differ from those of the run that is resumed.

    Raises UserError for what the person can mend. Once the loop has begun, the run is saved before
    any error leaves it.
    """
    config.check_trainable()
    for text in idle_settings(config):
        console.warn(text)
    task = open_task(config)
    output = Output()
    rewards = open_rewards(config, task, output, console.say)
    pool = open_pool(config)
    check_prompts(task, config, console.say)
    check_directory(config.run.output, resume=resume, overwrite=overwrite)
    # Before the directory is touched: a run that does not fit must not replace one that did.
    config, plan, planner = admit(config, machine_card(detect(config.model.device)), console.say)
    with ExitStack() as stack:
        enter = stack.enter_context
        run = enter(RunDirectory(config.run.output, resume=resume, overwrite=overwrite))
        stack.callback(output.close)
        stop = enter(StopRequest(console.warn))
        resumed = Resumed(run.path if resume else None, config, allow_changed, console)

        # LOAD
        policy = open_models(config, rewards, console.say, resumed.adapter)
        texts = texts_of(config, policy.tokenizer)
        for line in texts.lines(task.train_problem(0)):
            console.say(line)
        base_name = resolve(config.model.name)
        parameters = list(policy.adapter_parameters().values())
        optimizer = open_optimizer(config, parameters)
        loss_scale = LossScale(policy.device, policy.dtype)
        base = Base(policy)
        state = resumed.load(policy, optimizer, base, pool)
        base.expect_reference()
        loss_scale.load(state.scaler)
        state.scaler = loss_scale.state()
        policy.release()
        watch = Watch(planner, config, run / "memory.json", console.say, console.warn, rewards)
        if rehearse:
            with console.progress("rehearsal", None) as advance:
                watch.rehearse(policy, optimizer, advance)
        ending = enter(Ending(run.path, resumed.checkpoint, lambda: save(), console.warn))
        run.begin()
        output.send_to(LogFile(run / "rewards.log"))
        for name in ("metrics.jsonl", "rollouts.jsonl"):
            run.rewind(name, state.step)
        run.rewind("eval.jsonl", state.evaluated)
        alarms = Alarms(run.lines("metrics.jsonl"))
        best = Best(run, config.eval, state.evaluated)
        write_atomic(run / "config.toml", config_toml(config))
        write_atomic(run / "plan.json", json.dumps(plan.to_json()))
        watch.keep()
        checkpoints = Checkpoints(
            run, policy, optimizer, base_name, resumed.checkpoint, console.warn
        )
        predicted = {phase.name: phase.peak_allocated_bytes for phase in plan.phases}
        fitting = Fitting(config, policy, predicted, console.warn)

        def save() -> Path:
            return ending.saved(checkpoints.save(state, fitting.config))

        def clear() -> None:
            """Go on from the step before: the adapters have not moved."""
            optimizer.zero_grad()
            loss_scale.load(state.scaler)  # which a batch of NaN says nothing about
            ending.whole = True
            checkpoints.keep_up(state, fitting.config)

        def undo_update() -> None:
            """Forget what an update has done, which did not get through."""
            optimizer.zero_grad()
            if ending.whole:
                return
            checkpoints.restore(state)
            loss_scale.load(state.scaler)  # it is between the steps of an update
            ending.whole = True

        def due() -> bool:
            """Whether it is time to evaluate, and has not been done."""
            is_time = config.eval.is_due_after(state.step, config.run.steps)
            return is_time and state.evaluated != state.step

        def hold_out() -> None:
            """Evaluate, if it is due."""
            if stop.requested or not due():
                return
            for attempt in fitting.attempts("evaluation", evaluated(config)):
                with attempt as fits, console.progress("evaluation", None) as advance:
                    how = {"texts": texts, "advance": advance}
                    found = evaluate(policy, task, **evaluation_settings(fits), **how)
            policy.release()
            metrics.write_evaluation(state.step, found.summary())
            kept = best.offer(state.step, found.summary(), policy, base_name)
            kept = ", kept" if kept else ""
            console.say(f"held out after step {state.step}: {found.line()}{kept}")
            state.evaluated = state.step
            checkpoints.keep_up(state, fitting.config)

        metrics = enter(MetricsWriter(run, config.run))
        ending.whole = True
        save()
        hold_out()
        while state.step < config.run.steps and not stop.requested:
            with discarding(state, config, run, clear, console.warn):
                meter = watch.meter(policy, optimizer, last=state.step + 1 == config.run.steps)
                begun = time.perf_counter()

                # ROLLOUT, REWARD: again, while groups make way for others
                sampled = []
                while not complete(state, config) and not stop.requested:
                    if state.groups is None or all(group.rewards for group in state.groups):
                        for attempt in fitting.attempts("rollout", most_completions(config)):
                            with (
                                attempt as fits,
                                meter.phase("rollout"),
                                console.progress("rollout", most_tokens(config)) as advance,
                            ):
                                new = roll_out(state, policy, task, fits, pool, advance)
                                sampled += [new] if new else []
                        policy.release()
                    else:
                        with meter.phase("reward"):
                            judge(state, rewards, config, policy.tokenizer)
                    checkpoints.keep_up(state, fitting.config)
                if stop.requested:
                    break
                set_advantages(state.groups, rewards, config)
                most = trunk_tokens(state.groups, fitting.config)

                # REFERENCE
                scoring = Scoring(config.rollout.temperature, end_token_ids(policy))
                if config.grpo.scores_reference and not any(g.has_reference for g in state.groups):
                    for attempt in fitting.attempts("reference", most):
                        with (
                            attempt as fits,
                            meter.phase("reference"),
                            console.progress("reference", most) as advance,
                        ):
                            batches = pack_groups(state.groups, fits, old_policy="sampler")
                            score_reference(policy, batches, scoring, advance)
                    if config.grpo.use_kl_in_reward:
                        set_advantages(state.groups, rewards, config)
                    checkpoints.keep_up(state, fitting.config)
                if stop.requested:
                    break

                # UPDATE
                learning_rate = learning_rate_of(config, state.step + 1)
                for attempt in fitting.attempts("update", most, undo_update):
                    with attempt as fits:
                        batches = pack_groups(state.groups, fits)
                        for _ in loss_scale.attempts(console.warn):
                            ending.whole = True  # after an overflow, too: nothing has moved
                            with meter.phase("update"), console.progress("update", most) as advance:
                                stats = accumulate(
                                    policy,
                                    batches,
                                    scoring,
                                    **update_settings(fits),
                                    loss_scale=loss_scale.scale,
                                    advance=advance,
                                )
                            ending.whole = False
                            with meter.phase("optimizer"):
                                grad_norm, change = apply_update(
                                    parameters,
                                    optimizer,
                                    learning_rate=learning_rate,
                                    max_grad_norm=config.optimizer.max_grad_norm,
                                    scaler=loss_scale.scaler,
                                )
                policy.release()
                meter.seconds["total"] = time.perf_counter() - begun
                meter.seconds["save"] = checkpoints.take_seconds()
                record = step_record(
                    state,
                    stats=stats,
                    trained=sum(len(batch.members) for batch in batches),
                    grad_norm=grad_norm,
                    adapter_change=change,
                    learning_rate=learning_rate,
                    meter=meter,
                    base_samples=config.grpo.old_policy == "base",
                    from_pool=pool is not None,
                    out_of_memory=fitting.take_events(),
                )
                if state.iteration == 0:
                    metrics.write_rollouts(state.step + 1, state.groups)
                shapes = met(sampled or [state.groups], batches, fits)
                state.step, state.iteration = state.step + 1, state.iteration + 1
                state.scaler = loss_scale.state()
                state.discarded = 0
                if state.iteration == config.grpo.num_iterations:
                    state.groups = None
                if moved := config.grpo.moves_reference_after(state.step):
                    policy.sync_reference()
                raised = alarms.step(record)
                metrics.write(record)
                ending.whole = True
                if moved:
                    base.expect_reference()
                console.step(record, config.run.steps)
                watch.step(state.step, meter.memory, shapes)
                console.warn(*raised)

                # CHECK, SAVE, EVAL: in this order, so that nothing is lost that is worth having
                if config.run.check_every and state.step % config.run.check_every == 0:
                    checkpoints.verify(base, state)
                if config.run.is_saved_after(state.step):
                    if record["out_of_memory"]:  # which a resumed run need not find out again
                        write_atomic(run / "config.toml", config_toml(fitting.config))
                    save()
            hold_out()
        if state.step < config.run.steps or due():
            console.say(f"stopped by {stop.requested} after step {state.step}, saved in {save()}")
            return STOPPED
        checkpoints.verify(base, state)
        save()
        save_final(run / "adapter", policy, base_name, state.step)
        watch.end()
        console.say(f"done: {state.step} steps, adapter in {run / 'adapter'}")
    return DONE
