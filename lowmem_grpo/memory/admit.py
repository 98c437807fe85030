"""Before a run: its plan, with a value for every setting that is "auto", or a refusal that says
what would fit.
"""

from __future__ import annotations

from collections.abc import Callable

from lowmem_grpo.config import Config
from lowmem_grpo.errors import PlanError
from lowmem_grpo.memory.card import PlanCard
from lowmem_grpo.memory.largest import largest, least_value
from lowmem_grpo.memory.plan import MemoryPlan, Planner
from lowmem_grpo.memory.settle import settle

MOST_TRIES = 6

__all__ = ["admit", "refusal", "solved"]


def admit(
    config: Config, card: PlanCard, say: Callable[[str], None] = lambda text: None
) -> tuple[Config, MemoryPlan, Planner]:
    """The settled configuration, its plan, and the planner for other shapes. `say` is told the
    verdict and each choice.

    Raises PlanError (exit code 3) for a run that does not fit, ModelError and ConfigError as
    `Planner` does.
    """
    planner = Planner(config, card)
    settled, plan = settle(planner, config)
    if not plan.fits:
        raise PlanError(refusal(planner, config, plan))
    say(plan.verdict())
    if card.options.line:
        say(card.options.line)
    for key in settled.chosen:
        say(f"{key} = {plan.settings[key]} ({settled.sources[key]})")
    planner.forget()
    return settled, plan, planner


def refusal(planner: Planner, config: Config, plan: MemoryPlan) -> str:
    """Why a plan does not fit, and the longest completion with which it would."""
    length = largest(planner, config, "max_completion_length")
    way_out = "no completion fits beside it"
    if length is not None and length < config.rollout.max_completion_length:
        way_out = f"--max-completion-length {length} would fit"
    elif length is not None:
        way_out = "lengths are not what stands in the way"
    return f"{plan.verdict()[:-1]}; {way_out}"


def solved(planner: Planner, config: Config, name: str) -> Config:
    """The run with the largest value of a setting of `settle.SOLVABLE` that fits.

    Raises PlanError where no value does.
    """
    value = largest(planner, config, name)
    for _ in range(MOST_TRIES):
        if value is None:
            break
        origin = f"the largest that fits {planner.card.name}"
        tried = config.settled({f"rollout.{name}": value}, origin)
        plan = settle(planner, tried)[1]
        if plan.fits and plan.headroom_bytes >= planner.card.margin_bytes:
            return tried
        # All phases together leave less than each has by itself.
        less = value * 31 // 32
        value = less if less >= least_value(config, name) else None
    raise PlanError(
        f"no {name} fits {planner.card.name} with rollout.max_prompt_length = "
        f"{config.rollout.max_prompt_length}: lower that, or take a smaller model"
    )
