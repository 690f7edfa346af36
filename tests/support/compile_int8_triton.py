"""Compiles the INT8 kernels for a GPU that need not be there, through Triton's own launch path.

    python compile_int8_triton.py 8.9

Prints, one JSON object a line, the kernel, the shared memory of a program and what the call was.
"""

import json
import sys

import torch
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from int8_cases import call_of, make_options, make_qkv
from sage_kernels.architectures import find_architecture
from sage_kernels.kernels import int8_triton

CALLS = (("plain", 64, torch.bfloat16), ("additive", 128, torch.bfloat16))


class PretendedDriver:
    """As much of a GPU's driver as a launch asks for before it launches."""

    def __init__(self, capability):
        self.capability = capability

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        return GPUTarget("cuda", 10 * self.capability[0] + self.capability[1], 32)


def main():
    major, minor = map(int, sys.argv[1].split("."))
    driver.set_active(PretendedDriver((major, minor)))
    int8_triton.device_architecture = lambda device: find_architecture((major, minor))
    CUDABackend.make_cubin = lambda *arguments: b""  # ptxas takes most of the time, and has nothing to say here
    compiled = []

    def compile_only(function, grid):
        return lambda *arguments, **options: compiled.append(
            (function.__name__, function.run(*arguments, grid=grid, warmup=True, **options))
        )

    JITFunction.__getitem__ = compile_only
    for kernel in int8_triton.KERNELS:
        for kind, head_dim, dtype in CALLS:
            q, k, v = make_qkv(2, 4, 2, 300, 300, head_dim, dtype, "cpu")
            call = call_of(q, k, v, kernel.precision, **make_options(kind, 2, 4, 300, 300, "cpu"))
            for _ in range(2):  # the second launch finds what the first has left
                kernel.run(kernel.prepare(call))
            for name, binary in compiled:
                case = f"{kernel.precision} {kind} D{head_dim}"
                print(json.dumps({"kernel": name, "case": case, "shared": binary.metadata.shared}), flush=True)
            compiled.clear()


if __name__ == "__main__":
    main()
