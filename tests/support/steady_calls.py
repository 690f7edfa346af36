"""Whether calls become slower or keep memory the longer they go on."""

import statistics
import time

import torch

WINDOWS = 40
LARGEST_GROWTH = 1.2


def growth(seconds):
    """Time of the last fifth of the windows over that of the first fifth; a median, which a single pause can't move."""
    part = max(1, len(seconds) // 5)
    return statistics.median(seconds[-part:]) / statistics.median(seconds[:part])


def time_windows(call, calls, synchronize=torch.cuda.synchronize):
    """Seconds of each of WINDOWS windows of `calls` calls in all, and the last result."""
    seconds = []
    for _ in range(WINDOWS):
        synchronize()
        start = time.perf_counter()
        for _ in range(calls // WINDOWS):
            result = call()
        synchronize()
        seconds.append(time.perf_counter() - start)
    return seconds, result
