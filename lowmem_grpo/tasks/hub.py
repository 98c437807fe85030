"""Data sets of the Hugging Face Hub as tables, through the package datasets.

`hub:OWNER/NAME[@CONFIG][/SPLIT]`, like hub:openai/gsm8k@main/train; the split is `train` unless it
is given, and may be a part of one (train[:1000]). What was fetched once is read from the cache of
the package, without a network too.
"""

from __future__ import annotations

import re

from lowmem_grpo.errors import TaskError
from lowmem_grpo.tasks.tables import ArrowTable

PREFIX = "hub:"
_FORM = re.compile(r"(?P<name>[\w.-]+/[\w.-]+)(?:@(?P<config>[^/]+))?(?:/(?P<split>.+))?")
_WAY_OUT = "check the name, or use a file: records:FILE, or task.path = FILE for gsm8k"


def open_hub(path: str) -> ArrowTable:
    """The table that `path` names, `hub:` included. Raises `TaskError` where it cannot be had."""
    match = _FORM.fullmatch(path.removeprefix(PREFIX))
    if match is None:
        raise TaskError(
            f"'{path}' names no data set: write hub:OWNER/NAME[@CONFIG][/SPLIT], "
            "like hub:openai/gsm8k@main/train"
        )
    try:
        import datasets
    except ImportError as error:
        raise TaskError(
            f'{path} needs the package datasets: pip install "lowmem-grpo[tasks]"'
        ) from error
    try:
        rows = datasets.load_dataset(
            match["name"], match["config"], split=match["split"] or "train"
        )
    except Exception as error:  # whatever the network, the Hub and the files in it bring about
        first = (str(error).splitlines() or [""])[0]
        raise TaskError(
            f"cannot load {path}: {type(error).__name__}: {first:.160}; {_WAY_OUT}"
        ) from error
    if len(rows) == 0:
        raise TaskError(f"{path} has no rows")
    # As Arrow: the columns as they are stored, nothing decoded.
    return ArrowTable(rows.with_format("arrow")[:], path)
