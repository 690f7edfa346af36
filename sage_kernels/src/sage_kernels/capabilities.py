"""What each device of this machine can run, and why not the rest."""

from dataclasses import dataclass

import torch

from sage_kernels.architectures import device_architecture
from sage_kernels.dispatch import Refusal, precision_refusal
from sage_kernels.kernels import KERNELS
from sage_kernels.precision import PRECISIONS, Precision


@dataclass(frozen=True)
class DeviceCapabilities:
    """One device.

    Attributes:
        device: as torch writes it, such as cuda:0.
        name: the product.
        architecture: such as sm_120, or None where there is no CUDA GPU.
        precisions: what attention() runs there natively, fastest first.
        refusals: what it doesn't, and why.
    """

    device: str
    name: str
    architecture: str | None
    precisions: tuple[Precision, ...]
    refusals: tuple[Refusal, ...]


def capabilities() -> list[DeviceCapabilities]:
    """Every device of this machine, GPUs first, with what each can run and why not the rest."""
    devices = [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    return [_describe(device) for device in (*devices, torch.device("cpu"))]


def _describe(device: torch.device) -> DeviceCapabilities:
    architecture = device_architecture(device)
    precisions: list[Precision] = []
    refusals: list[Refusal] = []
    for precision in PRECISIONS[1:]:
        candidates = [kernel for kernel in KERNELS if kernel.precision == precision]
        reason = precision_refusal(precision, architecture, candidates)
        if reason is None:
            precisions.append(precision)
        else:
            refusals.append(Refusal(precision, reason))
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    return DeviceCapabilities(
        str(device), name, architecture.name if architecture else None, tuple(precisions), tuple(refusals)
    )
