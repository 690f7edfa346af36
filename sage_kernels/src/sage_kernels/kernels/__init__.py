"""The kernels, one file each, in order of preference. A new kernel is a new file and one line in KERNELS."""

from sage_kernels.kernels import emulation, int8_sm90, int8_triton, nvfp4_cuda, nvfp4_triton, sdpa
from sage_kernels.kernels.interface import Kernel

KERNELS: tuple[Kernel, ...] = (
    nvfp4_cuda.KERNEL,
    nvfp4_triton.KERNEL,
    nvfp4_cuda.MXFP8_KERNEL,
    int8_sm90.KERNEL,
    *int8_triton.KERNELS,
    sdpa.KERNEL,
    *emulation.KERNELS,
)


def find_kernel(name: str) -> Kernel:
    """The kernel called `name`.

    Raises:
        KeyError: there is none.
    """
    for kernel in KERNELS:
        if kernel.name == name:
            return kernel
    raise KeyError(f"no kernel is called {name!r}; there are {', '.join(kernel.name for kernel in KERNELS)}")
