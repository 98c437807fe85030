"""The reward `FILE.py:function`: a user's own function, loaded from a file by its path, in a child
process.

The function has the signature of `rewards/base.py`. It may leave out `**fields`: it then gets the
fields that it names. It may be async. The functions of one file run in one process, one after
another, and share what the file keeps; when one has to be ended, the next call starts the process,
and the file, anew.

What the file does while it is loaded is not confined but for the network; what its functions do is.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable, Collection
from pathlib import Path
from types import ModuleType
from typing import Any

from lowmem_grpo.errors import ConfigError, UserError, nearest
from lowmem_grpo.isolation.confine import Limits
from lowmem_grpo.isolation.output import Output
from lowmem_grpo.isolation.worker import Worker, WorkerSetupError, describe
from lowmem_grpo.rewards.base import RewardFunction
from lowmem_grpo.rewards.isolated import Isolated, answering
from lowmem_grpo.tasks.base import stable_hash

_NAMED = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


def open_file(
    path: str,
    specs: list[str],
    fields: Collection[str],
    limit_s: float,
    limits: Limits,
    output: Output | None = None,
) -> dict[str, RewardFunction]:
    """The functions that `specs` (FILE.py:function) name in the file at `path`, for problems that
    carry `fields`; each call of one may take `limit_s` seconds. `output` takes what they print, and
    the tracebacks of their errors.

    Raises `ConfigError` where the file is missing or fails, and where a function is not there,
    cannot be called with `completions`, or needs a field that is not in `fields`.
    """
    arguments = {"path": path, "specs": specs, "fields": sorted(fields)}
    target = "lowmem_grpo.rewards.user:UserFile"
    worker = Worker(target, arguments, limits, output, Path(path).name)
    try:
        worker.start()
    except UserError as error:
        raise ConfigError(str(error)) from error
    except WorkerSetupError as error:
        raise ConfigError(f"reward file {path} cannot be loaded: {error}") from error
    return {spec: Isolated(worker, limit_s, {"spec": spec}, apart=False) for spec in specs}


class UserFile:
    """The child's side: a file's functions, called by what names them."""

    def __init__(self, path: str, specs: list[str], fields: list[str]) -> None:
        module = load_module(path)
        functions = {spec: load_function(spec, module, fields) for spec in specs}
        self._handlers = {
            spec: answering(function, _place(module, spec)) for spec, function in functions.items()
        }

    def __call__(self, spec: str, completions: list[str], fields: dict[str, Any]) -> list | str:
        try:
            return self._handlers[spec](completions, fields)
        except BaseException:  # SystemExit too: whatever ends the call is to be found there
            with contextlib.suppress(Exception):  # it may have closed what that goes to
                traceback.print_exc()
            raise


def load_module(path: str) -> ModuleType:
    """Runs the file at `path` as a module. Raises `ConfigError` where it is missing or fails."""
    file = Path(path).expanduser().resolve()
    if not file.is_file():
        raise ConfigError(f"reward file {path}: there is no such file")
    # The path is part of the name: two files rewards.py are two modules, and hide no installed one.
    name = f"lowmem_grpo_user_{stable_hash(str(file)):016x}_{file.stem}"
    spec = importlib.util.spec_from_file_location(name, file)
    module = importlib.util.module_from_spec(spec)
    # Known before it runs: dataclasses and pickle look their module up by name.
    sys.modules[name] = module
    # The file may import its neighbours. Last on the path, where none of them can hide a package.
    if str(file.parent) not in sys.path:
        sys.path.append(str(file.parent))
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        traceback.print_exc()
        raise ConfigError(f"reward file {path} cannot be loaded: {describe(error)}") from error
    return module


def _place(module: ModuleType, spec: str) -> str:
    """FILE:LINE of the function, or of the file where it has none."""
    function = inspect.unwrap(getattr(module, spec.rpartition(":")[2]))
    code = getattr(function, "__code__", None)
    line = f":{code.co_firstlineno}" if code else ""
    return f"{Path(code.co_filename if code else module.__file__).name}{line}"


def load_function(spec: str, module: ModuleType, fields: Collection[str]) -> RewardFunction:
    """The function that `spec` (FILE.py:function) names in `module`, for problems that carry
    `fields`.

    Raises `ConfigError` where it is not there, cannot be called with `completions`, or needs a
    field that is not in `fields`.
    """
    path, _, name = spec.rpartition(":")
    function = getattr(module, name, None)
    if function is None:
        there = _functions(module)
        raise ConfigError(
            f"reward file {path} has no function '{name}'{nearest(name, there)}; "
            f"it has: {', '.join(there) or 'no functions'}"
        )
    if not callable(function):
        raise ConfigError(f"reward '{spec}': {name} is not a function but {function!r:.60}")
    if inspect.iscoroutinefunction(function):
        function = _awaited(function)
    try:
        parameters = inspect.signature(function).parameters
    except ValueError as error:  # some functions written in C do not tell
        raise ConfigError(
            f"reward '{spec}': its parameters cannot be read; wrap it in a def"
        ) from error
    return _accepting(spec, function, parameters, fields)


def _awaited(function: Callable[..., Any]) -> RewardFunction:
    @functools.wraps(function)  # with its parameters
    def run(**fields: Any) -> list[float]:
        return asyncio.run(function(**fields))

    return run


def _accepting(
    spec: str,
    function: Callable[..., Any],
    parameters: Any,
    fields: Collection[str],
) -> RewardFunction:
    kinds = [parameter.kind for parameter in parameters.values()]
    takes_all = inspect.Parameter.VAR_KEYWORD in kinds
    named = [name for name, parameter in parameters.items() if parameter.kind in _NAMED]
    if "completions" not in named and not takes_all:
        raise ConfigError(
            f"reward '{spec}' does not take 'completions': write def NAME(completions, **fields)"
        )
    needed = [
        name
        for name, parameter in parameters.items()
        if parameter.default is parameter.empty
        and parameter.kind in (*_NAMED, inspect.Parameter.POSITIONAL_ONLY)
    ]
    for name in needed:
        if name not in named:
            raise ConfigError(
                f"reward '{spec}': '{name}' cannot be given by name; remove the / after it"
            )
        if name != "completions" and name not in fields:
            raise ConfigError(
                f"reward '{spec}' needs '{name}'{nearest(name, fields)}, which the problems do not "
                f"have; they have: {', '.join(fields)}"
            )
    if takes_all:
        return function

    def with_named_fields(**fields: Any) -> list[float]:
        return function(**{name: fields[name] for name in named if name in fields})

    return with_named_fields


def _functions(module: ModuleType) -> list[str]:
    return [
        name
        for name, value in vars(module).items()
        if inspect.isfunction(value)
        and value.__module__ == module.__name__
        and not name.startswith("_")
    ]
