"""A sequence classifier with 4-bit layers: files -> model, scores of rows of tokens, and where its
weights lie.

Between uses they lie in host memory, and what a use copies to the card is dropped after it: the
host's copies stay, since nothing changes them. On a CPU nothing moves.

Linear layers are NF4, but for the classifier's own head, which stays in the compute dtype, as
embedding and norms do. transformers leaves the module of the last parameter alone, by a rule that
misses a head with a bias, so the head is named: all linear layers outside of the base model.

The model is in eval mode, so that nothing is dropped, whatever its class calls dropout. Its 4-bit
layers alone are left in train mode, which they ask for one thing: on a CPU with AVX512-BF16 they
would otherwise repack their weights at the first forward pass, into a form of which a plan knows
nothing and which does not go to a card.

Left out: dropping padding. Rows go through transformers' own forward pass, padded on the right.
"""

import contextlib
import random
from collections.abc import Iterable, Iterator, Sequence
from copy import copy

import bitsandbytes as bnb
import torch
from bitsandbytes.functional import QuantState
from transformers import AutoModelForSequenceClassification

from lowmem_grpo.errors import ModelError
from lowmem_grpo.policy.load import load_in_4_bits
from lowmem_grpo.policy.quantised import left_in_16_bits
from lowmem_grpo.policy.skeleton import make_4_bit, read_model_config
from lowmem_grpo.quiet import quiet_libraries

__all__ = [
    "Classifier", "classifier_without_weights", "load_classifier", "read_classifier_config",
]  # fmt: skip

CHECKED = (2, 9, 5, 3, 8, 4)  # tokens of the rows that are scored together and alone


class Classifier:
    """`model`: a transformers sequence classifier, whose weights are where they were loaded, and
    `device` where it is to be run.
    """

    def __init__(self, model, device: str | torch.device):
        self.model, self.device = model.eval().requires_grad_(False), torch.device(device)
        for module in model.modules():
            if isinstance(module, bnb.nn.Linear4bit):
                module.train()
        self._config = model.config.get_text_config()
        self._pad = self._config.pad_token_id

    def to_host(self) -> None:
        """Move the weights to host memory, where they stay but for uses on the device."""
        if self._moves:
            self._move(torch.device("cpu"))
            self.release()

    @contextlib.contextmanager
    def on_device(self) -> Iterator[None]:
        """Within, the weights are on the device. What they took there is given back at the end."""
        if not self._moves:
            yield
            return
        before = self._places()
        try:
            self._move(self.device)
            yield
        finally:
            _put(before)
            self.release()

    def release(self) -> None:
        """Give memory that is cached and not in use back to the card, as a policy does."""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def logits(self, rows: Sequence[Sequence[int]]) -> torch.Tensor:
        """float32 [rows, labels] on the device, where the weights have to be, of rows of token ids,
        none of them empty.
        """
        longest, filler = max(map(len, rows)), self._filler(rows)
        ids = torch.tensor([[*row, *[filler] * (longest - len(row))] for row in rows])
        mask = None
        if min(map(len, rows)) < longest:
            # By length: an end token may be the padding as well, and belongs to its row.
            mask = [[1] * len(row) + [0] * (longest - len(row)) for row in rows]
            mask = torch.tensor(mask).to(self.device)
        with torch.no_grad():
            logits = self.model(input_ids=ids.to(self.device), attention_mask=mask).logits
        return logits.float()

    def check_rows(self, name: str) -> None:
        """Score a few rows together and alone, before the weights go to the host. Raises ModelError
        where that differs by more than rounding: the model does not keep padding out.
        """
        draw = random.Random(0).randrange
        rows = [[draw(self._config.vocab_size) for _ in range(length)] for length in CHECKED]
        alone = torch.cat([self.logits([row]) for row in rows])
        error = ((self.logits(rows) - alone).norm() / alone.norm()).item()
        # Rounding alone gives 1e-6 in float32.
        limit = 1e-3 if self.model.dtype == torch.float32 else 0.1
        if not error < limit:
            raise ModelError(
                f"{name}: the scores of rows depend on what stands beside them, by {error:.2g} "
                f"(limit {limit:g}): score one at a time, with batch=1"
            )

    # --- Where the weights are

    @property
    def _moves(self) -> bool:
        return self.device.type != "cpu"

    def _places(self) -> list[tuple[torch.nn.Module, str, torch.Tensor]]:
        """Parameters and buffers, each with the module and the name that it has there."""
        return [
            (module, name, tensor)
            for module in self.model.modules()
            for name, tensor in [*module._parameters.items(), *module._buffers.items()]
            if tensor is not None
        ]

    def _move(self, device: torch.device) -> None:
        """Put copies on a device in the place of what is there. What is tied stays tied."""
        copies: dict[int, torch.Tensor] = {}
        for module, name, tensor in self._places():
            if id(tensor) not in copies:
                copies[id(tensor)] = _copied(tensor, device)
            _put([(module, name, copies[id(tensor)])])

    def _filler(self, rows: Sequence[Sequence[int]]) -> int:
        """What rows are padded with: the model's padding. Without one it reads the score at a
        row's last token, and does so still where that is not the padding.
        """
        if self._pad is not None:
            return self._pad
        ends = {row[-1] for row in rows}
        self._config.pad_token_id = next(id for id in range(len(ends) + 1) if id not in ends)
        return self._config.pad_token_id


def read_classifier_config(name: str):
    """The transformers configuration of a sequence classifier, as `read_model_config` reads it.
    Raises ModelError where it is another kind of model.
    """
    config = read_model_config(name)
    kinds = config.architectures or []
    if not any(kind.endswith("ForSequenceClassification") for kind in kinds):
        raise ModelError(
            f"{name} is a {' or '.join(kinds) or config.model_type}, which scores nothing: a "
            "reward model is a transformers model for sequence classification"
        )
    config.use_cache = False  # of keys and values, which nobody would ask again
    return config


def load_classifier(
    name: str, config, *, device: str, dtype: torch.dtype, check: bool = True
) -> Classifier:
    """The model called `name`, in 4 bits, its weights in host memory. `config`: as
    `read_classifier_config` reads it. `check`: see `Classifier.check_rows`. Raises ModelError.
    """
    kind = AutoModelForSequenceClassification
    with quiet_libraries():
        head = _head(_on_meta(config, dtype))
        model = load_in_4_bits(kind, name, config, device, dtype, skip=list(head))
        for part, linear in _head(model).items():
            if isinstance(linear, bnb.nn.Linear4bit):
                raise ModelError(f"{name}: its head {part} is stored in 4 bits: use 16-bit weights")
        classifier = Classifier(model, device)
        if check:
            classifier.check_rows(name)
    classifier.to_host()
    return classifier


def classifier_without_weights(name: str, config, dtype: torch.dtype):
    """The transformers model with NF4 layers, on the meta device. Raises ModelError for an
    architecture that has no such model.
    """
    try:
        with quiet_libraries():
            model = _on_meta(config, dtype)
            with torch.device("meta"):
                left = left_in_16_bits(model, config)
                make_4_bit(model, dtype, [*left, *_head(model).values()])
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        # What a configuration must hold beyond the usual is its architecture's own affair.
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ModelError(f"cannot build {name} as a sequence classifier: {reason}") from error
    return model.requires_grad_(False)


def _on_meta(config, dtype: torch.dtype):
    with torch.device("meta"):
        return AutoModelForSequenceClassification.from_config(config, dtype=dtype)


def _head(model) -> dict[str, torch.nn.Module]:
    """The linear layers outside of the base model, by name."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear)
        and not name.startswith(f"{model.base_model_prefix}.")
    }


def _put(places: Iterable[tuple[torch.nn.Module, str, torch.Tensor]]) -> None:
    for module, name, tensor in places:
        setattr(module, name, tensor)
        if isinstance(module, bnb.nn.Linear4bit) and name == "weight":
            module.quant_state = tensor.quant_state  # a layer has its weight's as well


def _copied(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A copy on a device; of a 4-bit weight with its quantisation state, which is all that its
    layer asks of it. The tensor itself stays as it is, which `Params4bit.to` would not leave.
    """
    if not isinstance(tensor, torch.nn.Parameter):
        return tensor.to(device, copy=True)
    moved = torch.nn.Parameter(tensor.data.to(device, copy=True), requires_grad=False)
    if getattr(tensor, "quant_state", None) is not None:
        moved.quant_state = _copied_state(tensor.quant_state, device)
    return moved


def _copied_state(state: QuantState, device: torch.device) -> QuantState:
    moved = copy(state)
    for name, value in vars(state).items():
        if isinstance(value, torch.Tensor):
            setattr(moved, name, value.to(device, copy=True))
        elif isinstance(value, QuantState):
            setattr(moved, name, _copied_state(value, device))
    return moved
