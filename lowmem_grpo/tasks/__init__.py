"""Where problems come from. `load_task` turns a specification such as `arithmetic:digits=2`, or
several with " + " between them, into a `Task`.
"""

from __future__ import annotations

from lowmem_grpo.errors import TaskError, nearest
from lowmem_grpo.tasks.base import Problem, Task, TaskOptions

__all__ = ["Problem", "Task", "TaskOptions", "load_task"]

_KNOWN = ("arithmetic", "countdown", "gsm8k", "reasoning_gym", "records")
_FORMS = (
    "arithmetic[:digits=N,ops=+-*,terms=N], countdown[:numbers=N-N,max=N,target=N], gsm8k, "
    "reasoning_gym:NAME[:key=value,...], records:PATH, records:hub:OWNER/NAME[@CONFIG][/SPLIT], "
    "or several as WEIGHT*TASK + TASK"
)


def load_task(spec: str, *, seed: int, options: TaskOptions | None = None) -> Task:
    """The task that `spec` names, with training problems in the order of `seed`.

    Raises `TaskError` for an unknown name, wrong options, an unreadable file or a missing package.
    """
    from lowmem_grpo.tasks.mixture import Mixture, split_mixture

    options = options or TaskOptions()
    parts = [(weight, _load(part, seed, options)) for weight, part in split_mixture(spec)]
    return parts[0][1] if len(parts) == 1 else Mixture(parts)


def _load(spec: str, seed: int, options: TaskOptions) -> Task:
    task = _load_plain(spec, seed, options)
    if not options.few_shot:
        return task
    from lowmem_grpo.tasks.few_shot import EXAMPLE_SEED, FewShot

    source = task if seed == EXAMPLE_SEED else _load_plain(spec, EXAMPLE_SEED, options)
    return FewShot(task, source, options.few_shot)


def _load_plain(spec: str, seed: int, options: TaskOptions) -> Task:
    # Imported when chosen: a task may need packages that others do not.
    kind, _, rest = spec.partition(":")
    if kind == "arithmetic":
        from lowmem_grpo.tasks.arithmetic import Arithmetic

        return Arithmetic(rest, seed=seed, options=options)
    if kind == "countdown":
        from lowmem_grpo.tasks.countdown import Countdown

        return Countdown(rest, seed=seed, options=options)
    if kind == "gsm8k":
        from lowmem_grpo.tasks.gsm8k import Gsm8k

        return Gsm8k(rest, seed=seed, options=options)
    if kind == "reasoning_gym":
        from lowmem_grpo.tasks.reasoning_gym import ReasoningGym

        return ReasoningGym(rest, seed=seed, options=options)
    if kind == "records":
        from lowmem_grpo.tasks.records import Records

        return Records(rest, seed=seed, options=options)
    raise TaskError(f"unknown task '{spec}'{nearest(kind, _KNOWN)}; the tasks are: {_FORMS}")
