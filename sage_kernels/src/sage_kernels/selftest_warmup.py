"""Compiling ahead for the selftest: what its calls need, in several processes, into the caches on disk.

One after the other, as calls come, the kernels that an installation has to compile itself take minutes. A process
compiles one at a time, so each of several makes some of the calls; the selftest then finds their kernels ready.
"""

import multiprocessing
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import torch

from sage_kernels.attention import attention
from sage_kernels.benchmark_shapes import FORWARD_SHAPES, BenchmarkShape
from sage_kernels.precision import Precision
from sage_kernels.selftest_grid import GridCall, grid

_MOST_PROCESSES = 8  # each holds a context of some hundred MB on the GPU

Progress = Callable[[Iterable[Any], str], Iterable[Any]]


def processes() -> int:
    """How many compile at once: half of the cores, since compilers take threads of their own."""
    return min(_MOST_PROCESSES, (os.cpu_count() or 1) // 2)


def warm_up(rungs: Iterable[Precision], device: torch.device, timings: bool, progress: Progress) -> None:
    """Compile what the grid and the shapes need at these rungs; does nothing where only one process would do it.

    What can't be compiled is left to the selftest, which meets it again and says so.

    Args:
        rungs: precisions that `device` runs; 16 bits need nothing.
        device: a CUDA device.
        timings: whether the shapes are needed too.
        progress: shows the calls made, of an iterable and a description.
    """
    if processes() < 2:
        return
    # spawn: a forked process can't use the GPU.
    with ProcessPoolExecutor(processes(), mp_context=multiprocessing.get_context("spawn")) as pool:
        run_calls(pool, jobs(rungs, timings), device, progress)


def jobs(rungs: Iterable[Precision], timings: bool) -> list[tuple[Precision, GridCall | BenchmarkShape]]:
    """The calls to make; those that compile most come first."""
    calls: list[GridCall | BenchmarkShape] = [*grid(), *(FORWARD_SHAPES if timings else ())]
    return [(rung, call) for call in calls for rung in rungs if rung != "fp16"]


def run_calls(
    pool: Executor,
    calls: Iterable[tuple[Precision, GridCall | BenchmarkShape]],
    device: torch.device,
    progress: Progress,
) -> None:
    """Make the calls in `pool`, in any order."""
    running = [pool.submit(compile_call, precision, call, device) for precision, call in calls]
    try:
        for done in progress(_Sized(running), "compiling"):
            done.result()
    except BrokenProcessPool:
        print("compiling ahead broke off; kernels are compiled as they are needed")


def compile_call(precision: Precision, call: GridCall | BenchmarkShape, device: torch.device) -> None:
    """Make one call in this process, for what it leaves on disk; one head of a shape is enough."""
    if isinstance(call, GridCall):
        tensors, options = call.operands(device), {**call.options(device), "enable_gqa": call.kind == "gqa"}
    else:
        size = (1, 1, call.length, call.head_dim)
        x = torch.zeros(size, device=device, dtype=torch.bfloat16)
        tensors, options = (x, x, x), {"is_causal": call.is_causal}
    try:
        attention(*tensors, precision=precision, **options)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    except Exception:  # whatever it is, the selftest meets it again and reports it
        return


class _Sized:
    """Futures as they complete, with their number, for a progress bar."""

    def __init__(self, futures: list["Future[None]"]) -> None:
        self._futures = futures

    def __len__(self) -> int:
        return len(self._futures)

    def __iter__(self) -> Iterator["Future[None]"]:
        return as_completed(self._futures)
