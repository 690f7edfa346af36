"""Compiles the INT8 kernels for a GPU that need not be there, through Triton's own launch path.

    python compile_int8_triton.py 8.9 [number of CALLS]

Prints, one JSON object a line, the kernel, the shared memory of a program, what the call was, and which values are read
by an asynchronous MMA from registers and by something else too.
"""

import json
import re
import sys

import torch
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from int8_cases import call_of, make_options, make_qkv
from sage_kernels.architectures import find_architecture
from sage_kernels.kernels import int8_triton

CALLS = (("plain", 64, torch.bfloat16), ("additive", 128, torch.bfloat16), ("bool", 256, torch.bfloat16))


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


def values_read_twice(ttgir):
    """Values that a wgmma reads from registers, or that are the same registers, and that have another reader.

    After its last reader that is no wgmma a register is used for something else, though the wgmma may not have read it.
    """
    found = []
    for match in re.finditer(r"ttng\.warp_group_dot (%\w+),[^\n]*: tensor<", ttgir):
        value, before = match[1], ttgir[: match.start()]
        while value is not None:
            start = before.rindex(f" {value} = ")  # names are used again in the next loop
            after = ttgir.find(f" {value} = ", start + 1)
            scope = ttgir[start : after if after > 0 else None]
            if len(re.findall(rf"{value}(?!\w)", scope)) > 2:  # its definition and one use
                found.append(value)
            source = re.match(rf" {value} = (?:tt\.reshape|tt\.trans|ttg\.convert_layout) (%\w+)", scope)
            value = source[1] if source else None
    return found


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
        for kind, head_dim, dtype in CALLS[: int(sys.argv[2]) if sys.argv[2:] else None]:
            q, k, v = make_qkv(2, 4, 2, 300, 300, head_dim, dtype, "cpu")
            call = call_of(q, k, v, kernel.precision, **make_options(kind, 2, 4, 300, 300, "cpu"))
            for _ in range(2):  # the second launch finds what the first has left
                kernel.run(kernel.prepare(call))
            for name, binary in compiled:
                case = f"{kernel.precision} {kind} D{head_dim}"
                twice = values_read_twice(binary.asm["ttgir"])
                facts = {"kernel": name, "case": case, "shared": binary.metadata.shared, "read_twice": twice}
                print(json.dumps(facts), flush=True)
            compiled.clear()


if __name__ == "__main__":
    main()
