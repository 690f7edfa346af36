"""MXFP8: E4M3 elements in groups of 32 that share a power-of-two scale (OCP microscaling formats 1.0).

The scale is E8M0 (exponent + 127 in one byte, 255 is NaN). Its exponent is rounded *up*, as the hardware's
`cvt.rp.ue8m0` does, so that no element saturates; the OCP text's rounding down would clip maxima above 448.
Layout: codes `torch.float8_e4m3fn` [..., n], scales uint8 [..., n / 32], along the last axis.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from sage_kernels.formats.fp8_e4m3 import E4M3_MAX, round_to_e4m3
from sage_kernels.formats.grouping import group_absmax, split_groups, split_last_axis

MXFP8_GROUP = 32
_E8M0_BIAS = 127
_E8M0_NAN = 255


@dataclass(frozen=True)
class MXFP8Tensor:
    """codes: float8_e4m3fn [..., n]; scales: uint8 E8M0 [..., n / 32]."""

    codes: Tensor
    scales: Tensor


def _e8m0_exponent(absmax: Tensor) -> Tensor:
    """Smallest integer e with absmax <= 448 * 2^e, clamped to E8M0's -127..127; int32."""
    mantissa, exponent = torch.frexp(absmax)  # absmax = mantissa * 2^exponent, mantissa in [0.5, 1); 448 = 0.875 * 2^9
    exponent = (exponent - 9 + (mantissa > E4M3_MAX / 512).int()).clamp(-_E8M0_BIAS, _E8M0_BIAS)
    return torch.where(absmax > 0, exponent, -_E8M0_BIAS)


def quantize_mxfp8(x: Tensor) -> MXFP8Tensor:
    """Quantise along the last axis, whose length must be a multiple of 32.

    A group of zeros gets the smallest scale and codes 0. One with a NaN or an infinity gets the NaN scale and codes 0.

    Raises:
        TypeError: x is not floating point.
        ValueError: the last axis is not a multiple of 32.
    """
    groups = split_groups(x, MXFP8_GROUP, "quantize_mxfp8")
    absmax = group_absmax(groups)
    finite = torch.isfinite(absmax)
    exponent = _e8m0_exponent(torch.where(finite, absmax, 0.0))
    # Two steps, because 2^127 * x and x * 2^-127 leave float32's range where ldexp's own factor does.
    half = exponent // 2
    codes = torch.ldexp(torch.ldexp(groups, -half), -(exponent - half))
    codes = torch.where(finite, codes, 0.0)
    scales = torch.where(finite, exponent + _E8M0_BIAS, _E8M0_NAN).to(torch.uint8)
    return MXFP8Tensor(round_to_e4m3(codes).flatten(-2).to(torch.float8_e4m3fn), scales.squeeze(-1))


def dequantize_mxfp8(tensor: MXFP8Tensor) -> Tensor:
    """codes * 2^(scale - 127), float32, the shape of codes; NaN in groups with the NaN scale."""
    exponent = (tensor.scales.int() - _E8M0_BIAS).unsqueeze(-1)
    half = exponent // 2
    groups = split_last_axis(tensor.codes.float(), MXFP8_GROUP)
    values = torch.ldexp(torch.ldexp(groups, half), exponent - half)
    return torch.where(tensor.scales.unsqueeze(-1) == _E8M0_NAN, torch.nan, values).flatten(-2)
