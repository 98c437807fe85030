"""Errors meant for the person at the keyboard.

Each carries one short message that names the value at fault and the way out, and the exit code of
the command that it ends. Anything else that is raised is a defect of this program, and shows as
one.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Something the user can put right. `exit_code` is what the command leaves with."""

    exit_code = 2


class ConfigError(UserError):
    """A setting, a flag or a specification is wrong."""


class TaskError(UserError):
    """The problems cannot be had: an unknown task, an unreadable file, a missing column."""


class ModelError(UserError):
    """The model cannot be had or used: a missing file, a corrupt one, no chat template."""


class PlanError(UserError):
    """The run would not fit the card's memory, or the host's."""

    exit_code = 3


class RewardError(UserError):
    """A reward function failed while it was scoring. Wrong reward settings are a `ConfigError`."""

    exit_code = 1


class NonFiniteError(UserError):
    """A log-prob, the loss or the gradient is NaN or infinite; no step was taken on it."""

    exit_code = 1


class StorageError(UserError):
    """What is to be kept cannot be written."""

    exit_code = 1


class DamageError(UserError):
    """A file of a run is not what was written."""

    exit_code = 1


class ExportError(UserError):
    """What would be exported is not the policy."""

    exit_code = 1


def nearest(word: str, candidates: Iterable[str]) -> str:
    """`" (did you mean 'x'?)"` for the candidate closest to `word`, or `""` when none is close."""
    matches = difflib.get_close_matches(word, list(candidates), n=1)
    return f" (did you mean '{matches[0]}'?)" if matches else ""
