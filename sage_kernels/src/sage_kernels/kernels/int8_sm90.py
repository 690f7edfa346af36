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
from sage_kernels.recipes import RECIPES, Recipe

_TARGET = "sm_90a"
_HEAD_DIM_STEP = 8  # channels that a thread loads at once
_CLUSTER = 8  # thread blocks that prepare one head of K or V, as in int8_sm90_prepare.cu
_UNIT_ROWS = 64  # query rows of a warpgroup
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


@dataclass(frozen=True)
class Int8Sm90Kernel:
    """Q K^T in INT8 and P V in FP8 on Hopper's wgmma.

    Attributes:
        forms: how the kernel is compiled; the first that serves a call is used, so that smaller ones come first.
        even_share_turns: up to so many tiles for each multiprocessor, rows are shared out evenly, because many would
            idle in the last turn; more tiles are taken in turns, which shares keys in the L2 cache.
    """

    forms: tuple[Int8Sm90Form, ...] = FORMS
    even_share_turns: int = 16
    name: str = "int8_sm90"
    precision: Precision = "int8"
    emulated: bool = False

    def refuse(self, call: AttentionCall, architecture: Architecture | None) -> str | None:
        """Refuse other architectures, mask tensors, gradients and head dimensions beyond its tiles."""
        largest = self.forms[-1].head_dim
        rows = call.batch * (call.heads * call.query_length + call.kv_heads * call.key_length)
        reasons = (
            (
                architecture is None or architecture.target != _TARGET,
                f"it is made of instructions that only {_TARGET} has",
            ),
            (call.needs_grad, "the inputs require gradients; use trainable_attention or precision='fp16'"),
            (call.attn_mask is not None, "it takes no mask tensor, only is_causal and key_lengths"),
            (
                call.head_dim > largest or call.head_dim % _HEAD_DIM_STEP != 0,
                f"head_dim {call.head_dim} is not a multiple of {_HEAD_DIM_STEP} up to {largest}",
            ),
            (rows > _MAX_GRID, f"{rows} rows in all are more than its grid can count ({_MAX_GRID})"),
        )
        return next((reason for refused, reason in reasons if refused), None)

    def recipe(self, call: AttentionCall) -> Recipe:
        """What this call computes, for comparison with `reference.quantized_attention`.

        Of rows that warpgroups share (Int8Sm90Form.share) key_shares is their number instead of 1.
        """
        form = self._form(call)
        return replace(
            RECIPES["int8"],
            key_block=form.keys,
            int8_rows=(1, form.keys),
            quantized_row_sum=form.ones,
            rescale_threshold=float(form.headroom),
            linear_exp_of_8=form.line,
        )

    def plan(self, call: AttentionCall) -> LaunchPlan:
        """Smooth and quantise in one launch, attend in one; rows that 16-byte loads can't read are copied first."""
        form, output = self._form(call), OutputForm.of(call)
        batch, heads, kv_heads, rows = call.batch, call.heads, call.kv_heads, call.query_length
        query_rows, key_blocks = -(-rows // form.rows) * form.rows, -(-call.key_length // form.keys)
        workspace = _workspace(call, form, query_rows, key_blocks)
        if batch * heads * rows == 0:
            return LaunchPlan(output, workspace, None, None)
        operands = {"query": call.query, "key": call.key, "value": call.value}
        copied = {name: x.dtype == torch.float32 or not has_aligned_rows(x) for name, x in operands.items()}
        strides = {
            f"{name}_strides": (copied_strides(x) if copied[name] else x.stride())[:3] for name, x in operands.items()
        }
        is_bfloat16 = output.kernel_dtype == torch.bfloat16
        parameters = _Parameters(
            **strides,
            output_strides=output.strides,
            batch=batch,
            heads=heads,
            kv_heads=kv_heads,
            query_length=rows,
            key_length=call.key_length,
            head_dim=call.head_dim,
            query_rows=query_rows,
            key_blocks=key_blocks,
            is_causal=call.is_causal,
            is_bfloat16=is_bfloat16,
            softmax_scale=call.scale,
        )
        preparation, attention = _load(form, is_bfloat16, call.device)
        prepare_blocks = 2 * _CLUSTER * batch * kv_heads
        if not call.return_lse:
            prepare_blocks += -(-batch * heads * -(-query_rows // form.keys) // _CLUSTER) * _CLUSTER
        offsets = workspace.offsets()
        prepare = LaunchSequence(
            ((preparation, prepare_blocks),),
            ParameterTemplate(parameters, offsets, ("query", "key", "value", "key_lengths", None)),
        )
        processors = _multiprocessors(attention.device_index)
        blocks = batch * heads * -(-rows // form.rows)
        if not call.is_causal and blocks <= self.even_share_turns * processors:
            parameters.even_shares = 1
            blocks = batch * heads * -(-rows // _UNIT_ROWS)
        run = LaunchSequence(
            ((attention, min(blocks, processors)),),
            ParameterTemplate(parameters, offsets, ("output", "lse", "key_lengths", None)),
        )
        return LaunchPlan(output, workspace, prepare, run, (copied["query"], copied["key"], copied["value"]))

    def prepare(self, call: AttentionCall) -> PreparedLaunch:
        """The plan's first half."""
        return planned(self, call).prepare_call(call)

    def run(self, state: Any) -> tuple[Tensor, Tensor | None]:
        """The plan's second half."""
        prepared: PreparedLaunch = state
        return prepared.plan.run(prepared)

    def _form(self, call: AttentionCall) -> Int8Sm90Form:
        return next(form for form in self.forms if form.serves(call.head_dim, call.key_length))


def _workspace(call: AttentionCall, form: Int8Sm90Form, query_rows: int, key_blocks: int) -> WorkspaceLayout:
    """What preparation hands to the attention, named as the fields of the parameters."""
    query, kv_heads = (call.batch, call.heads, query_rows), (call.batch, call.kv_heads)
    codes = (*kv_heads, key_blocks, form.keys, form.head_dim)
    channels = ((*kv_heads, form.head_dim), torch.float32)
    return WorkspaceLayout(
        {
            "query_codes": ((*query, form.head_dim), torch.int8),
            "key_codes": (codes, torch.int8),
            "value_codes": (codes, torch.int8),
            "query_scale": (query, torch.float32),
            "key_scale": ((*kv_heads, key_blocks), torch.float32),
            "key_mean": channels,
            "value_scale": channels,
            "value_mean": channels,
            "value_error": channels,
            "lse_shift": (query, torch.float32) if call.return_lse else None,
        }
    )


@lru_cache
def _load(form: Int8Sm90Form, is_bfloat16: bool, device: torch.device) -> tuple[LoadedKernel, LoadedKernel]:
    preparation = load_kernel(int8_sm90_prepare_variant(form.head_dim, form.keys, is_bfloat16), device)
    return preparation, load_kernel(int8_sm90_attention_variant(form), device)


@lru_cache
def _multiprocessors(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


KERNEL = Int8Sm90Kernel()
