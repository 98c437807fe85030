"""The reward models of a run on tensors without values: loading them, and the phase in which they
score.

Everything that runs is the product's own code (`policy/classifier.py`): the weights' way to the
device, batches of tokens, the model's forward pass. On a card a model's weights are there while it
is loaded and while it scores, and in host memory otherwise; on a CPU they are there for good. Of a
model whose layers are alike a few are traced, for all of them, as in `memory/phases.py`.

Left out: that the card's copy of a weight which is read from a file in 16 bits may lie there beside
the next one's; and what a tokenizer takes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection
from typing import NamedTuple

import torch

from lowmem_grpo.config import Config
from lowmem_grpo.errors import ModelError
from lowmem_grpo.memory.allocator import Event
from lowmem_grpo.memory.components import REWARD_MODEL
from lowmem_grpo.memory.joining import Part, layers_by_name
from lowmem_grpo.memory.layers import alike, deepened, shortened
from lowmem_grpo.memory.unreal import Values
from lowmem_grpo.out_of_memory import first_line, is_out_of_memory
from lowmem_grpo.policy.classifier import (
    Classifier,
    classifier_without_weights,
    read_classifier_config,
)
from lowmem_grpo.policy.skeleton import fill
from lowmem_grpo.rewards.model import Batch, ModelSpec, largest_batches
from lowmem_grpo.setup import reward_models

__all__ = ["RewardPhase", "longest_batches", "rows_of"]

MOST_BATCHES = 4


class _Loaded(NamedTuple):
    """A model without weights. `depth`: that of the whole one, None where this is the whole one."""

    classifier: Classifier
    root: torch.nn.Module
    depth: int | None
    part: Part


class RewardPhase:
    """The parts of a trace that are the reward models'.

    `recording`: a context manager that records without values. `values`: its answers.
    """

    def __init__(self, recording: Callable, values: Values, device: str, dtype: torch.dtype):
        self._recording, self._values = recording, values
        self._device, self._dtype = device, dtype
        self._loaded: dict[tuple[str, bool], _Loaded] = {}
        self._parts: dict[tuple, Part] = {}

    def loads(self, config: Config) -> list[Part]:
        """Loading each model. `kept` of a part is what stays on the device, `host` in host
        memory.
        """
        return [self._model(spec).part for spec in reward_models(config)]

    def scores(self, config: Config, shapes: tuple[tuple[Batch, ...], ...] | None) -> list[Part]:
        """Each model's batches, its weights on the device around them. `shapes`: of the batches of
        each, none where it has not scored; the largest ones without.
        """
        specs = reward_models(config)
        if shapes is None:
            shapes = tuple(longest_batches(spec) for spec in specs)
        pairs = zip(specs, shapes, strict=True)
        return [self._scored(spec, heaviest(of)) for spec, of in pairs if of]

    def forget(self) -> None:
        """Let go of the traces of batches."""
        self._parts.clear()

    def _model(self, spec: ModelSpec) -> _Loaded:
        key = spec.name, spec.batch != 1
        if key not in self._loaded:
            self._loaded[key] = self._load(*key, whole=False)
        return self._loaded[key]

    def _scored(self, spec: ModelSpec, batches: tuple[Batch, ...]) -> Part:
        key = spec.name, batches
        if key not in self._parts:
            part = self._score(self._model(spec), batches)
            if part is None:
                self._loaded[spec.name, spec.batch != 1] = whole = self._load(
                    spec.name, spec.batch != 1, whole=True
                )
                part = self._score(whole, batches)
            self._parts[key] = part
        return self._parts[key]

    def _load(self, name: str, check: bool, whole: bool) -> _Loaded:
        config = read_classifier_config(name)
        depth = config.num_hidden_layers if alike(config) and not whole else None
        model = classifier_without_weights(
            name, config if depth is None else shortened(config), self._dtype
        )
        root = torch.nn.ModuleDict({REWARD_MODEL: model})
        with _refused(name), self._recording() as recorder, recorder.phase("load"):
            fill(model, self._device, self._dtype)
            recorder.name(root)
            classifier = Classifier(model, self._device)
            weights = len(recorder.events)
            if check:
                self._values.number = 0.0  # the difference between rows together and alone
                classifier.check_rows(name)
                self._values.number = 1.0
        layers = layers_by_name(recorder.events[:weights]) + recorder.layers[weights:]
        events = _deep(recorder.events, layers, depth)
        if events is None:
            return self._load(name, check, whole=True)
        weights = _alive(events, recorder.workspaces.values())
        size = sum(event.size for event in weights)
        if self._device == "cpu":
            part = Part(events, recorder.workspaces, kept=size)
        else:
            ends = [event._replace(action="free") for event in weights]
            part = Part(events + ends, recorder.workspaces, host=size)
        return _Loaded(classifier, root, depth, part)

    def _score(self, loaded: _Loaded, batches: tuple[Batch, ...]) -> Part | None:
        """None where the layers do not agree."""
        classifier = loaded.classifier
        with _refused(classifier.model.config.model_type), self._recording() as recorder:
            recorder.name(loaded.root)
            with contextlib.ExitStack() as there:
                with recorder.phase("reward"):
                    there.enter_context(classifier.on_device())
                weights = len(recorder.events)
                with recorder.phase("reward"):
                    for batch in batches:
                        # Whether all tokens count is asked of the mask, and of the positions.
                        self._values.truth = not batch.padded
                        classifier.logits(rows_of(batch))
                    self._values.truth = True
                    there.close()
        layers = layers_by_name(recorder.events[:weights]) + recorder.layers[weights:]
        events = _deep(recorder.events, layers, loaded.depth)
        return None if events is None else Part(events, recorder.workspaces)


def longest_batches(spec: ModelSpec) -> tuple[Batch, ...]:
    """The largest batches that a reward model may be given."""
    config = read_classifier_config(spec.name)
    return tuple(largest_batches(spec.longest(config), spec.batch_tokens(config)))


def heaviest(batches) -> tuple[Batch, ...]:
    """Those of some batches of which one takes the most: by tokens, and by what a mask has."""
    by_tokens = sorted(batches, key=lambda b: (-b.rows * b.tokens, -b.tokens, b.padded))
    masked = [b for b in batches if b.padded]
    by_mask = sorted(masked, key=lambda b: (-b.rows * b.tokens**2, -b.tokens))
    half = MOST_BATCHES // 2
    return tuple(dict.fromkeys(by_tokens[:half] + by_mask[:half]))


def rows_of(batch: Batch) -> list[list[int]]:
    """Rows of such a batch, all of the same token, the first one the longest."""
    rest = max(1, batch.tokens - batch.padded)
    return [[1] * batch.tokens, *[[1] * rest for _ in range(batch.rows - 1)]]


def _deep(events: list[Event], layers: list[int], depth: int | None) -> list[Event] | None:
    return events if depth is None else deepened(events, layers, depth)


def _alive(events: list[Event], but: Collection[int]) -> list[Event]:
    """The allocations that events leave, without some."""
    made = {event.id: event for event in events if event.action == "alloc"}
    for event in events:
        if event.action == "free":
            del made[event.id]
    return [event for event in made.values() if event.id not in but]


@contextlib.contextmanager
def _refused(name: str):
    """What an architecture does with tensors without values is its own affair."""
    try:
        yield
    except (NotImplementedError, AttributeError, TypeError, ValueError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise
        raise ModelError(
            f"{name} cannot be planned as a reward model: {first_line(error)}"
        ) from error
