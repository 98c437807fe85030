"""What memory is for: the names under which a plan adds it up, and which allocation gets which.

The plan's "other" is what none of the rules below can place.
"""

from __future__ import annotations

__all__ = ["COMPONENTS", "REWARD_MODEL", "component", "kept_component", "of_weights"]

COMPONENTS = (
    "base_weights", "reward_model", "adapters", "optimizer", "kv_cache", "checkpoints",
    "activations", "logits", "workspace", "other",
)  # fmt: skip


DECODING = ("rollout", "evaluation")
REWARD_MODEL = "reward_model"
"""The name under which a reward model's modules and tensors are told to whoever records."""


def component(phase: str, module: str, rule: str = "") -> str:
    """What memory is for, when it is allocated. `rule`: the name of the rule that added it.

    Outside every module lie the head's tiles, the loss and the draw: "logits". Gradients of
    adapters end as "adapters", the rest of backward is "activations".
    """
    if rule:
        return "workspace"
    if phase == "load":
        return of_weights(module)
    if phase == "optimizer":
        return "optimizer"
    if not module:
        return "logits" if phase in (*DECODING, "reference", "update") else "other"
    return "logits" if module.rpartition(".")[2] == "lm_head" else "activations"


def of_weights(name: str) -> str:
    """What a weight of that name, or a module's, is for."""
    if name.startswith(REWARD_MODEL):
        return "reward_model"
    return "adapters" if "lora_" in name else "base_weights"


def kept_component(
    phase: str, before: str, *, inside: bool, adapted: bool, recomputed: bool
) -> str:
    """What memory is for that outlives the outermost forward pass in which it was made.

    `before`: what it was until then. `inside`: it was made within a layer (a numbered module with
    modules in it), `adapted`: within a layer that has adapters. In a rollout, what stays of the
    latter is the adapters' 16-bit form, and what stays inside otherwise is the cache. What backward
    finds outside, when it begins to compute a layer again, is the checkpoints.
    """
    if before == "activations" and phase in DECODING and inside:
        return "adapters" if adapted else "kv_cache"
    if before == "activations" and recomputed and not inside:
        return "checkpoints"
    return before
