"""Whether the package flash-attn can be used."""

from __future__ import annotations

import importlib.metadata
import re

__all__ = ["why_no_flash_attn"]

LEAST = (2, 5, 5)  # before it, heads of 256 had a backward pass on A100 and H100 alone


def why_no_flash_attn() -> str | None:
    """What rules out the package flash-attn, None if nothing does."""
    # A flash-attn built for another torch is found but does not load, and flash-attn-4 alone
    # installs a `flash_attn` without this function: only the import tells.
    try:
        from flash_attn import flash_attn_varlen_func  # noqa: F401
    except ModuleNotFoundError:
        return "the package flash-attn is not installed"
    except (ImportError, OSError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        return f"the package flash-attn does not load: {reason.split('. ')[0]}"
    version = importlib.metadata.version("flash_attn")
    if tuple(map(int, re.findall(r"\d+", version)[:3])) < LEAST:
        return f"flash-attn {version} is too old ({'.'.join(map(str, LEAST))} or newer does)"
    return None
