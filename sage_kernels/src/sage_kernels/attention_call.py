"""One attention call, checked and frozen; and what is left of it between prepare() and run()."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sage_kernels.precision import Precision, check_precision

LAYOUTS = ("BHND", "BNHD")
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MAX_HEAD_DIM = 256


@dataclass(frozen=True, eq=False)
class AttentionCall:
    """The checked arguments of one attention() call. Tensors are the caller's own, never changed.

    query is [B, H, Nq, D], key and value [B, Hkv, Nk, D] as views, whatever layout the caller used; `layout` says how
    the output is to be laid out.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    attn_mask: Tensor | None
    is_causal: bool
    scale: float
    key_lengths: Tensor | None
    layout: str
    precision: Precision
    return_lse: bool
    allow_emulation: bool

    @property
    def batch(self) -> int:
        """B."""
        return self.query.shape[0]

    @property
    def heads(self) -> int:
        """H, the query heads."""
        return self.query.shape[1]

    @property
    def kv_heads(self) -> int:
        """Hkv: heads of key and value; H is a multiple of it."""
        return self.key.shape[1]

    @property
    def query_length(self) -> int:
        """Nq."""
        return self.query.shape[2]

    @property
    def key_length(self) -> int:
        """Nk."""
        return self.key.shape[2]

    @property
    def head_dim(self) -> int:
        """D."""
        return self.query.shape[3]

    @property
    def device(self) -> torch.device:
        """Where all the tensors are."""
        return self.query.device

    @property
    def needs_grad(self) -> bool:
        """Whether autograd would want a gradient through this call."""
        return torch.is_grad_enabled() and (
            self.query.requires_grad
            or self.key.requires_grad
            or self.value.requires_grad
            or (self.attn_mask is not None and self.attn_mask.requires_grad)
        )


@dataclass(frozen=True, eq=False)
class PreparedAttention:
    """What a kernel needs to run, and nothing of the caller's key and value once they are quantised.

    Attributes:
        kernel: name of the kernel that made it, and that run() calls.
        layout: the caller's, in which run() returns the output.
        state: the kernel's own operands.
    """

    kernel: str
    layout: str
    state: Any


def make_call(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
    key_lengths: Tensor | None,
    layout: str,
    precision: str,
    return_lse: bool,
    allow_emulation: bool,
) -> AttentionCall:
    """Check the arguments of attention() and freeze them.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: shapes, devices or values that don't fit together. The message says what is allowed.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"layout must be one of {', '.join(LAYOUTS)}, got {layout!r}")
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        _check_operand(name, tensor, q)
    if layout == "BNHD":
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    _check_shapes(q, k, v, enable_gqa)
    if attn_mask is not None:
        if is_causal:
            raise ValueError(
                "attn_mask and is_causal=True exclude each other, as in torch; put causality into the mask"
            )
        _check_mask(attn_mask, q, k)
    if key_lengths is not None:
        _check_key_lengths(key_lengths, q)
    if scale is None:
        scale = q.shape[-1] ** -0.5
    return AttentionCall(
        q,
        k,
        v,
        attn_mask,
        bool(is_causal),
        float(scale),
        key_lengths,
        layout,
        check_precision(precision),
        bool(return_lse),
        bool(allow_emulation),
    )


def _check_operand(name: str, tensor: Tensor, q: Tensor) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
    if tensor.dim() != 4:
        raise ValueError(f"{name} must have 4 axes, [B, H, N, D] or [B, N, H, D] by layout; got {tuple(tensor.shape)}")
    if tensor.dtype not in DTYPES:
        raise TypeError(f"{name} must be float16, bfloat16 or float32, got {tensor.dtype}")
    if tensor.dtype != q.dtype:
        raise TypeError(f"q, k and v must share one dtype; q is {q.dtype}, {name} is {tensor.dtype}")
    if tensor.device != q.device:
        raise ValueError(f"q, k and v must be on one device; q is on {q.device}, {name} on {tensor.device}")


def _check_shapes(q: Tensor, k: Tensor, v: Tensor, enable_gqa: bool) -> None:
    if k.shape != v.shape:
        raise ValueError(f"k and v must have one shape, got {tuple(k.shape)} and {tuple(v.shape)} as [B, H, N, D]")
    if q.shape[0] != k.shape[0]:
        raise ValueError(f"q and k must have the same batch size, got {q.shape[0]} and {k.shape[0]}")
    if q.shape[3] != k.shape[3]:
        raise ValueError(f"q and k must have the same head_dim, got {q.shape[3]} and {k.shape[3]}")
    if not 1 <= q.shape[3] <= MAX_HEAD_DIM:
        raise ValueError(f"head_dim must be 1 to {MAX_HEAD_DIM}, got {q.shape[3]}")
    if k.shape[2] == 0 or k.shape[1] == 0:
        raise ValueError(f"k must hold at least one head and one token, got {tuple(k.shape)} as [B, H, N, D]")
    if q.shape[1] != k.shape[1]:
        if not enable_gqa:
            raise ValueError(
                f"q has {q.shape[1]} heads and k has {k.shape[1]}; grouped-query attention needs enable_gqa=True"
            )
        if q.shape[1] % k.shape[1]:
            raise ValueError(f"q heads ({q.shape[1]}) must be a multiple of k heads ({k.shape[1]})")


def _check_mask(mask: Tensor, q: Tensor, k: Tensor) -> None:
    if not isinstance(mask, Tensor):
        raise TypeError(f"attn_mask must be a torch.Tensor, got {type(mask).__name__}")
    if mask.dtype not in (torch.bool, *DTYPES):
        raise TypeError(
            f"attn_mask must be bool (True: attend) or floating point (added to the scores), got {mask.dtype}"
        )
    if mask.device != q.device:
        raise ValueError(f"attn_mask must be on q's device {q.device}, got {mask.device}")
    full = (q.shape[0], q.shape[1], q.shape[2], k.shape[2])
    shape = tuple(mask.shape)
    aligned = (1,) * (4 - len(shape)) + shape
    # Compared one by one: torch.compile finds no symbolic length in a tuple of lengths.
    if len(shape) > 4 or any(have != 1 and have != want for have, want in zip(aligned, full, strict=True)):  # noqa: PLR1714
        raise ValueError(f"attn_mask must broadcast to [B, H, Nq, Nk] = {full}, got {shape}")


def _check_key_lengths(key_lengths: Tensor, q: Tensor) -> None:
    if not isinstance(key_lengths, Tensor):
        raise TypeError(f"key_lengths must be an int32 tensor [B], got {type(key_lengths).__name__}")
    if key_lengths.dtype != torch.int32 or tuple(key_lengths.shape) != (q.shape[0],):
        raise ValueError(
            f"key_lengths must be int32 [B] = [{q.shape[0]}], got {key_lengths.dtype} {tuple(key_lengths.shape)}"
        )
    if key_lengths.device != q.device:
        raise ValueError(f"key_lengths must be on q's device {q.device}, got {key_lengths.device}")
