"""Time and memory of calls on a GPU."""

import random
import statistics
from collections.abc import Callable, Mapping, Sequence
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


def time_in_turns(
    methods: Mapping[str, Sequence[Callable[[], object]]], seconds: float, device: torch.device
) -> dict[str, float]:
    """Median milliseconds of one call of each method.

    Methods take turns, so that a GPU that grows warm slows all of them down, in another order each time, so that none
    always follows the one that makes it warmest.

    Args:
        methods: calls that differ only in their tensors, by name; one measurement makes all of a method's calls in a
            row, so that with enough tensors none is still in the cache from the call before.
        seconds: of measurements in all; at least three rounds are made whatever they take.
        device: whose current stream the calls use.
    """
    samples: dict[str, list[float]] = {name: [] for name in methods}
    with torch.cuda.device(device):

        def measure_round() -> float:
            total = 0.0
            for name, calls in random.sample([*methods.items()], len(methods)):
                elapsed = _measure(lambda calls=calls: [call() for call in calls])  # type: ignore[misc]
                samples[name].append(elapsed / len(calls))
                total += elapsed
            return total

        measure_round()  # warms up
        for values in samples.values():
            values.clear()
        estimate = measure_round()
        for _ in range(min(_REPETITIONS[1], max(_REPETITIONS[0], int(seconds * 1000 / max(estimate, 1e-3)))) - 1):
            measure_round()
    return {name: statistics.median(values) for name, values in samples.items()}


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
