"""The optimizer over the adapters, its learning-rate schedule, and its state as plain tensors.

The schedule is a function of the step alone, so a resume needs no scheduler state.
"""

import math

import torch

from lowmem_grpo.errors import ConfigError, ModelError

__all__ = [
    "OPTIMIZERS",
    "SCHEDULES",
    "build_optimizer",
    "learning_rate_at",
    "load_optimizer_state",
    "optimizer_state",
]

OPTIMIZERS = ("adamw_torch", "adamw_8bit", "paged_adamw_8bit")
SCHEDULES = ("constant", "linear", "cosine")


def build_optimizer(parameters, *, optim: str, learning_rate, betas, eps, weight_decay):
    """AdamW (Loshchilov and Hutter, arXiv 1711.05101) over float32 adapters.

    `adamw_torch` keeps two float32 moments; `adamw_8bit` keeps them in 8 bits (Dettmers et al.,
    arXiv 2110.02861); `paged_adamw_8bit` keeps those in memory that CUDA pages to the host. Raises
    ConfigError without a CUDA device for the last.
    """
    parameters = list(parameters)
    common = {"lr": learning_rate, "betas": betas, "eps": eps, "weight_decay": weight_decay}
    if optim == "adamw_torch":
        # foreach on every device: the default depends on it, and so would what a trace sees.
        return torch.optim.AdamW(parameters, foreach=True, **common)
    import bitsandbytes

    if optim == "adamw_8bit":
        return bitsandbytes.optim.AdamW8bit(parameters, **common)
    if optim == "paged_adamw_8bit":
        if parameters[0].device.type != "cuda":
            raise ConfigError(
                "optimizer.optim = paged_adamw_8bit needs a CUDA device: "
                "use adamw_8bit or adamw_torch"
            )
        return bitsandbytes.optim.PagedAdamW8bit(parameters, **common)
    raise ConfigError(f"optimizer.optim is {optim!r}, expected one of {OPTIMIZERS}")


def learning_rate_at(
    step: int, *, base: float, schedule: str, warmup_steps: int, total_steps: int
) -> float:
    """The rate of step 1, 2, ..., `total_steps`: warm-up, then constant or decay towards zero."""
    if step <= warmup_steps:
        return base * step / warmup_steps
    # The last step still learns: the decay reaches zero one step after it.
    progress = (step - 1 - warmup_steps) / max(total_steps - warmup_steps, 1)
    if schedule == "linear":
        return base * (1.0 - progress)
    if schedule == "cosine":
        return base * 0.5 * (1.0 + math.cos(math.pi * progress))
    return base


def optimizer_state(optimizer, names: list[str]) -> dict[str, torch.Tensor]:
    """The moments as CPU tensors named `parameter name | state name`; numbers become 0-d tensors.

    `names`: the parameters' names in the order in which the optimizer was given them.
    """
    flat = {}
    # Not `state_dict()`: bitsandbytes hides its 8-bit moments in a nested dict there.
    for name, parameter in zip(names, _parameters(optimizer), strict=True):
        for key, value in optimizer.state.get(parameter, {}).items():
            tensor = value if isinstance(value, torch.Tensor) else torch.tensor(value)
            flat[f"{name}|{key}"] = tensor.detach().to("cpu", copy=True).contiguous()
    return flat


def load_optimizer_state(optimizer, names: list[str], flat: dict[str, torch.Tensor]) -> None:
    """Put saved moments back, exactly. Raises ModelError when they belong to other parameters."""
    state: dict[int, dict[str, torch.Tensor]] = {}
    index = {name: i for i, name in enumerate(names)}
    for key, tensor in flat.items():
        name, _, entry = key.rpartition("|")
        if name not in index:
            raise ModelError(f"the saved optimizer state has '{name}', which this model has not")
        state.setdefault(index[name], {})[entry] = tensor
    if isinstance(optimizer, torch.optim.AdamW):
        groups = optimizer.state_dict()["param_groups"]
        optimizer.load_state_dict({"state": state, "param_groups": groups})
        return
    # In place, into bitsandbytes' own buffers: its `load_state_dict` would move paged ones to CUDA.
    parameters = _parameters(optimizer)
    optimizer.state.clear()
    for i, entries in state.items():
        optimizer.init_state(optimizer.param_groups[0], parameters[i], 0, i)
        own = optimizer.state[parameters[i]]
        for entry, tensor in entries.items():
            own[entry] = int(tensor) if entry == "step" else own[entry].copy_(tensor)


def _parameters(optimizer) -> list[torch.nn.Parameter]:
    return optimizer.param_groups[0]["params"]
