"""INT8 attention in Triton: one source for every GPU from sm_80 on.

Triton is imported by the first call: it may be missing (Windows, CPU builds of torch), and it is slow to load.
"""

import contextlib
import importlib.util
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from sage_kernels.architectures import Architecture, device_architecture
from sage_kernels.attention_call import AttentionCall
from sage_kernels.kernels.int8_configs import AttentionConfig, find_config
from sage_kernels.kernels.int8_operands import TOKEN_TILE, Int8Operands
from sage_kernels.kernels.tensor_layout import empty_output
from sage_kernels.precision import Precision
from sage_kernels.recipes import RECIPES, Recipe

_VALUE_ROW = 16  # elements; rows that are copied are a multiple apart
_LOAD_BYTES = 16
_NO_TRITON = "Triton is not installed; `pip install triton` (Linux) or `pip install triton-windows` (Windows)"


@dataclass(frozen=True, eq=False)
class _State:
    """A call without its floating-point operands, and what replaces them."""

    operands: Int8Operands
    config: AttentionConfig
    batch: int
    heads: int
    kv_heads: int
    query_length: int
    key_length: int
    head_dim: int
    dtype: torch.dtype
    attn_mask: Tensor | None
    is_causal: bool
    scale: float
    key_lengths: Tensor | None
    layout: str
    return_lse: bool

    @property
    def fp8(self) -> bool:
        """Whether P and V are E4M3 rather than FP16."""
        return self.operands.value.dtype == torch.float8_e4m3fn


@dataclass(frozen=True)
class Int8TritonKernel:
    """Q and K in INT8; P and V in FP8 where `precision` asks for it and the hardware has it, else in FP16."""

    precision: Precision
    emulated: bool = False

    @property
    def name(self) -> str:
        """The precision and the language."""
        return f"{self.precision}_triton"

    def refuse(self, call: AttentionCall, architecture: Architecture | None) -> str | None:
        """Refuse gradients, and where Triton is missing."""
        if call.needs_grad:
            return "the inputs require gradients; use trainable_attention or precision='fp16'"
        return _NO_TRITON if _triton_is_missing() else None

    def recipe(self, call: AttentionCall) -> Recipe:
        """What this call computes, for comparison with `reference.quantized_attention`."""
        fp8 = self._uses_fp8(call)
        config = _config(call)
        return replace(
            RECIPES["int8" if fp8 else "int8_fp16"],
            key_block=config.block_n,
            quantized_row_sum=config.row_sum != "unrounded",
        )

    def prepare(self, call: AttentionCall) -> _State:
        """Two launches: statistics of K and V, then codes and scales of Q, K and V."""
        fp8 = self._uses_fp8(call)
        block_d = _block_d(call.head_dim)
        with _on_device(call.device):
            operands = _quantize(call, block_d, fp8)
        return _State(
            operands,
            _config(call),
            call.batch,
            call.heads,
            call.kv_heads,
            call.query_length,
            call.key_length,
            call.head_dim,
            call.query.dtype,
            call.attn_mask,
            call.is_causal,
            call.scale,
            call.key_lengths,
            call.layout,
            call.return_lse,
        )

    def run(self, state: Any) -> tuple[Tensor, Tensor | None]:
        """One launch."""
        with _on_device(state.operands.query.device):
            return _attend(state)

    def _uses_fp8(self, call: AttentionCall) -> bool:
        architecture = device_architecture(call.device)
        return self.precision == "int8" and (architecture is None or architecture.fp8_mma)


def _config(call: AttentionCall) -> AttentionConfig:
    mask_bytes = 0 if call.attn_mask is None else call.attn_mask.element_size()
    return find_config(device_architecture(call.device), _block_d(call.head_dim), mask_bytes)


def _quantize(call: AttentionCall, block_d: int, fp8: bool) -> Int8Operands:
    from sage_kernels.kernels.triton_int8 import quantize  # noqa: PLC0415 as the module says

    query_heads, kv_heads = call.batch * call.heads, call.batch * call.kv_heads
    query_tiles, key_tiles = -(-call.query_length // TOKEN_TILE), -(-call.key_length // TOKEN_TILE)
    query_rows, key_rows = query_tiles * TOKEN_TILE, key_tiles * TOKEN_TILE

    def empty(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=call.device)

    operands = Int8Operands(
        empty((query_heads, query_rows, block_d), torch.int8),
        empty((query_heads, query_rows)),
        empty((kv_heads, key_rows, block_d), torch.int8),
        empty((kv_heads, key_tiles)),
        empty((kv_heads, block_d, key_rows), torch.float8_e4m3fn)
        if fp8
        else empty((kv_heads, key_rows, block_d), torch.float16),
        empty((kv_heads, block_d)),
        empty((kv_heads if fp8 else 0, block_d)),
        empty((kv_heads if fp8 else 0, block_d), torch.int64),
        empty((query_heads, query_rows if call.return_lse else 0)),
    )
    if query_heads == 0:
        return operands
    rows = 32 if block_d > 64 else 64
    chunks = _chunks(kv_heads, call.key_length)
    partials = empty((kv_heads, 4, chunks, block_d))
    lengths = call.key_lengths
    value = _with_even_rows(call.value) if fp8 else call.value
    quantize.gather_statistics[(kv_heads * chunks,)](
        call.key,
        value,
        lengths,
        partials,
        operands.code_sums,
        *call.key.stride(),
        *value.stride(),
        call.kv_heads,
        call.key_length,
        -(-call.key_length // (rows * chunks)),
        HEAD_DIM=call.head_dim,
        BLOCK_D=block_d,
        ROWS=rows,
        CHUNKS=chunks,
        HAS_LENGTHS=lengths is not None,
        FP8=fp8,
        num_warps=8,
        enable_fp_fusion=False,  # codes are bit by bit those of formats.int8
    )
    query_programs, key_programs = query_heads * query_tiles, kv_heads * key_tiles
    quantize.quantize[(query_programs + 2 * key_programs,)](
        call.query,
        call.key,
        value,
        lengths,
        partials,
        operands.query,
        operands.query_scales,
        operands.lse_shift,
        operands.key,
        operands.key_scales,
        operands.value,
        operands.value_scales,
        operands.value_mean,
        operands.code_sums,
        *call.query.stride(),
        *call.key.stride(),
        *value.stride(),
        call.heads,
        call.kv_heads,
        call.query_length,
        call.key_length,
        query_tiles,
        key_tiles,
        query_programs,
        key_programs,
        -1.0 if call.scale < 0 else 1.0,
        HEAD_DIM=call.head_dim,
        BLOCK_D=block_d,
        CHUNKS=chunks,
        HAS_LENGTHS=lengths is not None,
        WITH_SHIFT=call.return_lse,
        FP8=fp8,
        num_warps=8,
        enable_fp_fusion=False,  # codes are bit by bit those of formats.int8
    )
    return operands


def _attend(state: _State) -> tuple[Tensor, Tensor | None]:
    from sage_kernels.kernels.triton_int8 import attend  # noqa: PLC0415 as the module says

    operands, config = state.operands, state.config
    shape = (state.batch, state.heads, state.query_length)
    device = operands.query.device
    output = empty_output((*shape, state.head_dim), state.layout, state.dtype, device)
    lse = torch.empty(shape, dtype=torch.float32, device=device) if state.return_lse else None
    if output.numel() == 0:
        return output, lse
    mask, mask_strides = _broadcast_mask(state.attn_mask)
    row_blocks = -(-state.query_length // config.block_m)
    attend.attend[(row_blocks * state.batch * state.heads,)](
        operands.query,
        operands.query_scales,
        operands.key,
        operands.key_scales,
        operands.value,
        operands.value_scales,
        operands.value_mean,
        operands.code_sums,
        state.key_lengths,
        mask,
        operands.lse_shift,
        output,
        lse,
        state.scale,
        state.heads,
        state.kv_heads,
        state.query_length,
        state.key_length,
        operands.query.shape[1] // TOKEN_TILE,
        operands.key.shape[1] // TOKEN_TILE,
        row_blocks,
        *mask_strides,
        *output.stride()[:3],
        HEAD_DIM=state.head_dim,
        BLOCK_D=operands.query.shape[2],
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        CAUSAL=state.is_causal,
        MASK=_mask_kind(mask),
        HAS_LENGTHS=state.key_lengths is not None,
        WITH_LSE=state.return_lse,
        FP8=state.fp8,
        PARTIAL_SUMS=config.partial_sums,
        ROW_SUM=config.row_sum,
        num_warps=config.warps,
        num_stages=config.stages,
        enable_fp_fusion=True,
    )
    return output, lse


def _broadcast_mask(mask: Tensor | None) -> tuple[Tensor | None, tuple[int, ...]]:
    """The mask as bytes or floats, and its four strides, 0 along an axis that it broadcasts over."""
    if mask is None:
        return None, (0, 0, 0, 0)
    mask = mask.view(torch.uint8) if mask.dtype == torch.bool else mask
    mask = _with_aligned_rows(mask[(None,) * (4 - mask.dim())])
    return mask, tuple(0 if size == 1 else stride for size, stride in zip(mask.shape, mask.stride(), strict=True))


def _with_aligned_rows(mask: Tensor) -> Tensor:
    """A copy of the mask [B | 1, H | 1, Nq | 1, Nk | 1] where its rows can't be loaded 16 bytes at a time.

    The address of every score by itself would take more registers than there are.
    """
    *_, rows, keys = mask.shape
    if rows == 1 or keys == 1 or mask.stride(2) == 0 or mask.stride(3) == 0:
        return mask
    *outer, column = mask.stride()
    steps = [stride * mask.element_size() for stride, size in zip(outer, mask.shape, strict=False) if size > 1]
    if column == 1 and not any(step % _LOAD_BYTES for step in (*steps, mask.data_ptr())):
        return mask
    once = mask[tuple(slice(1 if stride == 0 else None) for stride in outer)]  # not what it is expanded to
    return torch.nn.functional.pad(once, (0, -keys % _LOAD_BYTES))[..., :keys]


def _mask_kind(mask: Tensor | None) -> int:
    if mask is None:
        return 0
    return 1 if mask.dtype == torch.uint8 else 2


def _block_d(head_dim: int) -> int:
    """head_dim rounded up to what one MMA step takes and Triton allows: a power of two, at least 32."""
    return max(32, 1 << (head_dim - 1).bit_length())


def _with_even_rows(value: Tensor) -> Tensor:
    """A copy of V [B, Hkv, Nk, D] where its rows are an odd number of elements apart.

    FP8 values are loaded in the order in which they are stored, tokens 0 1 8 9 2 3 ... Triton takes this order for even
    numbers, and reads two channels of an odd row at once from an address that is no multiple of theirs.
    """
    if value.stride(2) % 2 == 0:
        return value
    head_dim = value.shape[3]
    return torch.nn.functional.pad(value, (0, -head_dim % _VALUE_ROW))[..., :head_dim]


def _chunks(kv_heads: int, key_length: int) -> int:
    """Pieces of a head's tokens that launch 1 sums up side by side: enough to fill a GPU, few enough to add up.

    One of three numbers, because each is compiled.
    """
    if key_length <= 512:
        return 4
    return 16 if kv_heads >= 24 else 32


def _on_device(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Triton launches on the current device, which need not be the tensors'."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(device)


@lru_cache
def _triton_is_missing() -> bool:
    return importlib.util.find_spec("triton") is None


KERNELS = (Int8TritonKernel("int8"), Int8TritonKernel("int8_fp16"))
