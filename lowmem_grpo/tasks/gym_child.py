"""The side of `reasoning_gym:NAME` that touches the package; it runs in the child process of
`worker.py`.

The package's generators make problem i of seed s from `Random(s + i)`: data sets whose seeds are
near each other are almost the same data set, shifted. So problems are addressed as (block seed,
position) with blocks of 500 seeds that do not overlap, training below 2**31 and held-out problems
above. (Blocks have the package's default size, because some generators make a table of that size
and refuse to look beyond it.) Seeds alone still repeat questions, so one question in three is held
out by a hash of its text, and each side passes over the questions of the other.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from typing import Any

import reasoning_gym
from reasoning_gym.factory import DATASETS

from lowmem_grpo.errors import TaskError, nearest
from lowmem_grpo.tasks.base import parse_options, plain, stable_hash

BLOCK = 500
# Some generators take 0.2 s a problem. A held-out one costs three draws, a training one 1.5.
HELD_OUT_ONE_IN = 3
_TRAIN_SEEDS = 2**31 - BLOCK
_EVAL_SEEDS = 2**31
_MAX_DRAWS = 60
_SCAN = 60


class Gym:
    """One generator, and its requests: `train`, `held_out`, `score`."""

    def __init__(self, name: str, spec_options: str) -> None:
        if name not in DATASETS:
            raise TaskError(
                f"reasoning-gym has no generator '{name}'{nearest(name, DATASETS)}; "
                f"it has {len(DATASETS)}, from {min(DATASETS)} to {max(DATASETS)}"
            )
        self._name = name
        settings = [f.name for f in dataclasses.fields(DATASETS[name][1])]
        settings = [setting for setting in settings if setting not in ("seed", "size")]
        self._options = {
            key: _value(text) for key, text in parse_options(spec_options, settings, name).items()
        }
        # Bound here and not as decorators, so that the caches belong to this generator. Sixteen
        # blocks: the one in use on either side, and those of the redraws.
        self._block = functools.lru_cache(maxsize=16)(self._make_block)
        self._entry = functools.lru_cache(maxsize=256)(self._make_entry)
        try:
            self._entry(0, 0)
        except Exception as error:  # whatever a generator raises for settings that it cannot use
            raise TaskError(
                f"reasoning_gym:{name} cannot be used with options '{spec_options or 'none'}': "
                f"{type(error).__name__}: {error}"
            ) from error

    def __call__(self, op: str, **arguments: Any) -> Any:
        return {"train": self.train, "held_out": self.held_out, "score": self.score}[op](
            **arguments
        )

    def train(self, seed: int, index: int) -> dict[str, Any]:
        """The training entry at `index`: the first of a fixed series of draws whose question is not
        held out.
        """
        problem = "all their questions are held out"
        for draw in range(_MAX_DRAWS):
            start = stable_hash("train", seed, draw) % _TRAIN_SEEDS
            block = (start + index // BLOCK * BLOCK) % _TRAIN_SEEDS
            try:
                entry = self._entry(block, index % BLOCK)
            except Exception as error:  # some generators give up on some seeds
                problem = f"{type(error).__name__}: {error}"
                self._block.cache_clear()  # word_ladder shortens itself when it gives up
                continue
            if not _held_out(entry):
                return _message(entry, block, index % BLOCK)
        raise TaskError(f"{_MAX_DRAWS} draws gave no problem to train on ({problem})")

    def held_out(self, position: int) -> dict[str, Any]:
        """The first held-out entry at `position` or up to 60 after it (else None), and the position
        that follows.
        """
        for place in range(position, position + _SCAN):
            block = _EVAL_SEEDS + place // BLOCK * BLOCK
            try:
                entry = self._entry(block, place % BLOCK)
            except Exception:  # as in `train`
                self._block.cache_clear()
                continue
            if _held_out(entry):
                return {"entry": _message(entry, block, place % BLOCK), "next": place + 1}
        return {"entry": None, "next": position + _SCAN}

    def score(self, block: int, position: int, text: str) -> float:
        """The package's own score of `text` for the entry at (block, position)."""
        return float(self._block(block).score_answer(text, self._entry(block, position)))

    def _make_block(self, block: int) -> Any:
        return reasoning_gym.create_dataset(self._name, **self._options, seed=block, size=BLOCK)

    def _make_entry(self, block: int, position: int) -> dict[str, Any]:
        return self._block(block)[position]


def _held_out(entry: dict[str, Any]) -> bool:
    return stable_hash("held out", entry["question"]) % HELD_OUT_ONE_IN == 0


def _message(entry: dict[str, Any], block: int, position: int) -> dict[str, Any]:
    return {
        "question": entry["question"],
        "answer": entry["answer"],  # None where the package has a scorer but no answer
        "metadata": plain(entry["metadata"]),
        "block": block,
        "position": position,
    }


def _value(text: str) -> Any:
    """An option's text as JSON where it is JSON (numbers, true, false), else as it stands."""
    lowered = text.lower() if text.lower() in ("true", "false") else text
    try:
        return json.loads(lowered)
    except json.JSONDecodeError:
        return text
