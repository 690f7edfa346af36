"""Recognises the weights that a calibration was made with, whatever they were cast to since.

The hash covers the names and shapes of the matrices, and the signs of a sample of their values. Signs are kept by casts
between float formats (a value that underflows keeps the sign of its zero) and by the scales of scaled FP8 files, where
rounded values would not be; and only matrices, because such files add scales beside them. Integer formats that pack
several weights into a number change the shapes, and so the fingerprint.
"""

import hashlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

SAMPLED_MATRICES = 128
SAMPLED_VALUES = 64


def model_fingerprint(model: Any) -> str:
    """SHA-256, 64 hexadecimal digits, of a ComfyUI MODEL's diffusion model.

    Of the weights as they were loaded: a LoRA that is merged into them at the moment doesn't count. Reads at most 8,192
    values from the device, with one wait for it.
    """
    diffusion_model = model.get_model_object("diffusion_model")
    matrices = sorted(_matrices(getattr(diffusion_model, "_orig_mod", diffusion_model)))
    digest = hashlib.sha256()
    for name, shape, _ in matrices:
        digest.update(f"{name} {shape}\n".encode())
    sampled = [_unpatched(model, *matrices[index][::2]) for index in _evenly(len(matrices), SAMPLED_MATRICES)]
    signs = [_signs(weight) for weight in sampled]
    if signs:
        digest.update(torch.cat([sign.to(signs[0].device) for sign in signs]).cpu().numpy().tobytes())
    return digest.hexdigest()


def _matrices(module: torch.nn.Module) -> Iterator[tuple[str, tuple[int, ...], Tensor]]:
    for name, parameter in module.named_parameters():
        if parameter.ndim > 1:
            # torch.compile of single blocks puts a wrapper into their names.
            yield name.replace("_orig_mod.", ""), tuple(parameter.shape), parameter


def _unpatched(model: Any, name: str, weight: Tensor) -> Tensor:
    """The weight before LoRAs were merged into it: core keeps a copy of what it patches in place."""
    backup = getattr(model, "backup", {}).get(f"diffusion_model.{name}")
    return weight if backup is None else backup.weight


def _signs(weight: Tensor) -> Tensor:
    flat = weight.detach().reshape(-1)
    stride = max(1, flat.numel() // SAMPLED_VALUES)
    return torch.signbit(flat[::stride][:SAMPLED_VALUES].float())


def _evenly(count: int, wanted: int) -> Iterator[int]:
    """Up to `wanted` indices below `count`, the same for the same count."""
    return iter(range(count)) if count <= wanted else (place * count // wanted for place in range(wanted))
