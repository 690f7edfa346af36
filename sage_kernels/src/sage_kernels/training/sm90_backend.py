"""Trainable attention in CUDA for sm_90a: csrc/training_sm90_*.cu.

Two kernels prepare what the others multiply, among it tiles that one copy brings to shared memory as the tensor cores
read them. S is in INT8 in both passes, P V in the forward pass; P^T dO, dS^T Q and dS K keep 16 bits, as dP does. In
INT8 the first two cost as many instructions for codes and scales as the tensor cores save, and dQ would need a kernel
of its own, which computes P and dS again.
"""

import ctypes
from dataclasses import replace
from functools import lru_cache

import torch
from torch import Tensor

from sage_kernels.architectures import device_architecture
from sage_kernels.cubin_loader import LoadedKernel, load_kernel, loading_obstacle
from sage_kernels.driver import TENSOR_MAP, cuda_driver
from sage_kernels.kernel_variants import (
    TRAINING_SM90_ENTRIES,
    TRAINING_SM90_KEYS,
    KernelVariant,
    training_sm90_variant,
)
from sage_kernels.kernels.tensor_layout import has_aligned_rows
from sage_kernels.training.recipe import RECIPES, TrainingRecipe
from sage_kernels.training.saved import Saved

_TARGET = "sm_90a"
_HEAD_DIMS = (64, 128)  # padded
_HEAD_DIM_STEP = 8
_QUERIES = 128  # of a thread block of the forward pass
_QUERY_TILE = 64
_QUERY_TILES = 2  # of a thread block that prepares
_ROW_FLOATS = 324  # kRowFloats of csrc/training_sm90_rows.cuh


class _Parameters(ctypes.Structure):
    """csrc/training_sm90.cuh."""

    _fields_ = (
        *((name, TENSOR_MAP) for name in ("d_output", "value", "query_16bit", "key_16bit")),
        *((name, ctypes.c_uint64) for name in ("query", "rows", "key", "key_scales", "query_sums", "d_key", "d_value")),
        *((name, ctypes.c_int32) for name in ("heads", "kv_heads", "query_length", "key_length")),
        *((name, ctypes.c_int32) for name in ("query_tiles", "key_tiles", "head_dim", "is_causal")),
        ("softmax_scale", ctypes.c_float),
        ("query_sign", ctypes.c_float),
        ("unused", ctypes.c_uint64 * 4),
    )


class _ForwardParameters(ctypes.Structure):
    """TrainForwardParams of csrc/training_sm90_forward.cu."""

    _fields_ = (
        *((name, ctypes.c_uint64) for name in ("query", "key", "value_transposed")),
        *((name, ctypes.c_uint64) for name in ("query_scales", "key_scales", "value_scales", "output", "lse")),
        ("output_strides", ctypes.c_int64 * 3),
        *((name, ctypes.c_int32) for name in ("heads", "kv_heads", "query_length", "key_length")),
        *((name, ctypes.c_int32) for name in ("query_tiles", "key_tiles", "head_dim", "is_causal")),
        ("softmax_scale", ctypes.c_float),
    )


class _QuantizeParameters(ctypes.Structure):
    """TrainQuantizeParams of csrc/training_sm90_quantize.cu."""

    _fields_ = (
        *((name, ctypes.c_uint64) for name in ("query", "key", "value", "sums", "query_codes", "query_scales")),
        *((name, ctypes.c_uint64) for name in ("key_codes", "key_scales", "key_16bit", "value_codes", "value_scales")),
        *((name, ctypes.c_int64 * 3) for name in ("query_strides", "key_strides", "value_strides")),
        *((name, ctypes.c_int32) for name in ("batch", "heads", "kv_heads", "query_length", "key_length")),
        *((name, ctypes.c_int32) for name in ("query_tiles", "key_tiles", "head_dim", "pieces")),
        ("query_sign", ctypes.c_float),
    )


class _RowsParameters(ctypes.Structure):
    """TrainRowsParams of csrc/training_sm90_rows.cu."""

    _fields_ = (
        *((name, ctypes.c_uint64) for name in ("d_output", "output", "query_scales", "lse")),
        *((name, ctypes.c_uint64) for name in ("key_scales", "value_scales", "rows")),
        *((name, ctypes.c_int64 * 3) for name in ("d_output_strides", "output_strides")),
        *((name, ctypes.c_int32) for name in ("heads", "kv_heads", "query_length", "query_tiles", "key_tiles")),
        ("head_dim", ctypes.c_int32),
    )


class _QueryParameters(ctypes.Structure):
    """TrainQueryParams of csrc/training_sm90_query.cu."""

    _fields_ = (
        *((name, ctypes.c_uint64) for name in ("query_sums", "rows", "d_query")),
        *((name, ctypes.c_int32) for name in ("query_length", "query_tiles", "head_dim")),
        ("factor", ctypes.c_float),
    )


def serves(device: torch.device, head_dim: int, block_d: int, dtype: torch.dtype, precision: str) -> bool:
    """Whether these kernels compute a call, whose axes are not empty; Triton's do where not."""
    architecture = device_architecture(device)
    if precision != "int8" or architecture is None or architecture.target != _TARGET:
        return False
    if block_d not in _HEAD_DIMS or head_dim % _HEAD_DIM_STEP != 0:
        return False
    return all(loading_obstacle(variant, _TARGET) is None for variant in _variants(block_d, dtype))


def recipe() -> TrainingRecipe:
    """What these kernels compute, for comparison with the reference."""
    return replace(RECIPES["int8"], exact=frozenset({"dp", "dv", "dk", "dq"}), rounds=True)


def attend(
    saved: Saved,
    value_codes: Tensor,
    value_scales: Tensor,
    output: Tensor,
    key_length: int,
    is_causal: bool,
    scale: float,
) -> None:
    """Fill `output` [B, H, Nq, D] (last axis contiguous) and saved.lse from swizzled tiles; value_codes transposed."""
    if output.data_ptr() % 4 or any(stride % 2 for stride in output.stride()[:3]):  # the kernel stores pairs
        aligned = torch.empty_like(output, memory_format=torch.contiguous_format)
        attend(saved, value_codes, value_scales, aligned, key_length, is_causal, scale)
        output.copy_(aligned)
        return
    batch, heads, query_length, head_dim = output.shape
    block_d = saved.query.shape[2]
    query_tiles, key_tiles = saved.query_scales.shape[1], saved.key_scales.shape[1]
    parameters = _ForwardParameters(
        query=saved.query.data_ptr(),
        key=saved.key.data_ptr(),
        value_transposed=value_codes.data_ptr(),
        query_scales=saved.query_scales.data_ptr(),
        key_scales=saved.key_scales.data_ptr(),
        value_scales=value_scales.data_ptr(),
        output=output.data_ptr(),
        lse=saved.lse.data_ptr(),
        output_strides=output.stride()[:3],
        heads=heads,
        kv_heads=saved.key.shape[0] // batch,
        query_length=query_length,
        key_length=key_length,
        query_tiles=query_tiles,
        key_tiles=key_tiles,
        head_dim=head_dim,
        is_causal=is_causal,
        softmax_scale=abs(scale),
    )
    kernel = _load(block_d, output.dtype, output.device)["training_sm90_forward"]
    kernel.launch((batch * heads * -(-query_length // _QUERIES), 1, 1), parameters)


def quantize(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sums: Tensor,
    saved: Saved,
    value_codes: Tensor,
    value_scales: Tensor,
    query_sign: float,
) -> None:
    """Fill `saved` but for its LSE, and the codes and scales of V.

    Args:
        q, k, v: [B, H, Nq, D] and [B, Hkv, Nk, D].
        sums: float32 [B * Hkv, pieces, block_d]: of K's channels over pieces of it.
        saved, value_codes, value_scales: what to fill.
        query_sign: of the softmax scale; it goes into the codes of Q.
    """
    q, k, v = (_with_aligned_rows(x) for x in (q, k, v))
    batch, heads, query_length, head_dim = q.shape
    kv_heads, key_length = k.shape[1:3]
    query_tiles, key_tiles = saved.query_scales.shape[1], saved.key_scales.shape[1]
    tensors = {
        "query": q,
        "key": k,
        "value": v,
        "sums": sums,
        "query_codes": saved.query,
        "query_scales": saved.query_scales,
        "key_codes": saved.key,
        "key_scales": saved.key_scales,
        "key_16bit": saved.key_16bit,
        "value_codes": value_codes,
        "value_scales": value_scales,
    }
    parameters = _QuantizeParameters(
        **{name: x.data_ptr() for name, x in tensors.items()},
        query_strides=q.stride()[:3],
        key_strides=k.stride()[:3],
        value_strides=v.stride()[:3],
        batch=batch,
        heads=heads,
        kv_heads=kv_heads,
        query_length=query_length,
        key_length=key_length,
        query_tiles=query_tiles,
        key_tiles=key_tiles,
        head_dim=head_dim,
        pieces=sums.shape[1],
        query_sign=query_sign,
    )
    blocks = 2 * batch * kv_heads * key_tiles + batch * heads * -(-query_tiles // _QUERY_TILES)
    _load(saved.query.shape[2], q.dtype, q.device)["training_sm90_quantize"].launch((blocks, 1, 1), parameters)


def prepare_rows(d_output: Tensor, output: Tensor, saved: Saved) -> Tensor:
    """What csrc/training_sm90_rows.cuh says of queries: float32 [B * H * query_tiles, _ROW_FLOATS]."""
    d_output, output = (_with_aligned_rows(x) for x in (d_output, output))
    batch, heads, query_length, head_dim = output.shape
    query_tiles = saved.query_scales.shape[1]
    rows = saved.lse.new_empty((batch * heads * query_tiles, _ROW_FLOATS))
    parameters = _RowsParameters(
        d_output=d_output.data_ptr(),
        output=output.data_ptr(),
        query_scales=saved.query_scales.data_ptr(),
        lse=saved.lse.data_ptr(),
        key_scales=saved.key_scales.data_ptr(),
        value_scales=saved.value_scales.data_ptr(),
        rows=rows.data_ptr(),
        d_output_strides=d_output.stride()[:3],
        output_strides=output.stride()[:3],
        heads=heads,
        kv_heads=saved.key.shape[0] // batch,
        query_length=query_length,
        query_tiles=query_tiles,
        key_tiles=saved.key_scales.shape[1],
        head_dim=head_dim,
    )
    blocks = batch * heads * -(-query_tiles // _QUERY_TILES)
    _load(saved.query.shape[2], output.dtype, output.device)["training_sm90_rows"].launch((blocks, 1, 1), parameters)
    return rows


def _with_aligned_rows(x: Tensor) -> Tensor:
    return x if has_aligned_rows(x) else x.clone(memory_format=torch.contiguous_format)


def _mappable(x: Tensor) -> Tensor:
    """x, or a copy where its strides are not those that tensor maps can have."""
    steps = [stride for stride, size in zip(x.stride()[:3], x.shape[:3], strict=True) if size > 1]
    is_aligned = x.data_ptr() % 16 == 0 and all(stride > 0 and stride % 8 == 0 for stride in steps)
    return x if x.stride(3) == 1 and is_aligned else x.contiguous()


def _tensor_map(x: Tensor) -> "ctypes.Array[ctypes.c_uint64]":
    """Of [B, H, N, D] in 16 bits, for boxes of 64 rows and 64 channels, swizzled."""
    batch, heads, rows, head_dim = x.shape
    strides = [2 * (stride if size > 1 else head_dim) for stride, size in zip(x.stride(), x.shape, strict=True)]
    return cuda_driver().tensor_map(x.data_ptr(), (head_dim, rows, heads, batch), strides[2::-1], (64, 64, 1, 1))


def backward(
    d_output: Tensor, q: Tensor, v: Tensor, output: Tensor, saved: Saved, is_causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """dQ [B, H, Nq, D], dK and dV [B, Hkv, Nk, D], contiguous, in the dtype of `v`; no axis is empty."""
    batch, heads, query_length, head_dim = output.shape
    kv_heads, key_length = v.shape[1:3]
    query_tiles, key_tiles = saved.query_scales.shape[1], saved.key_scales.shape[1]
    block_d = saved.query.shape[2]
    d_query = torch.empty(output.shape, dtype=v.dtype, device=v.device)
    d_key, d_value = (torch.empty(v.shape, dtype=v.dtype, device=v.device) for _ in range(2))
    # Thread blocks add up dQ as integers, so that the order in which they do so does not matter.
    query_sums = torch.zeros((batch * heads * query_tiles, _QUERY_TILE, block_d), dtype=torch.int32, device=v.device)
    d_output, q, v = _mappable(d_output), _mappable(q), _mappable(v)
    rows = prepare_rows(d_output, output, saved)
    tensors = {
        "query": saved.query,
        "rows": rows,
        "key": saved.key,
        "key_scales": saved.key_scales,
        "query_sums": query_sums,
        "d_key": d_key,
        "d_value": d_value,
    }
    parameters = _Parameters(
        d_output=_tensor_map(d_output),
        value=_tensor_map(v),
        query_16bit=_tensor_map(q),
        key_16bit=_tensor_map(saved.key_16bit.view(batch, kv_heads, -1, block_d)),
        **{name: x.data_ptr() for name, x in tensors.items()},
        heads=heads,
        kv_heads=kv_heads,
        query_length=query_length,
        key_length=key_length,
        query_tiles=query_tiles,
        key_tiles=key_tiles,
        head_dim=head_dim,
        is_causal=is_causal,
        softmax_scale=abs(scale),
        query_sign=-1.0 if scale < 0 else 1.0,
    )
    kernels = _load(block_d, v.dtype, v.device)
    key_blocks = -(-key_tiles * RECIPES["int8"].key_tile // TRAINING_SM90_KEYS[block_d])
    kernels["training_sm90_gradients"].launch((batch * kv_heads * key_blocks, 1, 1), parameters)
    query_parameters = _QueryParameters(
        query_sums=query_sums.data_ptr(),
        rows=rows.data_ptr(),
        d_query=d_query.data_ptr(),
        query_length=query_length,
        query_tiles=query_tiles,
        head_dim=head_dim,
        factor=scale,
    )
    kernels["training_sm90_query"].launch((batch * heads * query_tiles, 1, 1), query_parameters)
    return d_query, d_key, d_value


def _variants(block_d: int, dtype: torch.dtype) -> tuple[KernelVariant, ...]:
    return tuple(training_sm90_variant(entry, block_d, dtype == torch.bfloat16) for entry in TRAINING_SM90_ENTRIES)


@lru_cache
def _load(block_d: int, dtype: torch.dtype, device: torch.device) -> dict[str, LoadedKernel]:
    return {variant.entry: load_kernel(variant, device) for variant in _variants(block_d, dtype)}
