"""The options of torch's CUDA allocator that this process's environment sets.

`PYTORCH_ALLOC_CONF` holds them as `option:value,option:value`; `PYTORCH_CUDA_ALLOC_CONF` is its
older name. Where both are set, torch 2.13 reads the older one alone, also when it is empty.

They are read here as torch reads them: white space counts for nothing, whole numbers end where
their digits do ("20.7" is 20). What torch refuses is refused, and before torch is imported: a
build for CUDA reads them while it is loaded, and some mistakes abort the process there. No torch in
this file.

Left out: what a program sets later (`torch.cuda.memory.set_per_process_memory_fraction`).

Source: c10/core/AllocatorConfig.cpp and c10/cuda/CUDAAllocatorConfig.cpp of torch 2.13, whose
answers to 16,000 random texts these are; it also takes two values of one option, partly the first.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from lowmem_grpo.errors import ConfigError, nearest

__all__ = ["AllocatorOptions", "read_options", "simulated_options"]

NAMES = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")  # the first one that is set is read
UNCACHED = "PYTORCH_NO_CUDA_MEMORY_CACHING"
MIB = 1024**2
NUM_INTERVALS = 16  # of roundup_power2_divisions: [1M, 2M), [2M, 4M), ..., 32G and above
LARGE_SEGMENT_MB, LEAST_LARGE_SEGMENT_MB = 20, 11
MOST_THREADS = 128  # that register pinned memory
MOST = 2**64


@dataclass(frozen=True)
class AllocatorOptions:
    """What the environment says. `name` and `text`: the variable that counts and its value, both ""
    where none is set; `hidden`: the one that torch does not read because of it, or "".
    """

    name: str = ""
    text: str = ""
    hidden: str = ""
    given: dict[str, Any] = field(default_factory=dict, hash=False)
    """The options by torch's names, with their values as torch understands them."""

    @property
    def source(self) -> str:
        """Where the options come from, for a person."""
        if not self.name:
            return "torch's defaults"
        hidden = f" ({self.hidden} is set too, and torch does not read it)" if self.hidden else ""
        return f"{self.name}={self.text}{hidden}"

    @property
    def line(self) -> str:
        """All of it in one line for a person; "" where the environment says nothing."""
        if not self.name:
            return ""
        without = self.to_json()["without_effect"]
        given = [
            f"{name} = {value}{' (no effect on the card)' if name in without else ''}"
            for name, value in self.to_json()["settings"].items()
        ]
        return f"allocator: {', '.join(given) or 'torch defaults'}; from {self.source}"

    def settings(self) -> dict[str, Any]:
        """Keyword arguments of `memory.allocator.AllocatorSettings`, less the card's. Bytes."""
        sizes = {SIZES[name]: value * MIB for name, value in self.given.items() if name in SIZES}
        return sizes | {SAME[name]: value for name, value in self.given.items() if name in SAME}

    def to_json(self) -> dict[str, Any]:
        """`plan --json`'s "allocator": `source`, `settings` by torch's names, and `without_effect`,
        the options among them that leave the card's memory as it is.
        """
        settings = {n: list(v) if isinstance(v, tuple) else v for n, v in self.given.items()}
        without = [name for name in settings if name not in (*SIZES, *SAME)]
        return {"source": self.source, "settings": settings, "without_effect": without}


SIZES = {
    "max_split_size_mb": "max_split_size",
    "max_non_split_rounding_mb": "max_non_split_rounding_size",
    "large_segment_size_mb": "large_segment_size",
}
SAME = {
    "roundup_power2_divisions": "roundup_power2_divisions",
    "garbage_collection_threshold": "garbage_collection_threshold",
    "expandable_segments": "expandable_segments",
    "per_process_memory_fraction": "process_fraction",
}


def read_options(environ: Mapping[str, str] = os.environ) -> AllocatorOptions:
    """The options in force. Raises ConfigError for what torch refuses."""
    found = [name for name in NAMES if name in environ]
    if not found:
        return AllocatorOptions()
    name, hidden = found[0], "".join(found[1:])
    try:
        return AllocatorOptions(name, environ[name], hidden, _parse(environ[name]))
    except ValueError as error:
        raise ConfigError(f"{name}={environ[name]}: {error}; change it or unset {name}") from None


def simulated_options(environ: Mapping[str, str] = os.environ) -> AllocatorOptions:
    """The options in force, for a plan. Raises ConfigError also for what cannot be simulated: the
    driver's own pool, and an allocator that caches nothing.
    """
    options = read_options(environ)
    if options.given.get("backend") == "cudaMallocAsync":
        raise ConfigError(
            f"{options.name}={options.text}: the driver's pool cannot be simulated, so no plan "
            "would hold; use backend:native"
        )
    if UNCACHED in environ:
        raise ConfigError(f"{UNCACHED} is set: without a cache no plan would hold; unset it")
    return options


def _parse(text: str) -> dict[str, Any]:
    tokens = _Tokens(text)
    given: dict[str, Any] = {}
    while not tokens.done:
        option = tokens.take("")
        if option not in OPTIONS:
            raise ValueError(f"torch has no option {option!r}{nearest(option, OPTIONS)}")
        tokens.take(f"a value for {option}")  # the colon: torch looks at the place, not the sign
        try:
            value = OPTIONS[option](tokens)
            if given.setdefault(option, value) != value:
                raise ValueError(f"{given[option]} and {value} are given, where one is meant")
        except ValueError as error:
            raise ValueError(f"{option}: {error}") from None
        if not tokens.done:
            tokens.take("")  # the comma
    _check(given)
    return given


def _check(given: dict[str, Any]) -> None:
    """What one option demands of another, whichever comes first."""
    least = given.get("large_segment_size_mb", LARGE_SEGMENT_MB)
    for option in ("max_split_size_mb", "max_non_split_rounding_mb"):
        if given.get(option, least) < least:
            raise ValueError(f"{option}: {given[option]} must be {least} or more")
    if given.get("expandable_segments") and least % 2:
        raise ValueError(
            f"large_segment_size_mb: {least} must be even with expandable_segments, since CUDA "
            "maps pages of 2 MiB"
        )


class _Tokens:
    """Words, and the signs , : [ ] between them."""

    def __init__(self, text: str):
        self._tokens = re.findall(r"[,:\[\]]|[^,:\[\]]+", "".join(text.split()))
        self._place = 0

    @property
    def done(self) -> bool:
        return self._place >= len(self._tokens)

    @property
    def next(self) -> str:
        return "" if self.done else self._tokens[self._place]

    def take(self, what: str) -> str:
        if self.done:
            raise ValueError(f"it ends where {what} should be")
        self._place += 1
        return self._tokens[self._place - 1]


def _whole(tokens: _Tokens, what: str = "a whole number") -> int:
    """C's strtoull: digits, and whatever follows them."""
    word = tokens.take(what)
    digits = re.match(r"[+-]?\d+", word, re.ASCII)
    if digits is None or abs(int(digits[0])) >= MOST:
        raise ValueError(f"{word!r} is not a whole number")
    return int(digits[0]) % MOST


def _megabytes(least: int) -> Callable[[_Tokens], int]:
    def read(tokens: _Tokens) -> int:
        value = _whole(tokens)
        if value < least:
            raise ValueError(f"{value} must be {least} or more")
        return min(value, MOST // MIB - 1)

    return read


def _number(tokens: _Tokens) -> float:
    """C's strtod, for decimal numbers."""
    word = tokens.take("a number")
    digits = re.match(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", word, re.ASCII)
    if digits is None or not math.isfinite(float(digits[0])):
        raise ValueError(f"{word!r} is not a number")
    return float(digits[0])


def _threshold(tokens: _Tokens) -> float:
    value = _number(tokens)
    if not 0 < value < 1:
        raise ValueError(f"{value:g} must be above 0 and below 1")
    return value


def _fraction(tokens: _Tokens) -> float:
    value = _number(tokens)
    if not 0 <= value <= 1:
        raise ValueError(f"{value:g} must be 0 to 1")
    return value


def _flag(tokens: _Tokens) -> bool:
    word = tokens.take("True or False")
    if word not in ("True", "False"):
        raise ValueError(f"{word!r} must be True or False")
    return word == "True"


def _backend(tokens: _Tokens) -> str:
    word = tokens.take("native")
    if word not in ("native", "cudaMallocAsync"):
        raise ValueError(f"{word!r} must be native or cudaMallocAsync")
    return word


def _threads(tokens: _Tokens) -> int:
    value = _whole(tokens)
    if not _power_of_two(value) or value > MOST_THREADS:
        raise ValueError(f"{value} must be a power of two, {MOST_THREADS} at most")
    return value


def _divisions(tokens: _Tokens) -> int | tuple[int, ...]:
    """One number for all sizes, or `[size in MB:number,...,>:number]`."""
    if tokens.next != "[":
        value = _whole(tokens)
        if not _power_of_two(value):
            raise ValueError(f"{value} must be a power of two")
        return value
    tokens.take("[")
    found, first, last = [0] * NUM_INTERVALS, True, 0
    while tokens.next != "]":
        size = tokens.take("] or a size")
        tokens.take(f"the divisions of size {size}")
        value = _whole(tokens, f"the divisions of size {size}")
        if value and not _power_of_two(value):
            raise ValueError(f"{value} must be a power of two, or 0")
        if size == ">":
            found[last + 1 :] = [value] * (NUM_INTERVALS - last - 1)
        else:
            digits = re.match(r"\d+", size, re.ASCII)
            if digits is None or not _power_of_two(int(digits[0])):
                raise ValueError(f"size {size} must be a power of two")
            last = min(int(digits[0]).bit_length() - 1, NUM_INTERVALS - 1)
            if first:
                found[:last] = [value] * last
                first = False
            found[last] = value
        if tokens.next != "]":
            tokens.take("]")  # the comma
    tokens.take("]")
    return tuple(found)


def _power_of_two(value: int) -> bool:
    return value > 0 and value & (value - 1) == 0


OPTIONS: dict[str, Callable[[_Tokens], Any]] = {
    "max_split_size_mb": _megabytes(0),
    "max_non_split_rounding_mb": _megabytes(0),
    "large_segment_size_mb": _megabytes(LEAST_LARGE_SEGMENT_MB),
    "garbage_collection_threshold": _threshold,
    "roundup_power2_divisions": _divisions,
    "expandable_segments": _flag,
    "per_process_memory_fraction": _fraction,
    "backend": _backend,
    "release_lock_on_cudamalloc": _flag,
    "release_lock_on_hipmalloc": _flag,
    "graph_capture_record_stream_reuse": _flag,
    "throw_on_cudamalloc_oom": _flag,
    "pinned_use_background_threads": _flag,
    "pinned_use_cuda_host_register": _flag,
    "pinned_use_hip_host_register": _flag,
    "pinned_num_register_threads": _threads,
    "pinned_reserve_segment_size_mb": _megabytes(1),
    "pinned_max_round_threshold_mb": _megabytes(0),
    "pinned_max_cached_size_mb": _megabytes(0),
    "pinned_free_catch_all": _flag,
}
