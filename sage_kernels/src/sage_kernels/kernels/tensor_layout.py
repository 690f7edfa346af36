"""What kernels that take raw pointers ask of tensors."""

import torch
from torch import Tensor

_ROW_ALIGNMENT = 16  # bytes that one thread loads


def has_aligned_rows(x: Tensor) -> bool:
    """Whether the last axis is contiguous and every row starts at a multiple of 16 bytes."""
    *strides, last = x.stride()
    per_load = _ROW_ALIGNMENT // x.element_size()
    aligned = all(stride % per_load == 0 or size == 1 for stride, size in zip(strides, x.shape, strict=False))
    return last == 1 and aligned and x.data_ptr() % _ROW_ALIGNMENT == 0


def empty_output(shape: tuple[int, int, int, int], layout: str, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Uninitialised [B, H, N, D] whose memory is contiguous in the caller's layout."""
    batch, heads, rows, head_dim = shape
    if layout == "BNHD":
        return torch.empty((batch, rows, heads, head_dim), dtype=dtype, device=device).transpose(1, 2)
    return torch.empty(shape, dtype=dtype, device=device)


def pointer(x: Tensor | None) -> int:
    """Its address, 0 for None."""
    return 0 if x is None else x.data_ptr()
