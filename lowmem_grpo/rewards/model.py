"""The reward `model:NAME[,max=TOKENS,batch=TOKENS,label=NAME,template=FILE]`: what a reward model
says of the conversation, its prompt and the completion as the assistant's answer.

    NAME        a Hub id or a local directory with safetensors: a transformers model for sequence
                classification, whose logit is the score, unscaled
    max         the longest conversation in its tokens; a longer one has no score. Twice the run's
                longest prompt and completion, if left out, and never more than its window
    batch       tokens of a batch, padding included; 4096 if left out, and at least the longest
                conversation. 1: one conversation at a time
    label       which logit is the score, of a model with several: a label's name or number
    template    a file with a chat template, for a model that has none

The messages go through the model's own chat template and tokenizer; what the policy's template or
end token adds is not a part of them. A conversation that occurs several times is scored once, so
that equal completions have equal scores whatever batches they would be in.

The model is in 4 bits, in this process and on the policy's device. On a card its weights are there
while it scores, and in host memory otherwise (`policy/classifier.py`). Where the card runs out of
memory, it goes on with batches of half as many tokens.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Any, NamedTuple

import torch

from lowmem_grpo.chat_template import apply_chat_template
from lowmem_grpo.errors import ConfigError, PlanError, TaskError, nearest
from lowmem_grpo.isolation.worker import Failure
from lowmem_grpo.out_of_memory import first_line, is_out_of_memory
from lowmem_grpo.policy.classifier import Classifier, load_classifier, read_classifier_config
from lowmem_grpo.policy.files import check_tokens
from lowmem_grpo.policy.load import read_tokenizer
from lowmem_grpo.policy.source import resolve
from lowmem_grpo.quiet import quiet_libraries
from lowmem_grpo.tasks.base import Problem, parse_options
from lowmem_grpo.tasks.messages import split_prefilled

__all__ = ["Batch", "ModelReward", "ModelSpec", "batches", "largest_batches", "parse_spec"]

BATCH = 4096
FORM = "model:NAME[,max=TOKENS,batch=TOKENS,label=NAME,template=FILE]"
_log = logging.getLogger(__name__)
_OPTIONS = ("max", "batch", "label", "template")


@dataclass(frozen=True)
class ModelSpec:
    """What a specification says, in tokens of the reward model: `max` of a conversation, where it
    was not given twice the run's `conversation`; `batch` of a batch.
    """

    name: str
    conversation: int
    max: int | None = None
    batch: int | None = None
    label: str | None = None
    template: str | None = None

    def longest(self, config) -> int:
        """The longest conversation that is scored by the model of a configuration. Raises
        ConfigError for one beyond its window.
        """
        window = getattr(config, "max_position_embeddings", None)
        if self.max is None:
            return min(2 * self.conversation, window or 2 * self.conversation)
        if window is not None and self.max > window:
            raise ConfigError(
                f"reward 'model:{self.name}': max={self.max} is above the model's window of "
                f"{window} tokens"
            )
        return self.max

    def batch_tokens(self, config) -> int:
        """Tokens of a batch that holds more than one conversation."""
        return max(BATCH, self.longest(config)) if self.batch is None else self.batch


class Batch(NamedTuple):
    """The shape of a batch: rows, tokens of the longest one, whether others are shorter."""

    rows: int
    tokens: int
    padded: bool


def parse_spec(spec: str, conversation: int) -> ModelSpec:
    """What `model:...` says. `conversation`: the policy's tokens of the run's longest prompt and
    completion. Raises ConfigError.
    """
    name, _, rest = spec.partition(":")[2].partition(",")
    try:
        given = parse_options(rest, _OPTIONS, spec)
        sizes = {key: int(given.pop(key)) for key in ("max", "batch") if key in given}
    except (TaskError, ValueError) as error:
        raise ConfigError(f"reward '{spec}': write {FORM}") from error
    if not name or any(size < 1 for size in sizes.values()):
        raise ConfigError(f"reward '{spec}': write {FORM}")
    return ModelSpec(name, conversation, **sizes, **given)


class ModelReward:
    """The reward function; `load` has to come before it is called. `met`: the shapes of the
    batches that it has scored, for whoever empties it.

    Raises ModelError and ConfigError for what can be known without the weights.
    """

    def __init__(self, spec: ModelSpec):
        self.spec, self.met = spec, set[Batch]()
        where = f"reward 'model:{spec.name}'"
        resolve(spec.name)
        self.config = read_classifier_config(spec.name)
        self._label = _label(self.config, spec.label, where)
        way_out = f"give one with model:{spec.name},template=FILE"
        self._tokenizer = read_tokenizer(spec.name, spec.template, f"{where}: template", way_out)
        self._tokens = spec.batch_tokens(self.config)
        self._longest = min(spec.longest(self.config), self._tokenizer.model_max_length)
        self.classifier: Classifier | None = None

    def check(self, problem: Problem) -> None:
        """Raises ConfigError where the chat template does not take the messages of a problem."""
        try:
            self._text(problem.messages, "x")
        except Exception as error:  # a template is a program, which can raise anything
            raise ConfigError(
                f"reward 'model:{self.spec.name}': its chat template does not take the messages of "
                f"{problem.id}: {error}; give another with template=FILE"
            ) from error

    def load(self, device: str, dtype: torch.dtype) -> None:
        """Read the weights, which then lie in host memory. Raises ModelError."""
        name, together = self.spec.name, self._tokens > 1
        self.classifier = load_classifier(
            name, self.config, device=device, dtype=dtype, check=together
        )
        vocab = self.classifier.model.get_input_embeddings().weight.shape[0]
        check_tokens(name, self._tokenizer, vocab)

    def __call__(self, completions: list[str], prompts: list, **fields: Any) -> list:
        """A score for each completion, or a failure."""
        with quiet_libraries():  # a tokenizer would warn of what is too long
            rows = [self._row(*pair) for pair in zip(prompts, completions, strict=True)]
        unique = list(dict.fromkeys(row for row in rows if not isinstance(row, Failure)))
        found = self._found(unique) if unique else {}
        while found is None:
            self._tokens //= 2
            _log.warning(
                "warning: out of memory in the reward model %s: repeated with batch=%d",
                self.spec.name,
                self._tokens,
            )
            found = self._found(unique)
        return [row if isinstance(row, Failure) else found[row] for row in rows]

    def _found(self, rows: list[tuple[int, ...]]) -> dict[tuple[int, ...], float | Failure] | None:
        """The scores of rows; None where the device ran out of memory, and less at once may do.
        Raises PlanError where it cannot.
        """
        found: dict[tuple[int, ...], float | Failure] = {}
        try:
            with quiet_libraries(), self.classifier.on_device():
                for batch in batches(rows, self._tokens):
                    found |= zip(batch, self._scores(batch), strict=True)
            return found
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            if self._tokens <= max(map(len, rows)):
                reason = first_line(error).rstrip(".")
                raise PlanError(
                    f"out of memory in the reward model {self.spec.name}, with the longest "
                    f"conversation by itself: {reason}; lower max=, or take a smaller reward model"
                ) from None
        # Now that the error is gone, and the tensors that it held.
        self.classifier.release()
        return None

    def _scores(self, rows: list[tuple[int, ...]]) -> list[float | Failure]:
        self.met.add(Batch(len(rows), len(rows[0]), len(rows[-1]) < len(rows[0])))
        logits = self.classifier.logits(rows)[:, self._label].tolist()
        return [x if isfinite(x) else Failure("invalid", f"its score is {x}") for x in logits]

    def _row(self, messages: Sequence[dict], completion: str) -> tuple[int, ...] | Failure:
        """The tokens of a conversation."""
        try:
            text = self._text(messages, completion)
        except Exception as error:  # see `check`
            return Failure("invalid", f"the chat template does not take its messages: {error}")
        ids = self._tokenizer(text, add_special_tokens=False).input_ids
        if not 0 < len(ids) <= self._longest:
            words = f"{len(ids)} tokens, the limit is {self._longest} (max=TOKENS)"
            return Failure("invalid", f"the conversation has {words}")
        return tuple(ids)

    def _text(self, messages: Sequence[dict], completion: str) -> str:
        asked, beginning = split_prefilled(messages)
        # Texts of completions have the prompt's part of the answer already, unless that is set off.
        begun = completion if completion.startswith(beginning) else beginning + completion
        answer = {"role": "assistant", "content": begun}
        return apply_chat_template(self._tokenizer, [*asked, answer])


def batches(rows: Sequence[tuple[int, ...]], tokens: int) -> list[list[tuple[int, ...]]]:
    """The rows from the longest to the shortest, cut into batches of at most so many tokens with
    their padding. A row that is longer is a batch by itself.
    """
    found: list[list[tuple[int, ...]]] = []
    for row in sorted(rows, key=lambda row: (-len(row), row)):
        if found and (len(found[-1]) + 1) * len(found[-1][0]) <= tokens:
            found[-1].append(row)
        else:
            found.append([row])
    return found


def largest_batches(longest: int, tokens: int) -> list[Batch]:
    """The shapes that take most: of the longest rows, and, where those leave tokens over, with one
    row more.
    """
    rows = max(1, tokens // longest)
    found = [Batch(rows, longest, rows > 1)]
    if rows * longest < tokens and rows + 1 < tokens:
        found.append(Batch(rows + 1, tokens // (rows + 1), True))
    return found


def _label(config, wanted: str | None, where: str) -> int:
    """The column of the logits that is the score."""
    names = [str(config.id2label.get(i, i)) for i in range(config.num_labels)]
    if wanted is None and len(names) == 1:
        return 0
    if wanted is None:
        raise ConfigError(
            f"{where}: the model has {len(names)} labels ({', '.join(names)}): say which one is "
            f"the score with label={names[-1]}"
        )
    if wanted in names:
        return names.index(wanted)
    if wanted.isdecimal() and int(wanted) < len(names):
        return int(wanted)
    raise ConfigError(
        f"{where}: no label '{wanted}'{nearest(wanted, names)}; it has: {', '.join(names)}"
    )
