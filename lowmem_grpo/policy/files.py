"""What the files of a model hold, as far as nobody else looks: code, weights that are no numbers,
layers that the configuration leaves out, ends that are no tokens.

transformers would read on: a broken `generation_config.json` is to it as one that is not there, and
a NaN in a weight is a number once it is rounded to four bits.
"""

import math
import re
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from safetensors import SafetensorError, safe_open
from transformers.models.auto.tokenization_auto import tokenizer_class_from_name

from lowmem_grpo.errors import ModelError
from lowmem_grpo.policy.source import INDEX, WEIGHTS, read_object, weight_map

__all__ = [
    "broken_file", "check_ends", "check_layers", "check_tokenizer_config", "check_tokens",
    "check_weights", "own_code", "own_tokenizer", "weight_files",
    "weight_names",
]  # fmt: skip

CONFIG, GENERATION = "config.json", "generation_config.json"
TOKENIZER, TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"
ROWS = 2**24  # numbers of a weight that are looked at together
_LAYER = re.compile(r"(.*?\.)(\d+)(\..*)")


def own_code(fields: dict[str, Any], known: Collection[str | None]) -> str | None:
    """The class that a `config.json` wants to bring along for its weights, as it names it there;
    None where there is none, or where it is one that transformers has, of those `known`.
    """
    named = fields.get("auto_map")
    for kind in ("AutoModelForCausalLM", "AutoModelForSequenceClassification"):
        code = named.get(kind) if isinstance(named, dict) else None
        if code is not None and str(code).rpartition(".")[2] not in known:
            return str(code)
    return None


def own_tokenizer(fields: dict[str, Any]) -> str | None:
    """The class that a `tokenizer_config.json` wants to bring along; None where there is none, or
    where transformers has it.
    """
    named = fields.get("auto_map")
    named = named.get("AutoTokenizer") if isinstance(named, dict) else named
    for code in named if isinstance(named, (list, tuple)) else [named]:
        if code is not None and tokenizer_class_from_name(str(code).rpartition(".")[2]) is None:
            return str(code)
    return None


def broken_file(source: str) -> str:
    """After a model or a tokenizer could not be read: which file it is, in brackets, where the file
    alone tells; else nothing.
    """
    for name in (CONFIG, TOKENIZER, TOKENIZER_CONFIG, GENERATION):
        if file := _file(source, name):
            try:
                read_object(file)
            except ModelError:
                return f" ({file})"
        elif name == TOKENIZER:
            return f" (there is no {name})"
    for file in weight_files(source):
        try:
            with safe_open(file, framework="pt"):
                pass
        except (OSError, SafetensorError):
            return f" ({file})"
    return ""


def check_weights(
    source: str,
    name: str,
    dtype: torch.dtype,
    plain: Collection[str],
    packed: Collection[str] = (),
    unused: Collection[str] = (),
) -> None:
    """Read the weights once more: raises ModelError for one that is NaN or infinite, or would be
    in `dtype`, and for one of `plain` that is of whole numbers. The bytes of 4-bit weights, which
    are `packed`, are no numbers, whatever dtype they are stored as. What is `unused` may be
    anything. `source`: a directory, or a Hub id whose files are in the cache.
    """
    for path in weight_files(source):
        try:
            with safe_open(path, framework="pt") as file:
                for key in file.keys():  # noqa: SIM118, which is no dict
                    if key in unused or key in packed:
                        continue
                    what = f"{name}: the weight {key} in {path.name}"
                    weight = file.get_slice(key)
                    scalar = file.get_tensor(key) if not weight.get_shape() else None
                    most = torch.finfo(dtype).max if key in plain else math.inf
                    _check_weight(weight, scalar, what, key in plain, most)
        except (OSError, SafetensorError) as error:
            raise ModelError(f"cannot read {path}: {error}") from error


def _check_weight(weight, scalar: torch.Tensor | None, what: str, plain: bool, most: float) -> None:
    shape, kind = weight.get_shape(), weight.get_dtype()
    if kind not in ("F64", "F32", "F16", "BF16"):
        if plain:
            raise ModelError(f"{what} is of type {kind}: use the model's 16-bit weights")
        return
    if 0 in shape:
        return
    step = max(1, ROWS * shape[0] // torch.Size(shape).numel()) if shape else 1
    for start in range(0, shape[0] if shape else 1, step):
        part = weight[start : start + step] if scalar is None else scalar
        # One pass without a copy; what is no number carries through.
        ends = [end.item() for end in part.aminmax()]
        if not all(map(math.isfinite, ends)):
            raise ModelError(f"{what} has values that are NaN or infinite: fetch the file again")
        if max(map(abs, ends)) > most:
            raise ModelError(
                f"{what} has the value {max(ends, key=abs):.4g}, more than float16 holds: set "
                "model.compute_dtype to bfloat16 or float32"
            )


def weight_files(source: str) -> list[Path]:
    """The files that transformers reads the weights of a model from; none where `source` is a Hub
    id of which one is not in the cache.
    """
    if single := _file(source, WEIGHTS):
        return [single]
    index = _file(source, INDEX)
    names = sorted(set(weight_map(index).values())) if index else []
    if Path(source).is_dir():
        return [index.parent / name for name in names]
    files = [_file(source, name) for name in names]
    return [file for file in files if file] if all(files) else []


def weight_names(source: str) -> list[str]:
    """The names of all weights in those files. Raises ModelError where one cannot be read."""
    found = []
    for path in weight_files(source):
        try:
            with safe_open(path, framework="pt") as file:
                found += file.keys()
        except (OSError, SafetensorError) as error:
            raise ModelError(f"cannot read {path}: {error}") from error
    return found


def check_layers(name: str, unexpected: Iterable[str], own: Iterable[str]) -> None:
    """Raises ModelError where files have more layers like those of the model, whose weights are
    `own`: the `unexpected` weights are named as if there were more. Others may be left over, as
    those of a head that predicts several tokens, or of a tower for pictures.
    """
    own, more = set(own), {}
    for weight in unexpected:
        if found := _LAYER.fullmatch(weight):
            more.setdefault(found.group(1, 2), []).append(f"{found[1]}0{found[3]}")
    for (prefix, number), weights in more.items():
        if own.issuperset(weights):
            raise ModelError(
                f"{name}: its files have the layer {prefix}{number}, which config.json does not "
                "count (num_hidden_layers): fetch config.json again"
            )


def check_ends(source: str, name: str, ends: Any, vocab: int) -> None:
    """Raises ModelError where the tokens that end a completion are none of the `vocab` tokens, or
    where the file that names them cannot be read.
    """
    if file := _file(source, GENERATION):
        read_object(file)
    for token in ends if isinstance(ends, list) else [ends]:
        if token is not None and (type(token) is not int or not 0 <= token < vocab):
            raise ModelError(
                f"{name}: eos_token_id = {ends!r:.100} (in {GENERATION} or config.json): "
                f"{token!r:.100} is none of the model's {vocab} tokens"
            )


def check_tokenizer_config(source: str) -> None:
    """Raises ModelError for a `tokenizer_config.json` that is read in one way or another."""
    if file := _file(source, TOKENIZER_CONFIG):
        read_object(file)


def check_tokens(name: str, tokenizer, vocab: int) -> None:
    """Raises ModelError where the tokenizer makes tokens that the model, which has `vocab`, lacks.
    Tokens that were added may lie beyond: those for pictures do in models of text.
    """
    added = tokenizer.get_added_vocab()
    ids = (i for token, i in tokenizer.get_vocab().items() if token not in added)
    most = max([*ids, tokenizer.eos_token_id or 0])
    if most >= vocab:
        raise ModelError(
            f"{name}: its tokenizer has a token {most}, and the model {vocab} tokens: they do not "
            "belong together"
        )


def _file(source: str, name: str) -> Path | None:
    """A file of a model, also one that is there and cannot be read."""
    if Path(source).is_dir():
        path = Path(source) / name
        return path if path.is_symlink() or path.exists() else None
    found = try_to_load_from_cache(source, name)
    return Path(found) if isinstance(found, str) else None
