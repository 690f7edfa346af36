"""Times candidates for the block sizes of the training kernels on the GPU at hand, for `training/configs.py`.

    PYTHONPATH=sage_kernels/src python sage_kernels/benchmarks/tune_training.py

One of the three kernels is varied at a time; times are medians of a forward or of a backward pass. Block sizes decide
which numbers share a scale, so a change of the table changes the recipe that the kernels are tested against.
"""

import argparse
import sys
from collections.abc import Iterator
from dataclasses import replace

import torch

from sage_kernels.architectures import device_architecture
from sage_kernels.benchmark_shapes import TRAINING_SHAPES, BenchmarkShape
from sage_kernels.gpu_timing import time_on_gpu
from sage_kernels.training import triton_backend
from sage_kernels.training.configs import BlockConfig, TrainingConfig, find_config

FORWARD = ((128, 128, 8, 3), (128, 128, 8, 2), (128, 64, 8, 3), (64, 128, 4, 3), (64, 64, 4, 3))
KEY_VALUE = ((64, 128, 8, 2), (64, 128, 8, 3), (32, 128, 8, 3), (64, 64, 4, 2), (32, 64, 4, 2))
QUERY = ((128, 64, 8, 3), (128, 64, 8, 2), (128, 128, 8, 2), (64, 64, 4, 2), (64, 64, 4, 3))


def main() -> None:
    """Print a time for each candidate."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [shape.name for shape in TRAINING_SHAPES]
    parser.add_argument("--shapes", nargs="+", choices=names, default=names)
    parser.add_argument("--precision", choices=("int8", "fp8"), default="int8")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("there is no CUDA GPU here")
    for shape in TRAINING_SHAPES:
        if shape.name in options.shapes:
            time_candidates(shape, options.precision)


def candidates(current: TrainingConfig, head_dim: int) -> Iterator[tuple[str, TrainingConfig]]:
    """What is varied, and the whole configuration."""
    for blocks in FORWARD:
        yield "forward", replace(current, forward=BlockConfig(*blocks))
    for blocks in KEY_VALUE:
        for split in (False, True) if head_dim > 64 else (False,):
            yield "key_value", replace(current, key_value=BlockConfig(*blocks), split_head_dim=split)
    for blocks in QUERY:
        yield "query", replace(current, query=BlockConfig(*blocks))


def time_candidates(shape: BenchmarkShape, precision: str) -> None:
    """All candidates at one shape; one that the GPU can't run is printed with the reason."""
    device = torch.device("cuda", torch.cuda.current_device())
    size = (shape.batch, shape.heads, shape.length, shape.head_dim)
    q, k, v, d_output = (torch.randn(size, device=device, dtype=torch.bfloat16) for _ in range(4))
    output, scale = torch.empty_like(q), shape.head_dim**-0.5
    current = find_config(device_architecture(device), triton_backend.padded_head_dim(shape.head_dim))
    saved = triton_backend.forward(q, k, v, output, shape.is_causal, scale, precision, current)
    options = (shape.is_causal, scale, precision)
    print(shape)
    for kind, config in candidates(current, shape.head_dim):

        def call(kind: str = kind, config: TrainingConfig = config) -> object:
            if kind == "forward":
                return triton_backend.forward(q, k, v, output, *options, config)
            return triton_backend.backward(d_output, None, v, output, saved, *options, config)

        split = " split" * config.split_head_dim if kind == "key_value" else ""
        name = f"{kind:10} {getattr(config, kind)}{split}"
        try:
            print(f"  {name:80} {time_on_gpu(call, device):8.2f} ms", flush=True)
        except Exception as reason:
            print(f"  {name:80} {str(reason).splitlines()[0][:60]}", flush=True)


if __name__ == "__main__":
    main()
