"""Tells errors for which less at once may help from all others."""

import re

import torch

__all__ = ["first_line", "is_out_of_memory"]

# torch has a class of its own for its allocator's errors alone. What else there is comes as a
# RuntimeError, and says so in its first line:
#   CUDA error: out of memory                          pinned pages, contexts, streams, events
#   CUDA driver error: out of memory                   expandable segments
#   CUDA error: CUBLAS_STATUS_ALLOC_FAILED when ...    cuBLAS's workspaces; cuSOLVER and cuSPARSE
#   CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED, of cuDNN 9; CUDNN_STATUS_ALLOC_FAILED
#   Triton Error [CUDA]: out of memory
#   DefaultCPUAllocator: can't allocate memory ...     "not enough memory" on Windows
# Errors after which a card answers nothing more (an illegal address, a device-side assert) have
# none of these words.
_WORDS = re.compile(
    r"\bout of memory\b|\bcan't allocate memory\b|\bnot enough memory\b|\bstd::bad_alloc\b"
    r"|_ALLOC(ATION)?_FAILED\b"
)


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether an error says that memory did not suffice: the card's, pinned memory or the host's;
    whichever library asked for it.
    """
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and bool(_WORDS.search(first_line(error)))


def first_line(error: BaseException) -> str:
    """An error's words up to the first line break; its class where it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
