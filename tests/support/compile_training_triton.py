"""Compiles the training kernels for a GPU that need not be there, through Triton's own launch path.

    python compile_training_triton.py 8.9

Prints, one JSON object a line, the kernel, the shared memory of a program and what the call was.
"""

import json
import sys

import torch
from triton.backends.nvidia.compiler import CUDABackend
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from compile_int8_triton import PretendedDriver
from sage_kernels.architectures import find_architecture
from sage_kernels.training import triton_backend
from training_cases import make_tensors, run

CALLS = ((128, True, "int8"),)


def main():
    major, minor = map(int, sys.argv[1].split("."))
    driver.set_active(PretendedDriver((major, minor)))
    triton_backend.device_architecture = lambda device: find_architecture((major, minor))
    CUDABackend.make_cubin = lambda *arguments: b""  # ptxas takes most of the time, and has nothing to say here
    compiled = []

    def compile_only(function, grid):
        return lambda *arguments, **options: compiled.append(
            (function.__name__, function.run(*arguments, grid=grid, warmup=True, **options))
        )

    JITFunction.__getitem__ = compile_only
    for head_dim, is_causal, precision in CALLS:
        tensors = make_tensors(1, 2, 1, 300, 300, head_dim, torch.bfloat16)
        run(*tensors, is_causal=is_causal, precision=precision)
        for name, binary in compiled:
            case = f"{precision} D{head_dim}"
            print(json.dumps({"kernel": name, "case": case, "shared": binary.metadata.shared}), flush=True)
        compiled.clear()


if __name__ == "__main__":
    main()
