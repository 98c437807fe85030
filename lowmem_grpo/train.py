"""The loop: GRPO (Shao et al., DeepSeekMath, arXiv 2402.03300) on one 4-bit base, read top to
bottom.

    PLAN -> LOAD
    -> [ ROLLOUT -> REWARD -> REFERENCE -> UPDATE x num_iterations -> (EVAL) (SAVE) ] x steps

A step is one optimizer step; a batch of groups serves `grpo.num_iterations` of them. What is in
hand between two phases (`State`) is all that a run is: it is saved when a run stops, whatever the
reason, and a resumed run goes on with the same tokens.

Left out: several devices, multi-turn episodes.
"""

import json
import time
from pathlib import Path

import torch

from lowmem_grpo.batch import (
    complete,
    judge,
    most_tokens,
    pack_groups,
    roll_out,
    set_advantages,
)
from lowmem_grpo.config import Config, config_toml
from lowmem_grpo.grpo.optimizer import learning_rate_at
from lowmem_grpo.grpo.update import Scoring, accumulate, apply_update, score_reference
from lowmem_grpo.hardware import detect
from lowmem_grpo.idle import idle_settings
from lowmem_grpo.memory.admit import admit
from lowmem_grpo.memory.card import machine_card
from lowmem_grpo.memory.shapes import met
from lowmem_grpo.memory.watch import Watch
from lowmem_grpo.policy.source import resolve
from lowmem_grpo.pool import check_pool, open_pool
from lowmem_grpo.rollout.groups import end_token_ids
from lowmem_grpo.run.alarms import Alarms
from lowmem_grpo.run.best import Best
from lowmem_grpo.run.checkpoint import (
    State,
    check_same_mathematics,
    latest,
    load_checkpoint,
    save_adapter,
    save_checkpoint,
)
from lowmem_grpo.run.console import Console
from lowmem_grpo.run.directory import RunDirectory, check_directory, write_atomic
from lowmem_grpo.run.evaluate import evaluate
from lowmem_grpo.run.metrics import MetricsWriter, step_record
from lowmem_grpo.run.stop import StopRequest
from lowmem_grpo.setup import (
    check_prompts,
    evaluation_settings,
    load_models,
    open_optimizer,
    open_policy,
    open_rewards,
    open_task,
    update_settings,
)

__all__ = ["DONE", "STOPPED", "train"]

DONE, STOPPED = 0, 4


def train(
    config: Config, *, resume: bool, overwrite: bool, console: Console, rehearse: bool = False
) -> int:
    """Train as configured in `config.run.output`. Returns the exit code: 0 done, 4 stopped by a
    signal. `rehearse`: run the longest planned shapes first.

    Raises UserError for what the person can mend. Once the loop has begun, the run is saved before
    any error leaves it.
    """
    config.check_trainable()
    for text in idle_settings(config):
        console.warn(text)
    task = open_task(config)
    rewards = open_rewards(config, task)
    pool = open_pool(config)
    check_prompts(task, config)
    check_directory(config.run.output, resume=resume, overwrite=overwrite)
    # Before the directory is touched: a run that does not fit must not replace one that did.
    config, plan, planner = admit(config, machine_card(detect(config.model.device)), console.say)
    with (
        RunDirectory(config.run.output, resume=resume, overwrite=overwrite) as run,
        StopRequest() as stop,
    ):
        checkpoint = latest(run.path) if resume else None
        if checkpoint is not None:
            check_same_mathematics(checkpoint, config)

        # LOAD
        models = [reward.function for reward in rewards if reward.here]
        load_models(models, config, console.say)
        policy = open_policy(config, console.say)
        if config.grpo.moves_reference:
            policy.keep_reference()
        base_name = resolve(config.model.name)
        parameters = list(policy.adapter_parameters().values())
        o = config.optimizer
        optimizer = open_optimizer(config, parameters)
        scaler = torch.amp.GradScaler(policy.device.type) if policy.dtype == torch.float16 else None
        state = State(pool=len(pool) if pool is not None else None)
        if checkpoint is not None:
            state = load_checkpoint(checkpoint, policy, optimizer)
            check_pool(pool, state.pool)
            console.say(f"resumed from {checkpoint} (step {state.step})")
        if scaler is not None and state.scaler:
            scaler.load_state_dict(state.scaler)
        policy.release()
        watch = Watch(planner, config, run / "memory.json", console.say, console.warn, models)
        if rehearse:
            with console.progress("rehearsal", None) as advance:
                watch.rehearse(policy, optimizer, advance)
        run.begin()
        write_atomic(run / "config.toml", config_toml(config))
        write_atomic(run / "plan.json", json.dumps(plan.to_json()))
        watch.keep()
        for name in ("metrics.jsonl", "rollouts.jsonl", "eval.jsonl"):
            run.rewind(name, state.step)
        alarms = Alarms(run.lines("metrics.jsonl"))
        best = Best(run, config.eval, state.step)

        def save() -> Path:
            state.scaler = scaler.state_dict() if scaler is not None else {}
            return save_checkpoint(run, state, policy, optimizer, config, base_name)

        def hold_out() -> None:
            with console.progress("evaluation", None) as advance:
                found = evaluate(policy, task, **evaluation_settings(config), advance=advance)
            policy.release()
            summary = found.summary()
            metrics.write_evaluation(state.step, summary)
            kept = best.offer(state.step, summary, policy, base_name)
            console.say(
                f"held out after step {state.step}: {found.line()}" + (", kept" if kept else "")
            )

        with MetricsWriter(
            run, tensorboard=config.run.tensorboard, log_rollouts=config.run.log_rollouts
        ) as metrics:
            saved_at = state.step if checkpoint is not None else None
            save_seconds = 0.0
            try:
                if config.eval.every and state.step == 0 and state.groups is None:
                    hold_out()
                while state.step < config.run.steps and not stop.requested:
                    meter = watch.meter(policy, optimizer, last=state.step + 1 == config.run.steps)
                    begun = time.perf_counter()

                    # ROLLOUT, REWARD: again, while groups make way for others
                    sampled = []
                    while not complete(state, config) and not stop.requested:
                        if state.groups is None or all(group.rewards for group in state.groups):
                            with (
                                meter.phase("rollout"),
                                console.progress("rollout", most_tokens(config)) as advance,
                            ):
                                new = roll_out(state, policy, task, config, pool, advance)
                                sampled += [new] if new else []
                            policy.release()
                        else:
                            with meter.phase("reward"):
                                judge(state, rewards, config, policy.tokenizer)
                    if stop.requested:
                        break
                    set_advantages(state.groups, rewards, config)

                    # REFERENCE
                    scoring = Scoring(config.rollout.temperature, end_token_ids(policy))
                    if config.grpo.scores_reference and not any(
                        g.has_reference for g in state.groups
                    ):
                        with meter.phase("reference"):
                            batches = pack_groups(state.groups, config)
                            total = sum(batch.tokens for batch in batches)
                            with console.progress("reference", total) as advance:
                                score_reference(policy, batches, scoring, advance)
                            if config.grpo.use_kl_in_reward:
                                set_advantages(state.groups, rewards, config)
                    if stop.requested:
                        break

                    # UPDATE
                    with meter.phase("update"):
                        batches = pack_groups(state.groups, config)
                        total = sum(batch.tokens for batch in batches)
                        learning_rate = learning_rate_at(
                            state.step + 1,
                            base=o.learning_rate,
                            schedule=o.lr_scheduler_type,
                            warmup_steps=o.warmup_steps,
                            total_steps=config.run.steps,
                        )
                        with console.progress("update", total) as advance:
                            stats = accumulate(
                                policy,
                                batches,
                                scoring,
                                **update_settings(config),
                                loss_scale=scaler.scale if scaler is not None else None,
                                advance=advance,
                            )
                    with meter.phase("optimizer"):
                        grad_norm, change = apply_update(
                            parameters,
                            optimizer,
                            learning_rate=learning_rate,
                            max_grad_norm=o.max_grad_norm,
                            scaler=scaler,
                        )
                    policy.release()
                    meter.seconds["total"] = time.perf_counter() - begun
                    meter.seconds["save"], save_seconds = save_seconds, 0.0
                    trained = sum(len(batch.members) for batch in batches)
                    record = step_record(
                        step=state.step + 1,
                        iteration=state.iteration,
                        groups=state.groups,
                        away=(state.groups_away, state.tokens_away),
                        stats=stats,
                        skipped=sum(len(g.rollouts) for g in state.groups) - trained,
                        grad_norm=grad_norm,
                        adapter_change=change,
                        learning_rate=learning_rate,
                        meter=meter,
                        base_samples=config.grpo.old_policy == "base",
                        from_pool=pool is not None,
                    )
                    if state.iteration == 0:
                        metrics.write_rollouts(state.step + 1, state.groups)
                    shapes = met(sampled or [state.groups], batches, config)
                    state.step, state.iteration = state.step + 1, state.iteration + 1
                    if state.iteration == config.grpo.num_iterations:
                        state.groups = None
                    if config.grpo.moves_reference_after(state.step):
                        policy.sync_reference()

                    raised = alarms.step(record)
                    metrics.write(record)
                    console.step(record, config.run.steps)
                    watch.step(state.step, meter.memory, shapes)
                    for alarm in raised:
                        console.warn(alarm)

                    # EVAL, SAVE: last, so that a checkpoint never lacks its own step's lines
                    last = state.step == config.run.steps
                    if config.eval.every and (last or state.step % config.eval.every == 0):
                        hold_out()
                    if config.run.save_every and state.step % config.run.save_every == 0:
                        begun = time.perf_counter()
                        save()
                        saved_at, save_seconds = state.step, time.perf_counter() - begun
            except Exception as error:
                # The adapters are those of the last whole step: nothing above changes them but
                # `apply_update`.
                where = save()
                console.warn(f"stopped in step {state.step + 1}; the run is saved in {where}")
                raise error
            if saved_at != state.step or stop.requested:
                where = save()
                console.say(f"saved {where}")
        if stop.requested and state.step < config.run.steps:
            console.say(f"stopped by {stop.requested} after step {state.step}; --resume goes on")
            return STOPPED
        save_adapter(run / "adapter", policy, base_name)
        watch.end()
        console.say(f"done: {state.step} steps, adapter in {run / 'adapter'}")
    return DONE
