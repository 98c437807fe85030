"""Settings that were given and do nothing beside the others: worth a line before a long run.

Only what was set to something else than it is by default counts: a saved config.toml gives every
setting, and says nothing by that.
"""

from collections.abc import Iterator

from lowmem_grpo.config import Config
from lowmem_grpo.grpo.objective import CLIPPED
from lowmem_grpo.section_grpo import GrpoConfig
from lowmem_grpo.sections import RolloutConfig, TaskConfig
from lowmem_grpo.tasks.mixture import split_mixture

__all__ = ["idle_settings"]


def idle_settings(config: Config) -> list[str]:
    """A sentence for each setting of the objective, the task and the curriculum without effect: its
    value, who set it, why.
    """
    found = []
    for section, reasons in (
        ("grpo", _reasons(config.grpo)),
        ("task", _reasons_of_task(config.task)),
        ("rollout", _reasons_of_rollout(config.rollout)),
    ):
        values = getattr(config, section)
        for keys, reason in reasons:
            for key in keys:
                value, name = getattr(values, key), f"{section}.{key}"
                origin = config.sources.get(name)
                if origin is not None and value != type(values).model_fields[key].default:
                    text = str(value).lower() if isinstance(value, bool) else value
                    found.append(f"{name} = {text} (from {origin}) has no effect: {reason}")
    return found


def _reasons_of_task(task: TaskConfig) -> Iterator[tuple[list[str], str]]:
    parts = [spec.partition(":") for _, spec in split_mixture(task.name)]
    kinds = {kind for kind, _, _ in parts}
    if not kinds & {"records", "gsm8k"}:
        keys = ["path", "prompt_column", "answer_column", "eval_fraction", "eval_path", "shuffle"]
        yield keys, f"task.name = {task.name}, which reads no file of yours"
    elif all(path for kind, _, path in parts if kind == "records") and "gsm8k" not in kinds:
        yield ["path"], f"task.name = {task.name} has a file"
    if task.eval_path is not None:
        yield ["eval_fraction"], "task.eval_path has the held-out problems"


def _reasons_of_rollout(rollout: RolloutConfig) -> Iterator[tuple[list[str], str]]:
    if rollout.curriculum == 1:
        yield ["curriculum_field"], "rollout.curriculum = 1 takes every problem"


def _reasons(grpo: GrpoConfig) -> Iterator[tuple[list[str], str]]:
    """Settings that these values leave without effect, with the reason."""
    kind = f"grpo.loss_type = {grpo.loss_type}"
    if grpo.loss_type not in CLIPPED:
        # cispo's bound is epsilon_high, and it has none below.
        bounds = ["epsilon"] if grpo.loss_type == "cispo" else ["epsilon", "epsilon_high"]
        yield bounds, f"{kind} does not clip by it"
    for other in ("sapo", "vespo"):
        if grpo.loss_type != other:
            keys = [key for key in GrpoConfig.model_fields if key.startswith(f"{other}_")]
            yield keys, f"it is {other}'s, and {kind}"
    estimate = ["kl_estimator", "use_bias_correction_kl"]
    if grpo.beta == 0:
        others = ["use_kl_in_reward", "sync_ref_model"]
        yield [*estimate, *others], "grpo.beta = 0, so there is no KL"
    elif grpo.use_kl_in_reward:
        yield estimate, "grpo.use_kl_in_reward = true takes k1, and nothing in the loss"
    if grpo.old_policy != "trainer":
        reason = f"grpo.old_policy = {grpo.old_policy}, which needs no correction"
        yield ["importance_sampling_clip_max"], reason
    if not grpo.sync_ref_model:
        yield ["ref_model_sync_steps"], "grpo.sync_ref_model = false, so the reference stays"
