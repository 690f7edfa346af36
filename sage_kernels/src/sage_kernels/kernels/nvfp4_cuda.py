"""FP4 attention in CUDA for sm_120a and sm_121a: csrc/nvfp4_prepare.cu and csrc/nvfp4_attention.cu.

Two kernels, one for each rung: all operands in NVFP4, or Q and K in MXFP8.
"""

import ctypes
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from sage_kernels.architectures import Architecture
from sage_kernels.attention_call import AttentionCall
from sage_kernels.cubin_loader import load_kernel, loading_obstacle
from sage_kernels.formats import mxfp8_tiles, nvfp4_tiles
from sage_kernels.formats.nvfp4_tiles import KEY_TILE, MAX_HEAD_DIM, MEANS_PER_TILE, QUERY_BLOCK, mean_tile_words
from sage_kernels.kernel_variants import nvfp4_attention_variant, nvfp4_prepare_variant
from sage_kernels.kernels.tensor_layout import has_aligned_rows
from sage_kernels.launch_plan import (
    LaunchPlan,
    LaunchSequence,
    OutputForm,
    ParameterTemplate,
    PreparedLaunch,
    WorkspaceLayout,
    copied_strides,
    planned,
)
from sage_kernels.precision import Precision

_QUERY_TILE = QUERY_BLOCK * MEANS_PER_TILE
_TILES_PER_BLOCK = 4  # key tiles, as in nvfp4_prepare.cu
_SHIFT_ROWS = 64  # as in nvfp4_prepare.cu
_CHUNK_TOKENS = 256  # fewer would leave the blocks that collect statistics too little work
_STATISTICS_BLOCKS = 1024  # enough to fill any GPU
_MAX_CHUNKS = 64
_LOG2_E = 1.4426950408889634
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
    """What preparation leaves in the workspace; layouts in formats/nvfp4_tiles.py. Float tensors are float32.

    Attributes:
        queries: int32 [B, H, query tiles, 8, words], one image for 32 rows.
        means: int32 [B, H, query tiles, words], in NVFP4 at both rungs.
        keys_values: int32 [B, Hkv, key tiles, words], one image for 64 keys.
        query_factors: [B, H, query tiles, 8], what one unit of the packed Q is worth.
        key_factors, value_factors: [B, Hkv].
        key_means, value_means: [B, Hkv, D padded].
        lse_shifts: [B, H, Nq], q . mean(k), where LSE is wanted.
    """

    queries: Tensor
    means: Tensor
    keys_values: Tensor
    query_factors: Tensor
    key_factors: Tensor
    value_factors: Tensor
    key_means: Tensor
    value_means: Tensor
    lse_shifts: Tensor | None


def packed_tensors(state: PreparedLaunch) -> PackedTensors:
    """The operands of a prepared call, for tests and tools."""
    assert state.workspace is not None
    layout = state.plan.workspace
    views: dict[str, Any] = {field.name: layout.view(state.workspace, field.name) for field in fields(PackedTensors)}
    return PackedTensors(**views)


@dataclass(frozen=True)
class _Form:
    """What the rungs differ in: the variant of the sources, and functions of head_dim.

    Attributes:
        kernel: its name.
        mxfp8: whether Q and K are in MXFP8.
        padded_dim: the head_dim that the variant is compiled for.
        query_block_words, key_value_tile_words: of the images.
    """

    kernel: str
    mxfp8: bool
    padded_dim: Callable[[int], int]
    query_block_words: Callable[[int], int]
    key_value_tile_words: Callable[[int], int]


_FORMS: dict[Precision, _Form] = {
    "fp4": _Form(
        "nvfp4_cuda", False, nvfp4_tiles.value_dim, nvfp4_tiles.query_block_words, nvfp4_tiles.key_value_tile_words
    ),
    "fp8_fp4": _Form(
        "mxfp8_nvfp4_cuda",
        True,
        mxfp8_tiles.padded_dim,
        mxfp8_tiles.query_block_words,
        mxfp8_tiles.key_value_tile_words,
    ),
}


@dataclass(frozen=True)
class NVFP4CudaKernel:
    """SageAttention3's FP4 attention, and the same with Q and K in MXFP8.

    Attributes:
        emulate_instructions: compile with the FP4 instructions emulated, so that the same source runs on other GPUs;
            for tests.
        precision: "fp4" or "fp8_fp4".
    """

    emulate_instructions: bool = False
    precision: Precision = "fp4"
    emulated: bool = False

    @property
    def name(self) -> str:
        """By its formats."""
        return self._form.kernel

    @property
    def _form(self) -> _Form:
        return _FORMS[self.precision]

    def refuse(self, call: AttentionCall, architecture: Architecture | None) -> str | None:
        """Refuse other architectures, larger heads, gradients and grids beyond CUDA's limit."""
        archs = nvfp4_attention_variant(MAX_HEAD_DIM, False, self._form.mxfp8).archs
        if architecture is not None and architecture.target not in archs and not self.emulate_instructions:
            return f"is compiled for {' and '.join(archs)} only"
        if call.needs_grad:
            return "the inputs require gradients; use trainable_attention or precision='fp16'"
        if call.head_dim > MAX_HEAD_DIM:
            return f"head_dim {call.head_dim} is larger than {MAX_HEAD_DIM}, what its registers hold"
        blocks = call.batch * call.heads * (call.query_length + call.key_length)
        if blocks > _MAX_GRID:
            return f"{blocks} rows in all are more than its grid can count ({_MAX_GRID})"
        if architecture is None:
            return None
        return _obstacle(self._form.padded_dim(call.head_dim), self._form.mxfp8, architecture.target)

    def plan(self, call: AttentionCall) -> LaunchPlan:
        """Smooth and quantise in two launches, attend in one; float32 inputs are rounded to bfloat16 first."""
        output, device = OutputForm.of(call), call.device
        batch, heads, kv_heads, columns = call.batch, call.heads, call.kv_heads, self._form.padded_dim(call.head_dim)
        query_tiles, key_tiles = -(-call.query_length // _QUERY_TILE), -(-call.key_length // KEY_TILE)
        chunks = _chunks(call)
        workspace = _workspace(call, self._form, query_tiles, key_tiles, chunks)
        if batch * heads * query_tiles == 0:
            return LaunchPlan(output, workspace, None, None)
        copied = call.query.dtype == torch.float32
        mask_shape, mask_strides = _broadcast_mask(call)
        has_mask = call.attn_mask is not None
        prepare_parameters = _PrepareParameters(
            mask_strides=mask_strides,
            batch=batch,
            heads=heads,
            kv_heads=kv_heads,
            query_length=call.query_length,
            key_length=call.key_length,
            head_dim=call.head_dim,
            query_tiles=query_tiles,
            key_tiles=key_tiles,
            chunks=chunks,
            chunk_tokens=-(-call.key_length // chunks),
            is_bf16=output.kernel_dtype == torch.bfloat16,
            mask_kind=_mask_kind(call),
            mask_batch=mask_shape[0],
            mask_heads=mask_shape[1],
            vectors=all(_has_vectors(x, copied) for x in (call.query, call.key, call.value)),
            query_sign=-1.0 if call.scale < 0 else 1.0,
            **{
                name: _Operand(0, copied_strides(x) if copied else x.stride())
                for name, x in (("query", call.query), ("key", call.key), ("value", call.value))
            },
        )
        attention_parameters = _AttentionParameters(
            output_strides=output.strides,
            mask_strides=mask_strides,
            tile_seen_strides=_tile_seen_strides(mask_shape, query_tiles * key_tiles),
            batch=batch,
            heads=heads,
            kv_heads=kv_heads,
            query_length=call.query_length,
            key_length=call.key_length,
            head_dim=call.head_dim,
            query_tiles=query_tiles,
            key_tiles=key_tiles,
            causal=call.is_causal,
            output_is_bf16=output.kernel_dtype == torch.bfloat16,
            mask_kind=_mask_kind(call),
            scale_log2e=abs(call.scale) * _LOG2_E,
            scale=call.scale,
        )
        second_blocks = batch * kv_heads * -(-key_tiles // _TILES_PER_BLOCK)
        if call.return_lse:
            second_blocks += batch * heads * -(-call.query_length // _SHIFT_ROWS)
        if has_mask:
            second_blocks += mask_shape[0] * mask_shape[1] * query_tiles * key_tiles
        first, second, attention = (
            load_kernel(variant, device, self.emulate_instructions)
            for variant in (
                nvfp4_prepare_variant("nvfp4_prepare_queries", columns, self._form.mxfp8),
                nvfp4_prepare_variant("nvfp4_prepare_keys_values", columns, self._form.mxfp8),
                nvfp4_attention_variant(columns, has_mask, self._form.mxfp8),
            )
        )
        offsets = workspace.offsets()
        prepare = LaunchSequence(
            (
                (first, batch * kv_heads * chunks * 2 + batch * heads * query_tiles),
                (second, second_blocks),
            ),
            ParameterTemplate(prepare_parameters, offsets, ("query", "key", "value", "key_lengths", "mask")),
        )
        attended = {name: offset for name, offset in offsets.items() if hasattr(_AttentionParameters, name)}
        run = LaunchSequence(
            ((attention, min(batch * heads * query_tiles, _multiprocessors(attention.device_index))),),
            ParameterTemplate(attention_parameters, attended, ("output", "lse", "key_lengths", "mask")),
        )
        return LaunchPlan(output, workspace, prepare, run, (copied,) * 3)

    def prepare(self, call: AttentionCall) -> PreparedLaunch:
        """The plan's first half."""
        return planned(self, call).prepare_call(call)

    def run(self, state: Any) -> tuple[Tensor, Tensor | None]:
        """The plan's second half."""
        prepared: PreparedLaunch = state
        return prepared.plan.run(prepared)


def _chunks(call: AttentionCall) -> int:
    """Parts of the keys whose statistics are collected apart."""
    most = _STATISTICS_BLOCKS // (call.batch * call.kv_heads or 1)
    return max(1, min(_MAX_CHUNKS, -(-call.key_length // _CHUNK_TOKENS), most))


def _workspace(call: AttentionCall, form: _Form, query_tiles: int, key_tiles: int, chunks: int) -> WorkspaceLayout:
    """The packed operands, named as the fields of the parameters, and what restores them."""
    rows, kv_heads, columns = (
        (call.batch, call.heads, query_tiles),
        (call.batch, call.kv_heads),
        form.padded_dim(call.head_dim),
    )
    words = {
        "queries": (*rows, MEANS_PER_TILE, form.query_block_words(call.head_dim)),
        "means": (*rows, mean_tile_words(call.head_dim)),
        "keys_values": (*kv_heads, key_tiles, form.key_value_tile_words(call.head_dim)),
    }
    floats = {
        "query_factors": (*rows, MEANS_PER_TILE),
        "key_factors": kv_heads,
        "value_factors": kv_heads,
        "key_means": (*kv_heads, columns),
        "value_means": (*kv_heads, columns),
        "partial_sums": (*kv_heads, chunks, 2, columns),
        "partial_maxima": (*kv_heads, chunks, 2),
    }
    if call.return_lse:
        floats["lse_shifts"] = (call.batch, call.heads, call.query_length)
    buffers = {name: (shape, torch.int32) for name, shape in words.items()}
    buffers |= {name: (shape, torch.float32) for name, shape in floats.items()}
    if call.attn_mask is not None:
        mask_shape, _ = _broadcast_mask(call)
        buffers["tile_seen"] = ((*mask_shape[:2], query_tiles, key_tiles), torch.uint8)
    return WorkspaceLayout(buffers)


def _broadcast_mask(call: AttentionCall) -> tuple[tuple[int, int, int, int], tuple[int, int, int, int]]:
    """Shape of the mask with 4 axes, each of length 1 or the full one, and its strides, 0 where it is 1."""
    mask = call.attn_mask
    if mask is None:
        return (1, 1, 1, 1), (0, 0, 0, 0)
    more = 4 - mask.dim()
    shape, strides = (1,) * more + tuple(mask.shape), (0,) * more + mask.stride()
    strides = tuple(0 if size == 1 else stride for size, stride in zip(shape, strides, strict=True))
    return (shape[0], shape[1], shape[2], shape[3]), (strides[0], strides[1], strides[2], strides[3])


def _mask_kind(call: AttentionCall) -> int:
    return 0 if call.attn_mask is None else _MASK_KINDS[call.attn_mask.dtype]


def _tile_seen_strides(mask_shape: tuple[int, int, int, int], tiles: int) -> tuple[int, int]:
    """Bytes from one batch and head to the next, 0 where all share one mask."""
    batch, heads, _, _ = mask_shape
    return heads * tiles if batch > 1 else 0, tiles if heads > 1 else 0


def _has_vectors(x: Tensor, copied: bool) -> bool:
    """Whether rows are contiguous and start at multiples of 16 bytes, as those of a copy do where their length fits."""
    return x.shape[-1] % 8 == 0 and (copied or has_aligned_rows(x))


@lru_cache
def _obstacle(columns: int, mxfp8: bool, target: str) -> str | None:
    """Why the kernels can't be loaded on this machine, or None: a driver that is too old, no compiler."""
    return loading_obstacle(nvfp4_attention_variant(columns, False, mxfp8), target)


@lru_cache
def _multiprocessors(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


KERNEL = NVFP4CudaKernel()
MXFP8_KERNEL = NVFP4CudaKernel(precision="fp8_fp4")
