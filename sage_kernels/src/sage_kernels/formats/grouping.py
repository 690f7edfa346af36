"""Splitting one axis of a tensor into groups that share a scale."""

import torch
from torch import Tensor


def split_groups(x: Tensor, group: int, name: str) -> Tensor:
    """View [..., n] as float32 [..., n / group, group].

    Raises:
        TypeError: x is not floating point.
        ValueError: x has no axes, or its last axis is not a multiple of the group.
    """
    if not x.is_floating_point():
        raise TypeError(f"{name}: expected a floating-point tensor, got {x.dtype}; convert it first")
    if x.dim() == 0 or x.shape[-1] % group:
        raise ValueError(f"{name}: the last axis of {tuple(x.shape)} must be a multiple of {group}; pad it with zeros")
    return split_last_axis(x.float(), group)


def split_last_axis(x: Tensor, group: int) -> Tensor:
    """[..., n] -> [..., n / group, group]."""
    return x.reshape(*x.shape[:-1], x.shape[-1] // group, group)


def pad_last_axis(x: Tensor, multiple: int) -> Tensor:
    """Append zeros until the last axis is a multiple of `multiple`; x itself when it already is."""
    missing = -x.shape[-1] % multiple
    return torch.nn.functional.pad(x, (0, missing)) if missing else x


def divide(x: Tensor, divisor: float) -> Tensor:
    """Correctly rounded x / divisor: where the divisor is a plain number, CUDA multiplies by its reciprocal instead."""
    return x / torch.full_like(x, divisor)


def group_absmax(groups: Tensor) -> Tensor:
    """Largest magnitude of each group, [..., 1]; NaN wherever the group holds a NaN or an infinity."""
    absmax = groups.abs().amax(dim=-1, keepdim=True)
    return torch.where(torch.isfinite(absmax), absmax, torch.nan)
