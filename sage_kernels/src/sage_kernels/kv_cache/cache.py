"""KVCache: append and attend; Triton and CUDA on a GPU, the plain reference elsewhere."""

import importlib.util

import torch
from torch import Tensor

from sage_kernels.kv_cache import cuda_decode, reference
from sage_kernels.kv_cache.storage import (
    GROUPS,
    HEAD_DIMS,
    KEY_ROTATION,
    MAX_SPLITS,
    CachedOperand,
    empty_operand,
    signed_hadamard,
)

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


class KVCache:
    """Keys and values of a batch of sequences in NVFP4: 4.5 bits a number with groups of 16, 28 % of 16-bit's memory.

    SageAttention3's answer to its reviewers counts 4-bit codes (75 % less than 16 bit); the scales are the rest.
    Attention computes in 16 bit on what the codes stand for. From a sequence's keys and values their mean over the
    first tokens appended is subtracted before quantising (16 tokens or more; else nothing): a constant in the keys
    changes no weight and one in the values passes through, so both are put back exactly. Each group of channels takes
    the better of two scales (four over six). Keys, and queries with them, are rotated by a Hadamard matrix first, so
    that no channel's outliers set its group's scale; scores stay what they are.

    Append and attend launch a fixed number of kernels, don't read anything back and fit into a CUDA graph; calls of one
    cache must not run at the same time on several streams. Not differentiable.

    Attributes:
        lengths: int32 [B] on the device, tokens that attend() sees. Read it; reset() empties.
        key, value: what is stored.
    """

    def __init__(
        self,
        batch: int,
        kv_heads: int,
        capacity: int,
        head_dim: int,
        *,
        device: torch.device | str = "cuda",
        group: int = 16,
        rolling: bool = False,
        rotate_keys: bool = True,
    ) -> None:
        """Reserve the memory.

        Args:
            batch: B. kv_heads: Hkv. capacity: tokens a sequence can hold. head_dim: D, 64 or 128.
            device: a CUDA device, or another to compute slowly in plain PyTorch.
            group: channels that share a scale: 16 (71.9 % less than 16 bit), 32 (73.4 %) or 64 (74.2 %).
            rolling: when full, new tokens take the place of the oldest, as autoregressive video models want it.
            rotate_keys: False leaves the rotation out.

        Raises:
            ValueError: a size that isn't offered; the message says what is.
            RuntimeError: a CUDA device without Triton.
        """
        if min(batch, kv_heads, capacity) < 1:
            raise ValueError(f"batch, kv_heads and capacity must be at least 1, got {batch}, {kv_heads}, {capacity}")
        if head_dim not in HEAD_DIMS:
            raise ValueError(f"head_dim must be one of {HEAD_DIMS}, got {head_dim}; pad q, k and v with zeros")
        if group not in GROUPS:
            raise ValueError(f"group must be one of {GROUPS}, got {group}")
        self.device = torch.device(device)
        if self.device.type == "cuda" and importlib.util.find_spec("triton") is None:
            raise RuntimeError("Triton is not installed; `pip install triton` (Linux) or triton-windows (Windows)")
        self.batch, self.kv_heads, self.capacity, self.head_dim = batch, kv_heads, capacity, head_dim
        self.group, self.rolling = group, rolling
        self._rotation = signed_hadamard(head_dim, self.device) if rotate_keys else None
        self._key_rotation = None if self._rotation is None else self._rotation * KEY_ROTATION
        self._signs = None if self._rotation is None else self._rotation[:, 0].contiguous()
        sizes = (batch, kv_heads, capacity, head_dim, group, self.device)
        self.key: CachedOperand = empty_operand(*sizes)
        self.value: CachedOperand = empty_operand(*sizes)
        self._arrivals = cuda_decode.empty_arrivals(batch, kv_heads, self.device)
        self.lengths = torch.zeros(batch, dtype=torch.int32, device=self.device)
        self._written = torch.zeros_like(self.lengths)  # tokens ever appended; differs from lengths where rolling
        self._at_most = 0  # the host's bound on the longest sequence: asking the device would wait for it

    @property
    def bytes(self) -> int:
        """Memory of the cache, padding and means included."""
        return self.key.bytes + self.value.bytes

    def append(self, k: Tensor, v: Tensor, counts: Tensor | None = None) -> None:
        """Quantise new tokens behind those that are there. k and v are not kept.

        Args:
            k, v: [B, Hkv, n, D], float16, bfloat16 or float32, any strides.
            counts: int32 [B] on the device: sequence b takes its first counts[b] tokens (clamped to 0..n); None: all.

        Raises:
            TypeError, ValueError: other shapes, dtypes or devices, or more tokens than fit. Replayed by a CUDA graph,
                which the host can't watch, tokens that don't fit are dropped.
        """
        for name, x in (("k", k), ("v", v)):
            self._check(name, x, (self.batch, self.kv_heads, None, self.head_dim))
        if k.shape != v.shape or k.dtype != v.dtype:
            raise ValueError(f"k and v must have one shape and dtype, got {tuple(k.shape)} {k.dtype} and "
                             f"{tuple(v.shape)} {v.dtype}")  # fmt: skip
        if counts is not None:
            self._check_counts(counts)
        tokens = k.shape[2]
        self._check_room(tokens, counts)
        if tokens == 0:
            return
        append = reference.append
        if self.device.type == "cuda":
            from sage_kernels.kv_cache import launch  # noqa: PLC0415 Triton is slow to load and may be missing

            append = launch.append
        state = (counts, self.lengths, self._written, self._key_rotation, self.capacity, self.rolling)
        append(self.key, self.value, k, v, *state)

    def attend(
        self,
        q: Tensor,
        *,
        scale: float | None = None,
        is_causal: bool = False,
        return_lse: bool = False,
        splits: int | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """softmax(q k^T * scale) v over the tokens of each sequence.

        Args:
            q: [B, H, Nq, D], H a multiple of Hkv; float16, bfloat16 or float32. Rotated, they are rounded to 11 bits.
            scale: softmax scale; 1 / sqrt(D) when None.
            is_causal: the queries are the last Nq tokens: query i doesn't see the Nq - 1 - i tokens at the end.
            return_lse: also return the natural-log LSE, float32 [B, H, Nq].
            splits: parts that the keys are divided into, 1 to 256, each by a program of its own; None: to fill the GPU.

        Returns:
            The output in q's shape and dtype, with return_lse a pair (output, lse). Sequences without tokens give 0
            and -inf.

        Raises:
            TypeError, ValueError: other shapes, dtypes or devices; is_causal with a rolling cache.
        """
        self._check("q", q, (self.batch, None, None, self.head_dim))
        if q.shape[1] == 0 or q.shape[1] % self.kv_heads:
            raise ValueError(f"q's heads must be a multiple of the cache's {self.kv_heads}, got {q.shape[1]}")
        if is_causal and self.rolling:
            raise ValueError("is_causal needs tokens in their order, which a rolling cache doesn't keep")
        if splits is not None and not 1 <= splits <= MAX_SPLITS:
            raise ValueError(f"splits must be 1 to {MAX_SPLITS}, or None to fill the GPU, got {splits}")
        scale = self.head_dim**-0.5 if scale is None else float(scale)
        output, lse = self._attend(q, scale, is_causal, splits)
        return (output, lse) if return_lse else output

    def _attend(self, q: Tensor, scale: float, is_causal: bool, splits: int | None) -> tuple[Tensor, Tensor]:
        cached = (self.key, self.value, self.lengths)
        if self.device.type != "cuda":
            output, lse = reference.attend(self.rotate_queries(q), *cached, scale=scale, is_causal=is_causal)
            return output.to(q.dtype), lse
        if cuda_decode.serves(q.device, self.head_dim, q.shape[1] // self.kv_heads * q.shape[2]):
            q = q if q.stride(-1) == 1 else q.contiguous()
            return cuda_decode.attend(q, *cached, self._signs, self._arrivals, scale, is_causal, splits)
        from sage_kernels.kv_cache import launch  # noqa: PLC0415 Triton is slow to load and may be missing

        rotated = self.rotate_queries(q)
        return launch.attend(rotated, *cached, self.capacity, scale, is_causal, splits, dtype=q.dtype)

    def reset(self, sequences: Tensor | None = None) -> None:
        """Empty all sequences, or those that `sequences` (bool [B] on the device) marks.

        Raises:
            ValueError: another shape or dtype.
        """
        if sequences is None:
            self.lengths.zero_()
            self._written.zero_()
            self._at_most = 0
            return
        if sequences.dtype != torch.bool or tuple(sequences.shape) != (self.batch,):
            raise ValueError(f"sequences must be bool [{self.batch}], got {sequences.dtype} {tuple(sequences.shape)}")
        self.lengths.masked_fill_(sequences, 0)
        self._written.masked_fill_(sequences, 0)

    def dequantize(self) -> tuple[Tensor, Tensor]:
        """Keys and values, float32 [B, Hkv, capacity, D]; what lies beyond a sequence's length means nothing."""
        key, value = reference.dequantize(self.key), reference.dequantize(self.value)
        if self._rotation is not None:
            key = key @ self._rotation.T / (self.head_dim * KEY_ROTATION)
        return key[:, :, : self.capacity], value[:, :, : self.capacity]

    def rotate_queries(self, q: Tensor) -> Tensor:
        """What the stored keys' scores are taken with: q [..., D] itself, or rotated and float32."""
        if self._rotation is None:
            return q
        return q.float() @ (self._rotation / (self.head_dim * KEY_ROTATION))

    def _clamped(self, counts: Tensor | None, tokens: int) -> Tensor:
        return torch.full_like(self.lengths, tokens) if counts is None else counts.clamp(0, tokens)

    def _check(self, name: str, x: Tensor, shape: tuple[int | None, ...]) -> None:
        if not isinstance(x, Tensor) or x.dtype not in _DTYPES:
            found = x.dtype if isinstance(x, Tensor) else type(x).__name__
            raise TypeError(f"{name} must be a float16, bfloat16 or float32 tensor, got {found}")
        if x.dim() != 4 or any(want is not None and have != want for have, want in zip(x.shape, shape, strict=True)):
            wanted = ", ".join("any" if size is None else str(size) for size in shape)
            raise ValueError(f"{name} must be [{wanted}], got {tuple(x.shape)}")
        if x.device.type != self.device.type or (self.device.index is not None and x.device != self.device):
            raise ValueError(f"{name} must be on the cache's device {self.device}, got {x.device}")
        if torch.is_grad_enabled() and x.requires_grad:
            raise ValueError(
                f"{name} requires a gradient, which the cache doesn't give; detach it or use torch.no_grad()"
            )

    def _check_counts(self, counts: Tensor) -> None:
        if counts.dtype != torch.int32 or tuple(counts.shape) != (self.batch,):
            raise ValueError(f"counts must be int32 [{self.batch}], got {counts.dtype} {tuple(counts.shape)}")
        if counts.device.type != self.device.type:
            raise ValueError(f"counts must be on the cache's device {self.device}, got {counts.device}")

    def _check_room(self, tokens: int, counts: Tensor | None) -> None:
        """Raise where the tokens don't fit. Only where the host's bound doesn't settle it the device is asked."""
        if self.rolling:
            if tokens > self.capacity:
                raise ValueError(f"{tokens} tokens are more than the rolling cache holds ({self.capacity})")
            return
        capturing = self.device.type == "cuda" and torch.cuda.is_current_stream_capturing()
        if self._at_most + tokens > self.capacity and not capturing:
            after = self._written + self._clamped(counts, tokens)
            if int(after.max()) > self.capacity:
                raise ValueError(
                    f"{tokens} more tokens don't fit: the longest sequence holds {int(self.lengths.max())} of "
                    f"{self.capacity}; make the cache larger, reset() it, or use rolling=True"
                )
            self._at_most = int(self._written.max())
        self._at_most = min(self._at_most + tokens, self.capacity)
