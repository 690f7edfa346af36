"""One row per GPU architecture: what its hardware could run and why not. A new GPU is a new row.

Capability is exact: sm_120 (RTX 50) is not "sm_100 or newer". sm_100 has FP4 tensor cores behind other instructions.
"""

from dataclasses import dataclass
from functools import lru_cache

import torch

from sage_kernels.precision import Precision

_NO_FP4 = "has no FP4 tensor cores; they are in sm_120a and sm_121a (RTX 50, RTX PRO Blackwell, DGX Spark)"
_NO_MXFP8 = "has no block-scaled FP8 tensor cores; they are in sm_120a and sm_121a"
_TCGEN05_ONLY = "has block-scaled tensor cores behind tcgen05 instructions; this version has no kernel for them"
_NO_INT8_MMA = "is older than sm_80, the oldest architecture of the 8-bit kernels"


@dataclass(frozen=True)
class Architecture:
    """One compute capability.

    Attributes:
        capability: (major, minor), matched exactly.
        products: for people.
        target: what kernels are compiled for.
        shared_memory: bytes that one thread block can have.
        runnable: precisions the hardware can run, fastest first.
        refusals: why it can't run the others.
        never_run: of `runnable`, those whose kernels are compiled for it but ran on other GPUs only.
    """

    capability: tuple[int, int]
    products: str
    target: str
    shared_memory: int
    runnable: tuple[Precision, ...]
    refusals: dict[Precision, str]
    never_run: tuple[Precision, ...] = ()

    @property
    def name(self) -> str:
        """As compilers write it, such as sm_120."""
        return f"sm_{self.capability[0]}{self.capability[1]}"

    @property
    def fp8_mma(self) -> bool:
        """Whether its tensor cores multiply E4M3."""
        return self.capability >= (8, 9)


_8BIT: tuple[Precision, ...] = ("int8", "int8_fp16", "fp16")
_4BIT: tuple[Precision, ...] = ("fp4", "fp8_fp4", *_8BIT)
# never_run: quantised kernels were tested on an H100 only.
_INT8_ELSEWHERE: tuple[Precision, ...] = ("int8", "int8_fp16")
_DATACENTER_ELSEWHERE: tuple[Precision, ...] = ("fp4", *_INT8_ELSEWHERE)
_4BIT_ELSEWHERE: tuple[Precision, ...] = ("fp4", "fp8_fp4", *_INT8_ELSEWHERE)
_NO_4BIT: dict[Precision, str] = {"fp4": _NO_FP4, "fp8_fp4": _NO_MXFP8}
_NO_8BIT: dict[Precision, str] = _NO_4BIT | {"int8": _NO_INT8_MMA, "int8_fp16": _NO_INT8_MMA}
_DATACENTER: tuple[Precision, ...] = ("fp4", *_8BIT)
_NO_DATACENTER_FP8: dict[Precision, str] = {"fp8_fp4": _TCGEN05_ONLY}
_NO_DATACENTER: dict[Precision, str] = {"fp4": _TCGEN05_ONLY, "fp8_fp4": _TCGEN05_ONLY}

ARCHITECTURES: tuple[Architecture, ...] = (
    Architecture((7, 5), "RTX 20, T4", "sm_75", 64 << 10, ("fp16",), _NO_8BIT),
    Architecture((8, 0), "A100, A30", "sm_80", 163 << 10, _8BIT, _NO_4BIT, _INT8_ELSEWHERE),
    Architecture((8, 6), "RTX 30, A10, A40", "sm_86", 99 << 10, _8BIT, _NO_4BIT, _INT8_ELSEWHERE),
    Architecture((8, 7), "Jetson Orin", "sm_87", 163 << 10, _8BIT, _NO_4BIT, _INT8_ELSEWHERE),
    Architecture((8, 9), "RTX 40, L4, L40", "sm_89", 99 << 10, _8BIT, _NO_4BIT, _INT8_ELSEWHERE),
    Architecture((9, 0), "H100, H200, GH200", "sm_90a", 227 << 10, _8BIT, _NO_4BIT),
    Architecture((10, 0), "B200, GB200", "sm_100a", 227 << 10, _DATACENTER, _NO_DATACENTER_FP8, _DATACENTER_ELSEWHERE),
    Architecture((10, 3), "B300, GB300", "sm_103a", 227 << 10, _DATACENTER, _NO_DATACENTER_FP8, _DATACENTER_ELSEWHERE),
    Architecture((11, 0), "Jetson Thor", "sm_110a", 227 << 10, _8BIT, _NO_DATACENTER, _INT8_ELSEWHERE),
    Architecture((12, 0), "RTX 50, RTX PRO Blackwell", "sm_120a", 99 << 10, _4BIT, {}, _4BIT_ELSEWHERE),
    Architecture((12, 1), "DGX Spark (GB10)", "sm_121a", 99 << 10, _4BIT, {}, _4BIT_ELSEWHERE),
)


def find_architecture(capability: tuple[int, int]) -> Architecture:
    """The row of a compute capability; one that can only run 16 bit where the table has none."""
    for architecture in ARCHITECTURES:
        if architecture.capability == capability:
            return architecture
    known = ", ".join(architecture.name for architecture in ARCHITECTURES)
    reason = f"is not in the table of known architectures ({known})"
    others: tuple[Precision, ...] = ("fp4", "fp8_fp4", "int8", "int8_fp16")
    name = f"sm_{capability[0]}{capability[1]}"
    return Architecture(capability, "unknown GPU", name, 48 << 10, ("fp16",), dict.fromkeys(others, reason))


def device_architecture(device: torch.device) -> Architecture | None:
    """The architecture of a CUDA device; None for any other device, and for AMD GPUs, which torch also calls cuda."""
    if device.type != "cuda" or torch.version.hip is not None:
        return None
    return _cuda_architecture(torch.cuda.current_device() if device.index is None else device.index)


@lru_cache
def _cuda_architecture(index: int) -> Architecture:
    return find_architecture(torch.cuda.get_device_capability(index))
