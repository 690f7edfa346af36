"""A kernel for tests of the machinery: tests/kernels/scaled_copy.cu as a variant, and its parameters."""

import ctypes
from pathlib import Path

from sage_kernels.kernel_variants import KernelVariant

SOURCES = Path(__file__).resolve().parents[1] / "kernels"
VARIANT = KernelVariant(
    family="scaled_copy",
    source="scaled_copy.cu",
    entry="scaled_copy",
    defines=(("TEST_FACTOR", 3), ("TEST_SHARED_BYTES", 65536)),
    head_dim=64,
    causal=False,
    mask="none",
    dtype="any",
    threads=128,
    shared_bytes=65536,
    archs=("sm_120a", "sm_121a"),
)


class Parameters(ctypes.Structure):
    """destination[i] = source[i] * scale * TEST_FACTOR for i < count; doubled where the build emulates."""

    _fields_ = (
        ("source", ctypes.c_void_p),
        ("destination", ctypes.c_void_p),
        ("count", ctypes.c_uint32),
        ("scale", ctypes.c_float),
    )
