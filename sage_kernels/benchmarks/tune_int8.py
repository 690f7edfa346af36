"""Time block sizes of the Triton INT8 kernels on the GPU at hand, to choose those of kernels/int8_configs.py.

    PYTHONPATH=sage_kernels/src python sage_kernels/benchmarks/tune_int8.py

Candidates are compiled on all cores first. TFLOP/s, without quantisation, count 4 B H N^2 D, half where causal; the
error is relative L1 to exact attention. What does not fit the GPU is left out.
"""

import argparse
import itertools
import multiprocessing
import os
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import triton

from sage_kernels.attention_call import AttentionCall, make_call
from sage_kernels.benchmark_shapes import FORWARD_SHAPES, BenchmarkShape
from sage_kernels.gpu_timing import time_in_turns
from sage_kernels.kernels.int8_configs import AttentionConfig
from sage_kernels.kernels.int8_triton import KERNELS, Int8TritonKernel
from sage_kernels.selftest import sampled_error

SIZES = ((128, 128, 8, 3), (128, 128, 8, 2), (128, 64, 8, 3), (128, 64, 4, 3), (64, 128, 4, 3), (64, 64, 4, 3))
CANDIDATES = (
    *(AttentionConfig(*size) for size in SIZES),
    *(AttentionConfig(*size, row_sum="unrounded") for size in SIZES),
    *(AttentionConfig(*size, row_sum="ones") for size in SIZES[:3]),
    *(AttentionConfig(*size, partial_sums=True, row_sum="unrounded") for size in SIZES[:3]),
)
SHAPES = ("flux", "wan480p", "cogvideox2b", "sdxl", "llm32k")


def main() -> None:
    """Compile, then one table for each shape and precision."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=[shape.name for shape in FORWARD_SHAPES], default=SHAPES)
    parser.add_argument("--seconds", type=float, default=2.0, help="of measurements for each shape and precision")
    options = parser.parse_args()
    shapes = [shape for shape in FORWARD_SHAPES if shape.name in options.shapes]
    classes = {(shape.head_dim, shape.is_causal) for shape in shapes}
    jobs = [(*key, *case) for key in classes for case in itertools.product(range(len(KERNELS)), CANDIDATES)]
    with multiprocessing.get_context("spawn").Pool(min(14, os.cpu_count() or 1)) as pool:
        working = dict(zip(jobs, pool.starmap(compiles, jobs, chunksize=1), strict=True))
    for shape, (index, kernel) in itertools.product(shapes, enumerate(KERNELS)):
        fitting = [each for each in CANDIDATES if working[shape.head_dim, shape.is_causal, index, each]]
        time_shape(shape, kernel, fitting, options.seconds)


def compiles(head_dim: int, is_causal: bool, index: int, config: AttentionConfig) -> bool:
    """Whether a candidate fits the GPU; what is compiled stays in Triton's cache on disk."""
    torch.set_num_threads(1)
    shape = BenchmarkShape("small", 1, 2, 256, head_dim, is_causal)
    try:
        prepared_call(KERNELS[index], make_inputs(shape, KERNELS[index]), config)()
        torch.cuda.synchronize()
    except (RuntimeError, triton.TritonError) as error:
        print(f"D{head_dim} {KERNELS[index].precision} {config}: {str(error).splitlines()[0][:100]}")
        return False
    return True


def make_inputs(shape: BenchmarkShape, kernel: Int8TritonKernel) -> AttentionCall:
    """Normal Q, K and V in bfloat16; K with a bias for each head."""

    def normal(length: int) -> torch.Tensor:
        size = (shape.batch, shape.heads, length, shape.head_dim)
        return torch.randn(size, device="cuda", dtype=torch.bfloat16)

    k = normal(shape.length).add_(normal(1), alpha=2)
    options = (None, shape.is_causal, None, False, None, "BHND", kernel.precision, False, False)
    return make_call(normal(shape.length), k, normal(shape.length), *options)


def prepared_call(kernel: Int8TritonKernel, call: AttentionCall, config: AttentionConfig) -> Callable[[], Any]:
    """run() with a candidate in place of the package's own block sizes."""
    return partial(kernel.run, replace(kernel.prepare(call), config=config))


def time_shape(
    shape: BenchmarkShape, kernel: Int8TritonKernel, candidates: list[AttentionConfig], seconds: float
) -> None:
    """Print the candidates, fastest first."""
    call = make_inputs(shape, kernel)
    state = kernel.prepare(call)
    calls = {str(config): partial(kernel.run, replace(state, config=config)) for config in candidates}
    times = time_in_turns({name: [each] for name, each in calls.items()}, seconds, call.device)
    print(f"{shape} {kernel.precision}")
    for name, ms in sorted(times.items(), key=lambda item: item[1]):
        error = sampled_error(calls[name]()[0], (call.query, call.key, call.value), call.is_causal)
        print(f"  {shape.flops / ms / 1e9:6.0f} TFLOP/s {ms:8.3f} ms rel. L1 {error:.4f} {name}", flush=True)


if __name__ == "__main__":
    main()
