"""Time and memory of calls on a GPU."""

import statistics
from collections.abc import Callable
from typing import Any

import torch

_SECONDS = 0.5  # of measurements
_REPETITIONS = (3, 50)


def time_on_gpu(call: Callable[[], object], device: torch.device) -> float:
    """Median milliseconds of `call` on the current stream of `device`, after two calls that are not counted."""
    with torch.cuda.device(device):
        for _ in range(2):
            estimate = _measure(call)
        least, most = _REPETITIONS
        repetitions = min(most, max(least, int(_SECONDS * 1000 / max(estimate, 1e-3))))
        return statistics.median(_measure(call) for _ in range(repetitions))


def _measure(call: Callable[[], object]) -> float:
    make_event: Any = torch.cuda.Event  # has no type annotations
    start, end = make_event(enable_timing=True), make_event(enable_timing=True)
    start.record()
    call()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end))


def extra_bytes(call: Callable[[], torch.Tensor], device: torch.device) -> int:
    """Most memory that `call` held at once beyond what was there before and beyond its result."""
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    result = call()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before - result.numel() * result.element_size()
