"""INT8, symmetric, with a float32 scale per block or per token (SageAttention 1 and 2, section 3; SageBwd).

Codes use -127..127 only, so that negation is exact. Layout: int8 [..., n, d], one byte an element.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from sage_kernels.formats.grouping import divide, group_absmax, split_last_axis

INT8_MAX = 127.0


@dataclass(frozen=True)
class Int8Tensor:
    """codes: int8 [..., n, d]; scales: float32 [..., ceil(n / block), 1]: row i uses scale i // block."""

    codes: Tensor
    scales: Tensor
    block: int


def quantize_int8(x: Tensor, *, block: int = 1) -> Int8Tensor:
    """Quantise [..., n, d] with one scale for `block` rows times d columns; block=1 is per token.

    The last block may be short. Rounds to nearest, ties to even. A block of zeros gets scale 0 and codes 0; one with a
    NaN or an infinity gets scale NaN and codes 0.

    Raises:
        TypeError: x is not floating point.
        ValueError: x has fewer than two axes, or block is not positive.
    """
    if not x.is_floating_point():
        raise TypeError(f"quantize_int8: expected a floating-point tensor, got {x.dtype}; convert it first")
    if x.dim() < 2 or block < 1:
        raise ValueError(f"quantize_int8: expected [..., n, d] and block >= 1, got {tuple(x.shape)} and {block}")
    rows = x.shape[-2]
    values = x.float()
    padded = torch.nn.functional.pad(values, (0, 0, 0, -rows % block))
    scales = divide(group_absmax(split_last_axis(padded.flatten(-2), block * x.shape[-1])), INT8_MAX)
    row_scales = scales.repeat_interleave(block, dim=-2)[..., :rows, :]
    codes = torch.where(row_scales > 0, values / row_scales, 0.0).round().clamp(-INT8_MAX, INT8_MAX)
    return Int8Tensor(codes.to(torch.int8), scales, block)


def dequantize_int8(tensor: Int8Tensor) -> Tensor:
    """codes * scales of their blocks, float32 [..., n, d]."""
    rows = tensor.codes.shape[-2]
    return tensor.codes.float() * tensor.scales.repeat_interleave(tensor.block, dim=-2)[..., :rows, :]
