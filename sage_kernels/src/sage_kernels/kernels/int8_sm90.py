"""INT8 attention in CUDA for sm_90a: csrc/int8_sm90_prepare.cu and csrc/int8_sm90_attention.cu."""

import ctypes
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from sage_kernels.architectures import Architecture
from sage_kernels.attention_call import AttentionCall
from sage_kernels.cubin_loader import LoadedKernel, load_kernel
from sage_kernels.int8_sm90_forms import FORMS, Int8Sm90Form
from sage_kernels.kernel_variants import int8_sm90_attention_variant, int8_sm90_prepare_variant
from sage_kernels.kernels.tensor_layout import empty_output, has_aligned_rows, pointer
from sage_kernels.precision import Precision
from sage_kernels.recipes import RECIPES, Recipe

_TARGET = "sm_90a"
_HEAD_DIM_STEP = 8  # channels that a thread loads at once
_CLUSTER = 8  # thread blocks that prepare one head of K or V, as in int8_sm90_prepare.cu
_UNIT_ROWS = 64  # query rows of a warpgroup
_ALIGNMENT = 256
_MAX_GRID = 2**31 - 1


class _Parameters(ctypes.Structure):
    """csrc/int8_sm90_params.cuh."""

    _fields_ = (
        *((name, ctypes.c_uint64) for name in ("query", "key", "value", "key_lengths")),
        *((name, ctypes.c_uint64) for name in ("query_codes", "key_codes", "value_codes")),
        *((name, ctypes.c_uint64) for name in ("query_scale", "key_scale", "key_mean", "value_scale", "value_mean")),
        *((name, ctypes.c_uint64) for name in ("value_error", "lse_shift", "output", "lse")),
        *((name, ctypes.c_int64 * 3) for name in ("query_strides", "key_strides", "value_strides", "output_strides")),
        *((name, ctypes.c_int32) for name in ("batch", "heads", "kv_heads", "query_length", "key_length", "head_dim")),
        *((name, ctypes.c_int32) for name in ("query_rows", "key_blocks", "is_causal", "is_bfloat16")),
        ("even_shares", ctypes.c_int32),
        ("softmax_scale", ctypes.c_float),
    )


@dataclass(frozen=True, eq=False)
class _State:
    """A call without its floating-point operands; `parameters` points into `memory` and at `key_lengths`."""

    parameters: _Parameters
    memory: Tensor
    key_lengths: Tensor | None
    kernel: LoadedKernel | None
    form: Int8Sm90Form
    shape: tuple[int, int, int, int]
    layout: str
    dtype: torch.dtype
    return_lse: bool


@dataclass(frozen=True)
class Int8Sm90Kernel:
    """Q K^T in INT8 and P V in FP8 on Hopper's wgmma.

    Attributes:
        forms: how the kernel is compiled, one form per head dimension, smallest first.
        even_share_turns: up to so many tiles for each multiprocessor, rows are shared out evenly, because many would
            idle in the last turn; more tiles are taken in turns, which shares keys in the L2 cache.
    """

    forms: tuple[Int8Sm90Form, ...] = FORMS
    even_share_turns: int = 16
    name: str = "int8_sm90"
    precision: Precision = "int8"
    emulated: bool = False

    def refuse(self, call: AttentionCall, architecture: Architecture | None) -> str | None:
        """Refuse other architectures, mask tensors, gradients and head dimensions that its tiles can't hold."""
        if architecture is None or architecture.target != _TARGET:
            return f"it is made of instructions that only {_TARGET} has"
        if call.needs_grad:
            return "the inputs require gradients; use trainable_attention or precision='fp16'"
        if call.attn_mask is not None:
            return "it takes no mask tensor, only is_causal and key_lengths"
        if call.head_dim > self.forms[-1].head_dim or call.head_dim % _HEAD_DIM_STEP:
            return f"head_dim {call.head_dim} is not a multiple of {_HEAD_DIM_STEP} up to {self.forms[-1].head_dim}"
        rows = call.batch * (call.heads * call.query_length + call.kv_heads * call.key_length)
        if rows > _MAX_GRID:
            return f"{rows} rows in all are more than its grid can count ({_MAX_GRID})"
        return None

    def recipe(self, call: AttentionCall) -> Recipe:
        """What this call computes, for comparison with `reference.quantized_attention`."""
        form = self._form(call.head_dim)
        return replace(
            RECIPES["int8"],
            key_block=form.keys,
            int8_rows=(1, form.keys),
            quantized_row_sum=form.ones,
            rescale_threshold=float(form.headroom),
            linear_exp_of_8=form.line,
        )

    def prepare(self, call: AttentionCall) -> _State:
        """Smooth and quantise in one launch; rows that 16-byte loads can't read are copied first."""
        form = self._form(call.head_dim)
        query, key, value = (_loadable(x) for x in (call.query, call.key, call.value))
        batch, heads, kv_heads, rows = call.batch, call.heads, call.kv_heads, call.query_length
        query_rows, key_blocks = -(-rows // form.rows) * form.rows, -(-call.key_length // form.keys)
        query_tokens, kv_tokens = batch * heads * query_rows, batch * kv_heads * key_blocks * form.keys
        per_channel = 4 * batch * kv_heads * form.head_dim
        memory, addresses = _allocate(
            call.device,
            query_tokens * form.head_dim,
            kv_tokens * form.head_dim,
            kv_tokens * form.head_dim,
            4 * query_tokens,
            4 * batch * kv_heads * key_blocks,
            *(per_channel,) * 4,
            4 * query_tokens if call.return_lse else 0,
        )
        if not call.return_lse:
            addresses[-1] = 0
        is_bfloat16 = query.dtype == torch.bfloat16
        parameters = _Parameters(
            query.data_ptr(),
            key.data_ptr(),
            value.data_ptr(),
            pointer(call.key_lengths),
            *addresses,
            0,
            0,
            query.stride()[:3],
            key.stride()[:3],
            value.stride()[:3],
            (0, 0, 0),
            batch,
            heads,
            kv_heads,
            rows,
            call.key_length,
            call.head_dim,
            query_rows,
            key_blocks,
            call.is_causal,
            is_bfloat16,
            0,
            call.scale,
        )
        attention = None
        if query_tokens:
            preparation, attention = _load(form, is_bfloat16, call.device)
            blocks = 2 * _CLUSTER * batch * kv_heads
            if not call.return_lse:
                blocks += -(-batch * heads * -(-query_rows // form.keys) // _CLUSTER) * _CLUSTER
            preparation.launch((blocks, 1, 1), parameters)
        return _State(
            parameters,
            memory,
            call.key_lengths,
            attention,
            form,
            (batch, heads, rows, call.head_dim),
            call.layout,
            call.query.dtype,
            call.return_lse,
        )

    def run(self, state: Any) -> tuple[Tensor, Tensor | None]:
        """One launch on the codes."""
        device, shape = state.memory.device, state.shape
        dtype = torch.bfloat16 if state.dtype == torch.float32 else state.dtype
        output = empty_output(shape, state.layout, dtype, device)
        lse = torch.empty(shape[:3], dtype=torch.float32, device=device) if state.return_lse else None
        if state.kernel is None:
            return output.to(state.dtype), lse
        parameters = _Parameters.from_buffer_copy(state.parameters)
        parameters.output = output.data_ptr()
        parameters.lse = pointer(lse)
        parameters.output_strides = output.stride()[:3]
        processors = _multiprocessors(state.kernel.device_index)
        blocks = shape[0] * shape[1] * -(-shape[2] // state.form.rows)
        if not parameters.is_causal and blocks <= self.even_share_turns * processors:
            parameters.even_shares = 1
            blocks = shape[0] * shape[1] * -(-shape[2] // _UNIT_ROWS)
        state.kernel.launch((min(blocks, processors), 1, 1), parameters)
        return output.to(state.dtype), lse

    def _form(self, head_dim: int) -> Int8Sm90Form:
        return next(form for form in self.forms if head_dim <= form.head_dim)


def _loadable(x: Tensor) -> Tensor:
    if x.dtype == torch.float32:
        x = x.bfloat16()
    return x if has_aligned_rows(x) else x.clone(memory_format=torch.contiguous_format)


def _allocate(device: torch.device, *sizes: int) -> tuple[Tensor, list[int]]:
    """One allocation for buffers of `sizes` bytes, and their addresses."""
    offsets, end = [], 0
    for size in sizes:
        offsets.append(end)
        end += -(-size // _ALIGNMENT) * _ALIGNMENT
    memory = torch.empty(end, dtype=torch.uint8, device=device)
    start = memory.data_ptr()
    return memory, [start + offset for offset in offsets]


@lru_cache
def _load(form: Int8Sm90Form, is_bfloat16: bool, device: torch.device) -> tuple[LoadedKernel, LoadedKernel]:
    preparation = load_kernel(int8_sm90_prepare_variant(form.head_dim, form.keys, is_bfloat16), device)
    return preparation, load_kernel(int8_sm90_attention_variant(form), device)


@lru_cache
def _multiprocessors(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


KERNEL = Int8Sm90Kernel()
