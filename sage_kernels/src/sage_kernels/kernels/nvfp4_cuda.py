"""FP4 attention in CUDA for sm_120a and sm_121a: csrc/nvfp4_prepare.cu and csrc/nvfp4_attention.cu."""

import ctypes
import math
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from sage_kernels.architectures import Architecture
from sage_kernels.attention_call import AttentionCall
from sage_kernels.cubin_loader import load_kernel, loading_obstacle
from sage_kernels.formats.nvfp4_tiles import (
    KEY_TILE,
    MAX_HEAD_DIM,
    MEANS_PER_TILE,
    QUERY_BLOCK,
    key_value_tile_words,
    mean_tile_words,
    query_block_words,
    value_dim,
)
from sage_kernels.kernel_variants import nvfp4_attention_variant, nvfp4_prepare_variant
from sage_kernels.precision import Precision

_QUERY_TILE = QUERY_BLOCK * MEANS_PER_TILE
_TILES_PER_BLOCK = 4  # key tiles, as in nvfp4_prepare.cu
_SHIFT_ROWS = 64  # as in nvfp4_prepare.cu
_CHUNK_TOKENS = 256  # fewer would leave the blocks that collect statistics too little work
_STATISTICS_BLOCKS = 1024  # enough to fill any GPU
_MAX_CHUNKS = 64
_LOG2_E = 1.4426950408889634
_ALIGNMENT = 64  # words
_MASK_KINDS = {torch.bool: 0, torch.float32: 1, torch.float16: 2, torch.bfloat16: 3}
_MAX_GRID = 2**31 - 1


class _Operand(ctypes.Structure):
    _fields_ = (("data", ctypes.c_uint64), ("strides", ctypes.c_int64 * 4))


class _PrepareParameters(ctypes.Structure):
    """Parameters of csrc/nvfp4_prepare.cu."""

    _fields_ = (
        ("query", _Operand),
        ("key", _Operand),
        ("value", _Operand),
        *((name, ctypes.c_uint64) for name in ("key_lengths", "mask", "queries", "means", "keys_values")),
        *((name, ctypes.c_uint64) for name in ("query_factors", "key_factors", "value_factors", "key_means")),
        *((name, ctypes.c_uint64) for name in ("value_means", "partial_sums", "partial_maxima", "lse_shifts")),
        ("tile_seen", ctypes.c_uint64),
        ("mask_strides", ctypes.c_int64 * 4),
        *((name, ctypes.c_int32) for name in ("batch", "heads", "kv_heads", "query_length", "key_length", "head_dim")),
        *((name, ctypes.c_int32) for name in ("query_tiles", "key_tiles", "chunks", "chunk_tokens", "is_bf16")),
        *((name, ctypes.c_int32) for name in ("mask_kind", "mask_batch", "mask_heads", "vectors")),
        ("query_sign", ctypes.c_float),
    )


class _AttentionParameters(ctypes.Structure):
    """Parameters of csrc/nvfp4_attention.cu."""

    _fields_ = (
        *((name, ctypes.c_uint64) for name in ("queries", "means", "keys_values", "query_factors", "key_factors")),
        *((name, ctypes.c_uint64) for name in ("value_factors", "value_means", "lse_shifts", "key_lengths", "mask")),
        *((name, ctypes.c_uint64) for name in ("tile_seen", "output", "lse")),
        ("output_strides", ctypes.c_int64 * 3),
        ("mask_strides", ctypes.c_int64 * 4),
        ("tile_seen_strides", ctypes.c_int64 * 2),
        *((name, ctypes.c_int32) for name in ("batch", "heads", "kv_heads", "query_length", "key_length", "head_dim")),
        *((name, ctypes.c_int32) for name in ("query_tiles", "key_tiles", "causal", "output_is_bf16", "mask_kind")),
        ("scale_log2e", ctypes.c_float),
        ("scale", ctypes.c_float),
    )


@dataclass(frozen=True, eq=False)
class PackedTensors:
    """Views of `PackedOperands`; layouts in formats/nvfp4_tiles.py. Float tensors are float32.

    Attributes:
        queries: int32 [B, H, query tiles, 8, words], one image for 32 rows.
        means: int32 [B, H, query tiles, words].
        keys_values: int32 [B, Hkv, key tiles, words], one image for 64 keys.
        query_factors: [B, H, query tiles, 8], what one unit of the packed Q is worth.
        key_factors, value_factors: [B, Hkv].
        key_means, value_means: [B, Hkv, D padded].
    """

    queries: Tensor
    means: Tensor
    keys_values: Tensor
    query_factors: Tensor
    key_factors: Tensor
    value_factors: Tensor
    key_means: Tensor
    value_means: Tensor


class PackedOperands:
    """Q, K and V in NVFP4, and what restores them, in one allocation; kernels take addresses, which cost no host time.

    Attributes:
        query_tiles, key_tiles: of 256 rows and of 64 keys.
        queries ... value_means: addresses of what `PackedTensors` describes.
        lse_shifts: float32 [B, H, Nq], q . mean(k), or None.
        tile_seen: uint8 [mask B, mask H, query tiles, key tiles], whether a mask leaves anything to see, or None.
    """

    def __init__(self, call: AttentionCall, mask: Tensor | None) -> None:
        device, columns = call.device, value_dim(call.head_dim)
        self.query_tiles = query_tiles = -(-call.query_length // _QUERY_TILE)
        self.key_tiles = key_tiles = -(-call.key_length // KEY_TILE)
        rows, kv_heads = (call.batch, call.heads, query_tiles), (call.batch, call.kv_heads)
        self._shapes = (
            (*rows, MEANS_PER_TILE, query_block_words(call.head_dim)),
            (*rows, mean_tile_words(call.head_dim)),
            (*kv_heads, key_tiles, key_value_tile_words(call.head_dim)),
            (*rows, MEANS_PER_TILE),
            kv_heads,
            kv_heads,
            (*kv_heads, columns),
            (*kv_heads, columns),
        )
        ends = list(accumulate(-(-math.prod(shape) // _ALIGNMENT) * _ALIGNMENT for shape in self._shapes))
        self._starts = (0, *ends[:-1])
        self._memory = torch.empty(ends[-1], dtype=torch.int32, device=device)
        self.lse_shifts = self.tile_seen = None
        if call.return_lse:
            shape = (call.batch, call.heads, call.query_length)
            self.lse_shifts = torch.empty(shape, dtype=torch.float32, device=device)
        if mask is not None:
            self.tile_seen = torch.empty((*mask.shape[:2], query_tiles, key_tiles), dtype=torch.uint8, device=device)
        base = self._memory.data_ptr()
        (
            self.queries,
            self.means,
            self.keys_values,
            self.query_factors,
            self.key_factors,
            self.value_factors,
            self.key_means,
            self.value_means,
        ) = (base + 4 * start for start in self._starts)

    def tensors(self) -> PackedTensors:
        """The operands as tensors."""
        dtypes = (torch.int32,) * 3 + (torch.float32,) * 5
        return PackedTensors(
            *(
                self._memory[start : start + math.prod(shape)].view(dtype).view(shape)
                for start, shape, dtype in zip(self._starts, self._shapes, dtypes, strict=True)
            )
        )


@dataclass(frozen=True, eq=False)
class _State:
    operands: PackedOperands
    mask: Tensor | None
    mask_strides: tuple[int, int, int, int]
    key_lengths: Tensor | None
    key_length: int
    shape: tuple[int, int, int, int]
    kv_heads: int
    device: torch.device
    is_causal: bool
    scale: float
    layout: str
    dtype: torch.dtype
    return_lse: bool


@dataclass(frozen=True)
class NVFP4CudaKernel:
    """SageAttention3's FP4 attention.

    Attributes:
        emulate_instructions: compile with the FP4 instructions emulated, so that the same source runs on other GPUs;
            for tests.
    """

    emulate_instructions: bool = False
    name: str = "nvfp4_cuda"
    precision: Precision = "fp4"
    emulated: bool = False

    def refuse(self, call: AttentionCall, architecture: Architecture | None) -> str | None:
        """Refuse larger heads, gradients and grids beyond CUDA's limit."""
        if call.needs_grad:
            return "the inputs require gradients; use trainable_attention or precision='fp16'"
        if call.head_dim > MAX_HEAD_DIM:
            return f"head_dim {call.head_dim} is larger than {MAX_HEAD_DIM}, what its registers hold"
        blocks = call.batch * call.heads * (call.query_length + call.key_length)
        if blocks > _MAX_GRID:
            return f"{blocks} rows in all are more than its grid can count ({_MAX_GRID})"
        return None if architecture is None else _obstacle(value_dim(call.head_dim), architecture.target)

    def prepare(self, call: AttentionCall) -> _State:
        """Smooth and quantise in two launches; float32 inputs are rounded to bfloat16 first."""
        query, key, value = call.query, call.key, call.value
        if query.dtype == torch.float32:
            query, key, value = query.bfloat16(), key.bfloat16(), value.bfloat16()
        mask, mask_strides = _broadcast_mask(call)
        return _State(
            self._pack(call, query, key, value, mask, mask_strides),
            mask,
            mask_strides,
            call.key_lengths,
            call.key_length,
            (call.batch, call.heads, call.query_length, call.head_dim),
            call.kv_heads,
            call.device,
            call.is_causal,
            call.scale,
            call.layout,
            call.query.dtype,
            call.return_lse,
        )

    def run(self, state: Any) -> tuple[Tensor, Tensor | None]:
        """One launch on the packed operands."""
        packed: PackedOperands = state.operands
        batch, heads, rows, head_dim = state.shape
        device = state.device
        dtype = torch.bfloat16 if state.dtype == torch.float32 else state.dtype
        output = _empty_output(state.shape, state.layout, dtype, device)
        lse = torch.empty((batch, heads, rows), dtype=torch.float32, device=device) if state.return_lse else None
        if output.numel() == 0:
            return output.to(state.dtype), lse
        query_tiles, key_tiles = packed.query_tiles, packed.key_tiles
        seen = packed.tile_seen
        parameters = _AttentionParameters(
            packed.queries,
            packed.means,
            packed.keys_values,
            packed.query_factors,
            packed.key_factors,
            packed.value_factors,
            packed.value_means,
            _pointer(packed.lse_shifts),
            _pointer(state.key_lengths),
            _pointer(state.mask),
            _pointer(seen),
            output.data_ptr(),
            _pointer(lse),
            output.stride()[:3],
            state.mask_strides,
            (0, 0)
            if seen is None
            else tuple(s if n > 1 else 0 for s, n in zip(seen.stride(), seen.shape[:2], strict=False)),
            batch,
            heads,
            state.kv_heads,
            rows,
            state.key_length,
            head_dim,
            query_tiles,
            key_tiles,
            state.is_causal,
            dtype == torch.bfloat16,
            0 if state.mask is None else _MASK_KINDS[state.mask.dtype],
            abs(state.scale) * _LOG2_E,
            state.scale,
        )
        kernel = load_kernel(
            nvfp4_attention_variant(value_dim(head_dim), state.mask is not None), device, self.emulate_instructions
        )
        kernel.launch((min(batch * heads * query_tiles, _multiprocessors(kernel.device_index)), 1, 1), parameters)
        return output.to(state.dtype), lse

    def _pack(
        self,
        call: AttentionCall,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        mask_strides: tuple[int, int, int, int],
    ) -> PackedOperands:
        device, batch, heads, kv_heads = call.device, call.batch, call.heads, call.kv_heads
        columns = value_dim(call.head_dim)
        chunks = max(
            1, min(_MAX_CHUNKS, -(-call.key_length // _CHUNK_TOKENS), _STATISTICS_BLOCKS // (batch * kv_heads or 1))
        )
        chunk_tokens = -(-call.key_length // chunks)
        packed = PackedOperands(call, mask)
        query_tiles, key_tiles = packed.query_tiles, packed.key_tiles
        if batch * heads * query_tiles == 0:
            return packed
        partials = torch.empty((batch, kv_heads, chunks, 2, columns + 1), dtype=torch.float32, device=device)
        parameters = _PrepareParameters(
            _operand(query),
            _operand(key),
            _operand(value),
            _pointer(call.key_lengths),
            _pointer(mask),
            packed.queries,
            packed.means,
            packed.keys_values,
            packed.query_factors,
            packed.key_factors,
            packed.value_factors,
            packed.key_means,
            packed.value_means,
            partials.data_ptr(),
            partials.data_ptr() + 4 * batch * kv_heads * chunks * 2 * columns,
            _pointer(packed.lse_shifts),
            _pointer(packed.tile_seen),
            mask_strides,
            batch,
            heads,
            kv_heads,
            call.query_length,
            call.key_length,
            call.head_dim,
            query_tiles,
            key_tiles,
            chunks,
            chunk_tokens,
            query.dtype == torch.bfloat16,
            0 if mask is None else _MASK_KINDS[mask.dtype],
            1 if mask is None else mask.shape[0],
            1 if mask is None else mask.shape[1],
            _has_vectors(query) and _has_vectors(key) and _has_vectors(value),
            -1.0 if call.scale < 0 else 1.0,
        )
        first = load_kernel(nvfp4_prepare_variant("nvfp4_prepare_queries", columns), device, self.emulate_instructions)
        first.launch((batch * kv_heads * chunks * 2 + batch * heads * query_tiles, 1, 1), parameters)
        blocks = batch * kv_heads * -(-key_tiles // _TILES_PER_BLOCK)
        if call.return_lse:
            blocks += batch * heads * -(-call.query_length // _SHIFT_ROWS)
        if packed.tile_seen is not None:
            blocks += packed.tile_seen.numel()
        second = load_kernel(
            nvfp4_prepare_variant("nvfp4_prepare_keys_values", columns), device, self.emulate_instructions
        )
        second.launch((blocks, 1, 1), parameters)
        return packed


def _broadcast_mask(call: AttentionCall) -> tuple[Tensor | None, tuple[int, int, int, int]]:
    """The mask as a 4-axis view whose axes have length 1 or the full length, and its strides, 0 where it is 1."""
    mask = call.attn_mask
    if mask is None:
        return None, (0, 0, 0, 0)
    mask = mask.reshape((1,) * (4 - mask.dim()) + tuple(mask.shape))
    strides = [0 if size == 1 else stride for size, stride in zip(mask.shape, mask.stride(), strict=True)]
    return mask, (strides[0], strides[1], strides[2], strides[3])


def _empty_output(shape: tuple[int, int, int, int], layout: str, dtype: torch.dtype, device: torch.device) -> Tensor:
    """[B, H, N, D] whose memory is contiguous in the caller's layout."""
    batch, heads, rows, head_dim = shape
    if layout == "BNHD":
        return torch.empty((batch, rows, heads, head_dim), dtype=dtype, device=device).transpose(1, 2)
    return torch.empty(shape, dtype=dtype, device=device)


def _operand(x: Tensor) -> _Operand:
    return _Operand(x.data_ptr(), x.stride())


def _pointer(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def _has_vectors(x: Tensor) -> bool:
    """Whether rows are contiguous and start at multiples of 16 bytes."""
    *strides, last = x.stride()
    aligned = all(stride % 8 == 0 or size == 1 for stride, size in zip(strides, x.shape, strict=False))
    return last == 1 and x.shape[-1] % 8 == 0 and x.data_ptr() % 16 == 0 and aligned


@lru_cache
def _obstacle(columns: int, target: str) -> str | None:
    """Why the kernels can't be loaded on this machine, or None: a driver that is too old, no compiler."""
    return loading_obstacle(nvfp4_attention_variant(columns, False), target)


@lru_cache
def _multiprocessors(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


KERNEL = NVFP4CudaKernel()
