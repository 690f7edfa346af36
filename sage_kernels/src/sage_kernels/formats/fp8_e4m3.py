"""FP8 E4M3 (1-4-3, bias 7, no infinities, largest value 448) with a float32 scale per token or channel.

Element encoding: OCP 8-bit floating point, E4M3. Layout: `torch.float8_e4m3fn`, one byte an element.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from sage_kernels.formats.grouping import divide, group_absmax

E4M3_MAX = 448.0


def round_to_e4m3(x: Tensor) -> Tensor:
    """Round float32 to the nearest E4M3 value, ties to the even code, saturating at +-448; float32 out.

    NaN stays NaN. The clamp comes before the cast, because what a cast does above 448 differs between versions.
    """
    return x.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn).float()


@dataclass(frozen=True)
class FP8Tensor:
    """codes: float8_e4m3fn [..., n]; scales: float32, broadcastable to codes."""

    codes: Tensor
    scales: Tensor


def quantize_fp8(x: Tensor, *, dim: int | None = -1, maximum: float = E4M3_MAX) -> FP8Tensor:
    """Quantise so that the largest magnitude along `dim` (None: of the whole tensor) becomes `maximum`.

    A slice of zeros gets scale 0 and codes 0. A slice with a NaN or an infinity gets scale NaN and codes 0, so that
    the fault stays visible after dequantising.

    Args:
        x: floating point, any shape.
        dim: the axis that shares a scale.
        maximum: largest code magnitude to use, at most 448.

    Raises:
        TypeError: x is not floating point.
        ValueError: maximum is not in (0, 448].
    """
    if not x.is_floating_point():
        raise TypeError(f"quantize_fp8: expected a floating-point tensor, got {x.dtype}; convert it first")
    if not 0 < maximum <= E4M3_MAX:
        raise ValueError(f"quantize_fp8: maximum must be in (0, {E4M3_MAX:g}], got {maximum}")
    values = x.float()
    lines = values.flatten().unsqueeze(0) if dim is None else values.movedim(dim, -1)
    absmax = group_absmax(lines)
    scales = absmax.reshape((1,) * x.dim()) if dim is None else absmax.movedim(-1, dim)
    scales = divide(scales, maximum)
    codes = torch.where(scales > 0, values / scales, 0.0)
    return FP8Tensor(round_to_e4m3(codes).to(torch.float8_e4m3fn), scales)


def dequantize_fp8(tensor: FP8Tensor) -> Tensor:
    """codes * scales, float32, the shape of codes."""
    return tensor.codes.float() * tensor.scales
