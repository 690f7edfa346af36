"""NVFP4: E2M1 elements in groups of 16 that share an E4M3 scale (SageAttention3, section 3.1).

Elements: sign, 2 exponent bits (bias 1), 1 mantissa bit: 0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives, codes 0..7
and 8..15. Rounded to nearest, ties to the even code, saturated at 6.

Layout: along the last axis, two codes per byte, the even element in the low nibble (the order of
`cvt.rn.satfinite.e2m1x2` and `torch.float4_e2m1fn_x2`); scales `torch.float8_e4m3fn`, one for 16 elements.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from sage_kernels.formats.fp8_e4m3 import round_to_e4m3
from sage_kernels.formats.grouping import divide, group_absmax, split_groups, split_last_axis

NVFP4_GROUP = 16
E2M1_MAX = 6.0
_OTHER_MAX = 4.0  # of four over six
E2M1_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_SIGN_BIT = 8
_FLOAT32_EXPONENT = 0x7F800000


@dataclass(frozen=True)
class NVFP4Tensor:
    """codes: uint8 [..., n / 2], two E2M1 codes a byte; scales: float8_e4m3fn [..., n / 16]."""

    codes: Tensor
    scales: Tensor


def round_to_e2m1(x: Tensor) -> Tensor:
    """Round float32 to the nearest E2M1 value, ties to the even code, saturating at +-6; NaN stays NaN."""
    clamped = x.clamp(-E2M1_MAX, E2M1_MAX)
    # Adding and subtracting 1.5 * 2^23 times the spacing rounds to a multiple of the spacing, ties to even. The spacing
    # is half the power of two below |x|, and 0.5 below 2; an even multiple of it is an even code.
    power = (clamped.view(torch.int32) & _FLOAT32_EXPONENT).view(torch.float32).clamp_min_(1.0)
    shift = power.mul_(1.5 * 2**22)
    return torch.copysign(clamped.add_(shift).sub_(shift), x)


def encode_e2m1(values: Tensor) -> Tensor:
    """4-bit codes (uint8) of values that already are E2M1 values; the sign of zero is kept."""
    magnitude = values.abs()
    codes = torch.where(magnitude < 2, magnitude * 2, torch.where(magnitude < 4, magnitude + 2, magnitude / 2 + 4))
    return codes.to(torch.uint8) | (torch.signbit(values).to(torch.uint8) * _SIGN_BIT)


def pack_e2m1(codes: Tensor) -> Tensor:
    """Pack 4-bit codes (uint8, even last axis) two to a byte, the even element in the low nibble."""
    return codes[..., 0::2] | (codes[..., 1::2] << 4)


def unpack_e2m1(packed: Tensor) -> Tensor:
    """Values (float32 [..., n]) of packed codes (uint8 [..., n / 2])."""
    codes = torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2)
    table = torch.tensor(E2M1_VALUES + tuple(-v for v in E2M1_VALUES), device=packed.device)
    return table[codes.int()]


def quantize_groups(groups: Tensor, *, four_over_six: bool = False) -> tuple[Tensor, Tensor]:
    """Quantise float32 [..., 16] groups; returns E2M1 values [..., 16] and E4M3 scales [..., 1], both as float32.

    scale = e4m3(max|x| / 6); value = e2m1(x / scale) with the rounded scale. A group whose scale rounds to zero gets
    values 0. A group with a NaN or an infinity gets scale NaN and values 0.

    Args:
        groups: float32, one group along the last axis.
        four_over_six: take e4m3(max|x| / 4) instead in each group where that leaves a smaller sum of squared errors:
            E2M1 has nothing between 4 and 6, which hurts groups with several magnitudes near their maximum. Squares are
            summed up in pairs of neighbours, pairs of pairs and so on, so that every device decides alike.
    """
    absmax = group_absmax(groups)
    values, scales = _quantize_by(groups, round_to_e4m3(divide(absmax, E2M1_MAX)))
    if not four_over_six:
        return values, scales
    other_values, other_scales = _quantize_by(groups, round_to_e4m3(divide(absmax, _OTHER_MAX)))
    better = _squared_error(groups, other_values * other_scales) < _squared_error(groups, values * scales)
    return torch.where(better, other_values, values), torch.where(better, other_scales, scales)


def _quantize_by(groups: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    return round_to_e2m1(torch.where(scales > 0, groups / scales, 0.0)), scales


def _squared_error(groups: Tensor, rounded: Tensor) -> Tensor:
    sums = (groups - rounded).square()
    while sums.shape[-1] > 1:
        sums = sums[..., 0::2] + sums[..., 1::2]
    return sums


def quantize_nvfp4(x: Tensor, *, four_over_six: bool = False) -> NVFP4Tensor:
    """Quantise along the last axis, whose length must be a multiple of 16; `four_over_six` as in quantize_groups.

    E4M3 scales carry group maxima from about 0.012 to 2688 only: bring the tensor into that range first
    (`reference.power_of_two_scale`).

    Raises:
        TypeError: x is not floating point.
        ValueError: the last axis is not a multiple of 16.
    """
    values, scales = quantize_groups(split_groups(x, NVFP4_GROUP, "quantize_nvfp4"), four_over_six=four_over_six)
    return NVFP4Tensor(pack_e2m1(encode_e2m1(values).flatten(-2)), scales.squeeze(-1).to(torch.float8_e4m3fn))


def dequantize_nvfp4(tensor: NVFP4Tensor) -> Tensor:
    """values * scales, float32 [..., n]."""
    groups = split_last_axis(unpack_e2m1(tensor.codes), NVFP4_GROUP)
    return (groups * tensor.scales.float().unsqueeze(-1)).flatten(-2)
