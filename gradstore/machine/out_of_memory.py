"""How a want of memory is told from other errors."""

from __future__ import annotations

import torch

_MESSAGES = ("not enough memory", "can't allocate memory", "out of memory", "bad_alloc", "cannot allocate memory")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on any device: torch raises a bare RuntimeError on the CPU."""
    if isinstance(error, (MemoryError, torch.cuda.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error).lower() for words in _MESSAGES)
