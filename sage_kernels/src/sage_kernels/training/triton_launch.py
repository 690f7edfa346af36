"""What every launch of a Triton kernel needs from its surroundings."""

import contextlib
import importlib.util
from functools import lru_cache
from typing import Any

import torch

NO_TRITON = "Triton is not installed; `pip install triton` (Linux) or `pip install triton-windows` (Windows)"


def on_device(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Triton launches on the current device, which need not be the tensors'."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(device)


@lru_cache
def triton_is_missing() -> bool:
    """Whether Triton can't be imported; does not import it."""
    return importlib.util.find_spec("triton") is None
