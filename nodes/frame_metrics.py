"""How far pictures and latents are from others: PSNR, SSIM, relative L1, cosine. Plain torch, no dependency."""

import math

import torch
from torch import Tensor

SSIM_WINDOW = 7
_K1, _K2 = 0.01, 0.03


def psnr(frames: Tensor, expected: Tensor) -> float:
    """Peak signal-to-noise ratio in dB of values in 0..1, over all frames together; infinite for equal ones.

    Raises:
        ValueError: shapes that differ.
    """
    _check_shapes(frames, expected)
    mean_square = (frames.double() - expected.double()).square().mean().item()
    return math.inf if mean_square == 0.0 else -10 * math.log10(mean_square)


def ssim(frames: Tensor, expected: Tensor) -> float:
    """Mean structural similarity of frames [T, H, W, C] in 0..1: uniform windows of 7 x 7, sample covariance.

    The mean is over windows that lie inside the picture, channels and frames, as in scikit-image. One frame is in work
    at a time.

    Raises:
        ValueError: shapes that differ, or frames smaller than a window.
    """
    _check_shapes(frames, expected)
    if min(frames.shape[1:3]) < SSIM_WINDOW:
        raise ValueError(f"frames must be at least {SSIM_WINDOW} x {SSIM_WINDOW}, got {tuple(frames.shape)}")
    return sum(_frame_ssim(*pair) for pair in zip(frames, expected, strict=True)) / len(frames)


def relative_l1(values: Tensor, expected: Tensor) -> float:
    """sum |a - b| / sum |b|.

    Raises:
        ValueError: shapes that differ.
    """
    _check_shapes(values, expected)
    return ((values.double() - expected.double()).abs().sum() / expected.double().abs().sum()).item()


def cosine(values: Tensor, expected: Tensor) -> float:
    """Cosine of the angle between two tensors taken as vectors.

    Raises:
        ValueError: shapes that differ.
    """
    _check_shapes(values, expected)
    a, b = values.double().flatten(), expected.double().flatten()
    return torch.nn.functional.cosine_similarity(a, b, dim=0).item()


def _frame_ssim(frame: Tensor, expected: Tensor) -> float:
    a, b = (picture.double().movedim(-1, 0).unsqueeze(1) for picture in (frame, expected))  # [C, 1, H, W]
    windows = torch.cat([a, b, a * a, b * b, a * b], dim=1)
    mean_a, mean_b, mean_aa, mean_bb, mean_ab = torch.nn.functional.avg_pool2d(windows, SSIM_WINDOW, stride=1).unbind(1)
    sample = SSIM_WINDOW**2 / (SSIM_WINDOW**2 - 1)
    variance_a, variance_b = sample * (mean_aa - mean_a**2), sample * (mean_bb - mean_b**2)
    covariance = sample * (mean_ab - mean_a * mean_b)
    c1, c2 = _K1**2, _K2**2
    numerator = (2 * mean_a * mean_b + c1) * (2 * covariance + c2)
    denominator = (mean_a**2 + mean_b**2 + c1) * (variance_a + variance_b + c2)
    return (numerator / denominator).mean().item()


def _check_shapes(values: Tensor, expected: Tensor) -> None:
    if values.shape != expected.shape:
        raise ValueError(f"shapes must be equal, got {tuple(values.shape)} and {tuple(expected.shape)}")
