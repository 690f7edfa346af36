"""How long attention took, kernel by kernel, and how that compares to 16 bit: measured on a sample of the calls, and as
the kernel package predicts it from the times that it has of this kind of GPU.

On a GPU a call is timed by a pair of CUDA events, which are read when the sampling is over: no call waits. Elsewhere
the clock is read. The first call of each kernel and shape is a warm-up (compilation, tuning) and counts only if it is
the only one that was timed.
"""

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from statistics import mean
from typing import TypeVar

import torch

TIMED_AT_FIRST = 4
TIMED_EVERY = 16
BASELINE = "16 bit, for comparison"
FP16 = "fp16"
EARLIER_OVERRIDE = "earlier override"
EMULATED = "_emulated"  # how names of kernels end that compute in plain PyTorch: their time says nothing

_Output = TypeVar("_Output")


@dataclass(frozen=True)
class CallShape:
    """What the time of a call depends on; query and key as the model gives them, in `layout`."""

    query: tuple[int, ...]
    key: tuple[int, ...]
    layout: str
    masked: bool
    dtype: torch.dtype
    device: torch.device


@dataclass(frozen=True)
class Prediction:
    """Seconds of a call by times measured on this kind of GPU: with the kernel, and with torch's fastest in 16 bit."""

    seconds: float
    sixteen_bit_seconds: float


@dataclass
class _Series:
    """Calls of one kernel on one shape."""

    calls: int = 0
    spans: list[Callable[[], float]] = field(default_factory=list)
    prediction: "Prediction | None" = None

    def seconds_per_call(self) -> float:
        seconds = [span() for span in self.spans]
        return mean(seconds[1:] or seconds)


@dataclass(frozen=True)
class Timing:
    """What one sampling took.

    Attributes:
        seconds: attention per kernel: mean of the timed calls times the number of calls, shape by shape.
        speedup: 16-bit time over measured time, for the calls by quantised kernels whose shape was also timed in 16
            bit; None where there are none.
        compared_calls: how many calls those are.
        predicted_speedup: the same quotient as predicted, for the calls by quantised kernels with a prediction; None
            where there are none.
        predicted_calls: how many calls those are.
        unpredicted: why other calls by quantised kernels have no prediction; None where all have one.
        emulated: whether any call was computed by emulation, whose time says nothing.
    """

    seconds: Mapping[str, float]
    speedup: float | None
    compared_calls: int
    predicted_speedup: float | None = None
    predicted_calls: int = 0
    unpredicted: str | None = None
    emulated: bool = False


class AttentionTimer:
    """Times of one patched model's attention calls. Safe to use from several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._series: dict[tuple[str, CallShape], _Series] = {}

    def reset(self) -> None:
        """Forget everything, for a new run."""
        with self._lock:
            self._series.clear()

    def run(
        self, kernel: str, shape: CallShape, compute: Callable[[], _Output], prediction: Prediction | None = None
    ) -> _Output:
        """compute(), counted and sometimes timed."""
        with self._lock:
            series = self._series.setdefault((kernel, shape), _Series(prediction=prediction))
            number = series.calls
            series.calls += 1
        if number >= TIMED_AT_FIRST and number % TIMED_EVERY:
            return compute()
        with _span(shape.device) as span:
            output = compute()
        with self._lock:
            series.spans.append(span.seconds)
        return output

    def wants_baseline(self, shape: CallShape) -> bool:
        """Whether too few 16-bit calls of this shape have been timed to compare with."""
        with self._lock:
            names = (BASELINE, FP16)
            return sum(len(self._series[name, shape].spans) for name in names if (name, shape) in self._series) < 3

    def read(self) -> Timing:
        """What was measured since reset(). Waits for the GPU."""
        with self._lock:
            low = {key: one for key, one in self._series.items() if key[0] not in {BASELINE, FP16, EARLIER_OVERRIDE}}
            series = {key: one for key, one in self._series.items() if one.spans}
        per_call = {key: one.seconds_per_call() for key, one in series.items()}
        seconds: dict[str, float] = {}
        in_16_bit = measured = 0.0
        compared = 0
        for (kernel, shape), one in series.items():
            if kernel == BASELINE:
                continue
            seconds[kernel] = seconds.get(kernel, 0.0) + per_call[kernel, shape] * one.calls
            baseline = per_call.get((FP16, shape), per_call.get((BASELINE, shape)))
            if (kernel, shape) in low and baseline is not None:
                in_16_bit += baseline * one.calls
                measured += per_call[kernel, shape] * one.calls
                compared += one.calls
        predicted = [one for one in low.values() if one.prediction is not None]
        return Timing(
            seconds,
            in_16_bit / measured if measured else None,
            compared,
            _predicted_speedup(predicted),
            sum(one.calls for one in predicted),
            _why_unpredicted([key for key, one in low.items() if one.prediction is None]),
            any(kernel.endswith(EMULATED) for kernel, _ in low),
        )


def _predicted_speedup(series: Sequence[_Series]) -> float | None:
    pairs = [(one.prediction, one.calls) for one in series if one.prediction is not None]
    seconds = sum(prediction.seconds * calls for prediction, calls in pairs)
    in_16_bit = sum(prediction.sixteen_bit_seconds * calls for prediction, calls in pairs)
    return in_16_bit / seconds if seconds else None


def _why_unpredicted(calls: Sequence[tuple[str, CallShape]]) -> str | None:
    if not calls:
        return None
    native = [shape for kernel, shape in calls if not kernel.endswith(EMULATED)]
    if not native:
        return "emulation"
    if all(shape.masked for shape in native):
        return "calls with a mask have no measured times"
    device = native[0].device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return f"no times of such calls are known for this device ({name})"


class _CudaSpan:
    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.current_stream(device)
        self._start, self._end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def start(self) -> None:
        self._start.record(self._stream)

    def stop(self) -> None:
        self._end.record(self._stream)

    def seconds(self) -> float:
        self._end.synchronize()
        return self._start.elapsed_time(self._end) / 1000


class _ClockSpan:
    def __init__(self) -> None:
        self._start = self._end = 0.0

    def start(self) -> None:
        self._start = time.perf_counter()

    def stop(self) -> None:
        self._end = time.perf_counter()

    def seconds(self) -> float:
        return self._end - self._start


@contextmanager
def _span(device: torch.device) -> Iterator["_CudaSpan | _ClockSpan"]:
    span = _CudaSpan(device) if device.type == "cuda" else _ClockSpan()
    span.start()
    yield span
    span.stop()
