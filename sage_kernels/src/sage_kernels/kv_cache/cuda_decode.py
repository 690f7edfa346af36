"""Launches of csrc/kv_cache_decode.cu: what their form decides is worked out once, a call then only adds addresses."""

import ctypes
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from sage_kernels.architectures import device_architecture
from sage_kernels.cubin_loader import load_kernel, loading_obstacle
from sage_kernels.kernel_variants import KV_CACHE_ROWS, kv_cache_variant
from sage_kernels.kv_cache.storage import MAX_SPLITS, CachedOperand
from sage_kernels.launch_plan import LaunchSequence, ParameterTemplate, WorkspaceLayout

_DTYPES = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2}
_MOST_ROWS = 64  # that share a key head; beyond, every block of rows would read the cache again
_LEAST_KEYS = 256  # of a block: two steps of each of its warps
# Blocks of a multiprocessor by head_dim and rows, as __launch_bounds__ has them; one fewer from _ONE_FEWER on.
_ONE_FEWER = 12  # major compute capability
_RESIDENT = {(64, 8): 4, (64, 16): 3, (128, 8): 3, (128, 16): 2}
_ENOUGH = 0.9  # of the GPU filled: more splits would only make more to combine


class _Parameters(ctypes.Structure):
    """csrc/kv_cache_params.cuh."""

    _fields_ = (
        *((name, ctypes.c_uint64) for name in ("query", "lengths")),
        *((name, ctypes.c_uint64) for name in ("key_codes", "key_scales", "key_means", "key_factors")),
        *((name, ctypes.c_uint64) for name in ("value_codes", "value_scales", "value_means", "value_factors")),
        *((name, ctypes.c_uint64) for name in ("signs", "partial", "partial_lse", "arrivals", "output", "lse")),
        ("query_strides", ctypes.c_int64 * 3),
        *((name, ctypes.c_int32) for name in ("heads", "kv_heads", "query_length", "rows")),
        *((name, ctypes.c_int32) for name in ("padded_capacity", "splits", "group", "is_causal", "dtype")),
        ("softmax_scale", ctypes.c_float),
    )


class DecodeForm(NamedTuple):
    """What decides the launches of a call; a tuple, because each call asks for its hash.

    Attributes:
        shape, strides, dtype: of the query [B, H, Nq, D]; its last axis is dense.
        kv_heads, padded_capacity, group: of the cache.
        scale, is_causal, splits: as in KVCache.attend().
        device: of all tensors.
    """

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype
    kv_heads: int
    padded_capacity: int
    group: int
    scale: float
    is_causal: bool
    splits: int | None
    device: torch.device


def serves(device: torch.device, head_dim: int, rows: int) -> bool:
    """Whether the kernel takes so many query rows for each key head, and runs on this device."""
    return 1 <= rows <= _MOST_ROWS and _is_loadable(device, head_dim)


def empty_arrivals(batch: int, kv_heads: int, device: torch.device) -> Tensor:
    """What the blocks of a call count themselves in."""
    return torch.zeros(batch * kv_heads * (_MOST_ROWS // KV_CACHE_ROWS[-1]), dtype=torch.int32, device=device)


@lru_cache
def _is_loadable(device: torch.device, head_dim: int) -> bool:
    architecture = device_architecture(device)
    if architecture is None:
        return False
    variant = kv_cache_variant(head_dim, KV_CACHE_ROWS[0])
    return architecture.target in variant.archs and loading_obstacle(variant, architecture.target) is None


def attend(
    q: Tensor,
    key: CachedOperand,
    value: CachedOperand,
    lengths: Tensor,
    signs: Tensor | None,
    arrivals: Tensor,
    scale: float,
    is_causal: bool,
    splits: int | None,
) -> tuple[Tensor, Tensor]:
    """One launch; output [B, H, Nq, D] in q's dtype, LSE float32 [B, H, Nq].

    Args:
        q: not rotated, last axis dense, at least one number.
        signs: float32 [D], by which a rotated cache's queries are rotated.
        arrivals: from empty_arrivals(); not of a call that another stream runs.
        key, value, lengths, scale, is_causal, splits: as in `launch.attend`.
    """
    shape, codes = q.shape, key.codes.shape
    group = shape[3] // key.scales.shape[3]
    launches, workspace_bytes = _plan(
        DecodeForm(shape, q.stride()[:3], q.dtype, codes[1], codes[2], group, scale, is_causal, splits, q.device)
    )
    output = torch.empty(shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(shape[:3], dtype=torch.float32, device=q.device)
    workspace = torch.empty(workspace_bytes, dtype=torch.uint8, device=q.device)
    launches.start(
        workspace.data_ptr(),
        *(q.data_ptr(), lengths.data_ptr()),
        *(key.codes.data_ptr(), key.scales.data_ptr(), key.means.data_ptr(), key.head_scales.data_ptr()),
        *(value.codes.data_ptr(), value.scales.data_ptr(), value.means.data_ptr(), value.head_scales.data_ptr()),
        *(0 if signs is None else signs.data_ptr(), arrivals.data_ptr(), output.data_ptr(), lse.data_ptr()),
    )
    return output, lse


@lru_cache(maxsize=256)
def _plan(form: DecodeForm) -> tuple[LaunchSequence, int]:
    """The launches of all calls of one form, and the bytes of their workspace."""
    batch, heads, query_length, head_dim = form.shape
    group_rows = heads // form.kv_heads * query_length
    block_rows = next((rows for rows in KV_CACHE_ROWS if group_rows <= rows), KV_CACHE_ROWS[-1])
    blocks = batch * form.kv_heads * -(-group_rows // block_rows)
    properties = torch.cuda.get_device_properties(form.device)
    resident = _RESIDENT[head_dim, block_rows] - (properties.major >= _ONE_FEWER)
    slots = properties.multi_processor_count * resident
    splits = form.splits or choose_splits(blocks, form.padded_capacity, slots)
    rows = batch * heads * query_length
    parts = splits if splits > 1 else 0
    layout = WorkspaceLayout(
        {"partial": ((parts, rows, head_dim), torch.float32), "partial_lse": ((parts, rows), torch.float32)}
    )
    parameters = _Parameters(
        query_strides=form.strides,
        heads=heads,
        kv_heads=form.kv_heads,
        query_length=query_length,
        rows=rows,
        padded_capacity=form.padded_capacity,
        splits=splits,
        group=form.group,
        is_causal=form.is_causal,
        dtype=_DTYPES[form.dtype],
        softmax_scale=form.scale,
    )
    operands = ("codes", "scales", "means", "factors")
    names = ("query", "lengths", *(f"{x}_{name}" for x in ("key", "value") for name in operands))
    template = ParameterTemplate(parameters, layout.offsets(), (*names, "signs", "arrivals", "output", "lse"))
    kernel = load_kernel(kv_cache_variant(head_dim, block_rows), form.device)
    return LaunchSequence(((kernel, blocks * splits),), template), layout.size


def choose_splits(blocks: int, capacity: int, slots: int) -> int:
    """Into how many parts the keys of `blocks` are divided.

    Args:
        blocks: of one part.
        capacity: keys of a sequence at most.
        slots: blocks that the GPU runs at a time.
    """
    most = max(1, min(MAX_SPLITS, capacity // _LEAST_KEYS, -(-2 * slots // blocks)))

    choices = range(1, most + 1)
    filled = [blocks * splits / (-(-blocks * splits // slots) * slots) for splits in choices]
    enough = (splits for splits, share in zip(choices, filled, strict=True) if share >= _ENOUGH)
    return next(enough, 1 + filled.index(max(filled)))
