"""Positions that are a function of a row alone.

transformers has two kinds of rotary embedding whose frequencies follow the longest position of a
call, so a row's log-probs would change with its neighbours, and a key that was cached would have
other frequencies than the query that meets it:

    longrope   short factors for calls up to `original_max_position_embeddings`, long ones beyond
    dynamic    a base that grows with calls longer than `max_position_embeddings`:
               theta' = theta (s L / M - (s - 1))^(d / (d - 2))          L: the longest position

A run has a window: the most tokens that a prompt and its completion may have together. It chooses
the frequencies once, as inference engines do (vLLM takes the long factors where its window is
longer than the first one): those of a call as long as the window. The choice is written into the
configuration that the model is built from, and a merged export carries it.
"""

from typing import Any

from lowmem_grpo.errors import ModelError

__all__ = ["check_window", "fix_frequencies"]


def fix_frequencies(config, window: int | None) -> list[str]:
    """Make the rotary frequencies of a configuration those of a row of `window` tokens (None: of
    the first window), whatever is computed together. Returns a line for each choice to be told of.
    """
    parameters = getattr(config, "rope_parameters", None)
    if not isinstance(parameters, dict):
        return []
    nested = [each for each in parameters.values() if isinstance(each, dict)]
    lines = []
    for rope in nested or [parameters]:
        kind = rope.get("rope_type", rope.get("type"))
        if kind == "longrope":
            lines += _long_or_short(rope, config, window)
        elif kind == "dynamic" and not rope.get("alpha"):  # with which HunYuan's are fixed
            lines += _one_base(rope, config, window)
    return list(dict.fromkeys(lines))


def _long_or_short(rope: dict[str, Any], config, window: int | None) -> list[str]:
    first = rope.get("original_max_position_embeddings") or getattr(
        config, "original_max_position_embeddings", config.max_position_embeddings
    )
    if window is None or window <= first:
        rope["long_factor"] = rope["short_factor"]
        return []
    rope["short_factor"] = rope["long_factor"]
    return [
        f"rotary embedding longrope: the long factors for all rows, since a prompt and its "
        f"completion may have {window} tokens and the short ones end at {first}"
    ]


def _one_base(rope: dict[str, Any], config, window: int | None) -> list[str]:
    first, factor = config.max_position_embeddings, rope["factor"]
    rope["rope_type"] = "default"
    rope.pop("type", None)
    if window is None or window <= first:
        return []
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    size = int(head * rope.get("partial_rotary_factor", 1.0))
    rope["rope_theta"] *= (factor * window / first - (factor - 1)) ** (size / (size - 2))
    return [
        f"rotary embedding dynamic: the frequencies of {window} tokens for all rows, which a "
        f"prompt and its completion may have; they change from {first} on"
    ]


def check_window(name: str, config, window: int | None) -> None:
    """Raises ModelError where a row of `window` tokens is longer than the table of learned
    positions of a model that has one.
    """
    most = getattr(config, "max_position_embeddings", None)
    if hasattr(config, "rope_parameters") or window is None or most is None or window <= most:
        return
    raise ModelError(
        f"{name} ({config.model_type}) has {most} learned positions, and a prompt with its "
        f"completion may have {window} tokens: use a smaller --max-prompt-length or "
        "--max-completion-length"
    )
