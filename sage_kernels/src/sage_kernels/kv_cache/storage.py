"""What a cache holds, shared by the reference and the Triton kernels."""

from dataclasses import dataclass

import torch
from torch import Tensor

HEAD_DIMS = (64, 128)
GROUPS = (16, 32, 64)
MAX_SPLITS = 256  # parts that a call's keys are divided into
TOKEN_PADDING = 128  # the longest tile that a kernel reads
MEAN_TOKENS = 16  # a sequence that begins with fewer tokens has nothing subtracted: its mean would be noise
# Keys are multiplied by this times a matrix of signs, queries by what makes the product one: powers of two, which
# 16-bit types hold, and of a size that keeps float16 keys in range.
KEY_ROTATION = 0.125
TOP_EXPONENT = 6  # the first tokens are brought below 2^6: 5 more powers of two are left for later, larger ones


@dataclass(frozen=True, eq=False)
class CachedOperand:
    """Keys or values in NVFP4 along head_dim, less a mean and times a scale of their head.

    Attributes:
        codes: uint8 [B, Hkv, N', D / 2], the even channel in the low nibble; N' is the capacity, padded.
        scales: uint8 [B, Hkv, N', D / group], the bits of E4M3.
        means: float32 [B, Hkv, D], what was subtracted.
        head_scales: float32 [B, Hkv], the power of two that what remained was multiplied by.
    """

    codes: Tensor
    scales: Tensor
    means: Tensor
    head_scales: Tensor

    @property
    def bytes(self) -> int:
        """Of codes, scales and what each head has, padding included."""
        return sum(x.numel() * x.element_size() for x in (self.codes, self.scales, self.means, self.head_scales))


def empty_operand(
    batch: int, heads: int, capacity: int, head_dim: int, group: int, device: torch.device
) -> CachedOperand:
    """Zeros: no kernel reads what wasn't written, but a stale NaN would outlive its mask."""
    padded = -(-capacity // TOKEN_PADDING) * TOKEN_PADDING
    return CachedOperand(
        torch.zeros((batch, heads, padded, head_dim // 2), dtype=torch.uint8, device=device),
        torch.zeros((batch, heads, padded, head_dim // group), dtype=torch.uint8, device=device),
        torch.zeros((batch, heads, head_dim), dtype=torch.float32, device=device),
        torch.ones((batch, heads), dtype=torch.float32, device=device),
    )


def signed_hadamard(size: int, device: torch.device) -> Tensor:
    """A Hadamard matrix with rows of random but fixed signs, [size, size] float32; M M^T is `size` times one."""
    matrix = torch.ones(1, 1)
    while matrix.shape[0] < size:
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)), 0)
    signs = torch.randint(0, 2, (size, 1), generator=torch.Generator().manual_seed(0)) * 2 - 1
    return (matrix * signs).to(device)
