"""How far an output is from the one with 16-bit attention: tensors by the paper's measures, videos by PSNR and SSIM."""

import numpy as np
import torch
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from torch import Tensor


def tensor_errors(output: Tensor, expected: Tensor) -> dict[str, float]:
    """SageAttention3's measures on flattened tensors: cosine, relative L1 (sum|a-b| / sum|b|) and RMSE."""
    a, b = output.flatten().double(), expected.flatten().double()
    return {
        "cosine": torch.nn.functional.cosine_similarity(a, b, dim=0).item(),
        "l1": ((a - b).abs().sum() / b.abs().sum()).item(),
        "rmse": (a - b).square().mean().sqrt().item(),
    }


def video_errors(frames: np.ndarray, expected: np.ndarray) -> dict[str, float]:
    """PSNR in dB (infinite for identical frames) and mean SSIM of uint8 grey frames [T, H, W]."""
    if np.array_equal(frames, expected):
        return {"psnr": float("inf"), "ssim": 1.0}
    pairs = zip(frames, expected, strict=True)
    return {
        "psnr": float(peak_signal_noise_ratio(expected, frames)),
        "ssim": float(np.mean([structural_similarity(b, a, data_range=255) for a, b in pairs])),
    }
