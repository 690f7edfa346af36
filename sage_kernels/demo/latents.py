"""Latents of the demo model: 4x4 space-to-depth with a fixed scale in place of a VAE, and Wan 2.1's normalisation.

The model lives in the normalised space of ComfyUI's sampler: its latents are what ComfyUI hands to a Wan 2.1 model.
A LATENT at a ComfyUI node has Wan 2.1's mean and standard deviation on it, which `from_wan21_latent` takes off.
"""

from __future__ import annotations

import torch

LATENT_CHANNELS = 16
PIXELS_PER_LATENT = 4
# Mean and standard deviation of the pixels of moving_digits over all clips: they give the latents mean 0 and std 1.
PIXEL_MEAN = -0.6356
PIXEL_STD = 0.4906

_WAN21_MEAN = (
    *(-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508),
    *(0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921),
)
_WAN21_STD = (
    *(2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743),
    *(3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160),
)


def encode(pixels: torch.Tensor) -> torch.Tensor:
    """Pixels [B, 1, T, H, W] in [-1, 1], H and W multiples of 4, to latents [B, 16, T, H/4, W/4].

    Raises ValueError for any other shape. `decode` inverts it exactly but for the rounding of one multiply-add.
    """
    if pixels.ndim != 5 or pixels.shape[1] != 1 or pixels.shape[3] % 4 or pixels.shape[4] % 4:
        raise ValueError(f"pixels must be [B, 1, T, H, W] with H and W multiples of 4, got {list(pixels.shape)}")
    batch, _, frames, height, width = pixels.shape
    p = PIXELS_PER_LATENT
    cells = pixels.reshape(batch, frames, height // p, p, width // p, p).permute(0, 3, 5, 1, 2, 4)
    latents = cells.reshape(batch, LATENT_CHANNELS, frames, height // p, width // p)
    return (latents - PIXEL_MEAN) / PIXEL_STD


def decode(latents: torch.Tensor) -> torch.Tensor:
    """Latents [B, 16, T, h, w] to pixels [B, 1, T, 4h, 4w]; not clamped. Raises ValueError for any other shape."""
    _check_latents(latents)
    batch, _, frames, height, width = latents.shape
    p = PIXELS_PER_LATENT
    cells = (latents * PIXEL_STD + PIXEL_MEAN).reshape(batch, p, p, frames, height, width)
    return cells.permute(0, 3, 4, 1, 5, 2).reshape(batch, 1, frames, height * p, width * p)


def from_wan21_latent(latents: torch.Tensor) -> torch.Tensor:
    """A ComfyUI Wan 2.1 LATENT [B, 16, T, h, w] to the model's latents. Raises ValueError for other shapes."""
    mean, std = _wan21_statistics(latents)
    return (latents - mean) / std


def to_wan21_latent(latents: torch.Tensor) -> torch.Tensor:
    """The model's latents [B, 16, T, h, w] to a ComfyUI Wan 2.1 LATENT. Raises ValueError for other shapes."""
    mean, std = _wan21_statistics(latents)
    return latents * std + mean


def _wan21_statistics(like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    _check_latents(like)
    mean, std = (
        torch.tensor(values, dtype=like.dtype, device=like.device).view(1, LATENT_CHANNELS, 1, 1, 1)
        for values in (_WAN21_MEAN, _WAN21_STD)
    )
    return mean, std


def _check_latents(latents: torch.Tensor) -> None:
    if latents.ndim != 5 or latents.shape[1] != LATENT_CHANNELS:
        raise ValueError(f"latents must be [B, {LATENT_CHANNELS}, T, h, w], got {list(latents.shape)}")
