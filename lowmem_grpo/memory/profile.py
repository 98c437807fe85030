"""Run the phases of a configuration for real on the device in use, beside their plan."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from lowmem_grpo.config import Config
from lowmem_grpo.errors import PlanError
from lowmem_grpo.hardware import detect
from lowmem_grpo.memory.admit import admit
from lowmem_grpo.memory.card import machine_card
from lowmem_grpo.memory.measure import Gauge, alive, measure
from lowmem_grpo.memory.shapes import longest
from lowmem_grpo.memory.watch import compare
from lowmem_grpo.out_of_memory import first_line, is_out_of_memory
from lowmem_grpo.rewards.model import ModelReward
from lowmem_grpo.setup import load_models, open_optimizer, open_policy, reward_models

__all__ = ["profile"]


def profile(
    config: Config,
    *,
    snapshot: Path | None = None,
    steps: int = 2,
    say: Callable[[str], None] = lambda text: None,
    advance: Callable[[int], None] = lambda tokens: None,
) -> dict[str, Any]:
    """{"plan": ..., "measured": ..., "comparison": [...]} of loading and `steps` steps in the
    longest shapes, as JSON values. `snapshot`: a file for CUDA's history of allocations.

    Raises PlanError where the plan or the device says that it does not fit.
    """
    machine = detect(config.model.device)
    if snapshot is not None:
        snapshot.parent.mkdir(parents=True, exist_ok=True)
        if machine.device_type == "cpu":
            say("--snapshot: CUDA keeps a history of allocations, a CPU has none")
    config, plan, planner = admit(config, machine_card(machine), say)
    models = [ModelReward(spec) for spec in reward_models(config)]
    gauge = Gauge(torch.device(machine.device), snapshot)
    try:
        with gauge:
            with gauge.phase("load"):
                load_models(models, config, say)
                adapter = config.model.adapter
                policy = open_policy(
                    config, say, None if adapter is None else Path(adapter).expanduser()
                )
                if config.keeps_reference:
                    policy.keep_reference()
            gauge.adopt(alive(policy, models=models), policy.model)
            policy.release()
            optimizer = open_optimizer(config, list(policy.adapter_parameters().values()))
            shapes = longest(config, planner.padded)
            how = {"optimizer": optimizer, "steps": steps, "advance": advance}
            measure(policy, config, shapes, gauge, models=models, **how)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise PlanError(
            f"out of memory in {gauge.running}, though the plan fits: {first_line(error)}"
        ) from error
    measured = gauge.measured()
    return {
        "plan": plan.to_json(),
        "measured": measured.to_json(),
        "comparison": compare(plan, measured.peaks),
    }
