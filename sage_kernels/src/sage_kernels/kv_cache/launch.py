"""Launches of the cache's Triton kernels: grids, block sizes, how many splits."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch
import triton
from torch import Tensor

from sage_kernels.kv_cache import triton_append, triton_decode
from sage_kernels.kv_cache.storage import MAX_SPLITS, MEAN_TOKENS, TOP_EXPONENT, CachedOperand

_APPEND_BLOCK = 16
_BEGIN_BLOCK = 64
_ADVANCE_BLOCK = 32
_COMBINE_STEP = 16
# Splits fill the GPU with this many programs a processor where each keeps enough keys to be worth its start and its
# share of the second launch; where it doesn't, fewer programs do, but not fewer than the second number.
_PROGRAMS_PER_PROCESSOR = (8, 2)
_KEYS_PER_SPLIT = 2048


@dataclass(frozen=True)
class DecodeConfig:
    """Sizes of the decode kernel: keys a step, warps of a program, tiles in flight, PTX or plain unpacking."""

    block_n: int = 64
    num_warps: int = 2
    num_stages: int = 3
    ptx: bool = True


DEFAULT_CONFIG = DecodeConfig()  # the fastest of those tried on an H100: fewer warps wait less for each other
MANY_ROWS_CONFIG = DecodeConfig(num_warps=4)  # whose accumulators two warps have no registers for
INTERPRETED = DecodeConfig(ptx=False)


def append(
    key: CachedOperand,
    value: CachedOperand,
    k: Tensor,
    v: Tensor,
    counts: Tensor | None,
    lengths: Tensor,
    written: Tensor,
    rotation: Tensor | None,
    capacity: int,
    rolling: bool,
) -> None:
    """Two launches for a few tokens, three for more; arguments as in `reference.append`, k and v of any strides."""
    k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (k, v))
    batch, heads, tokens, head_dim = k.shape
    blocks = triton.cdiv(tokens, _APPEND_BLOCK)
    has_counts = int(counts is not None)
    lengths_or_counts = lengths if counts is None else counts
    matrix = key.means if rotation is None else rotation
    strides = (*k.stride()[:3], *v.stride()[:3])
    meta = {"HEAD_DIM": head_dim, "LEAST": MEAN_TOKENS, "TOP": TOP_EXPONENT, "ROTATE": rotation is not None}
    with _on_device(k.device):
        if blocks > 1:
            triton_append.begin_sequences[(batch * heads, 2)](
                *(k, v, lengths_or_counts, lengths, matrix),
                *(key.means, key.head_scales, value.means, value.head_scales, *strides, heads, tokens, has_counts),
                BLOCK=_BEGIN_BLOCK,
                num_warps=8,
                **meta,
            )
        triton_append.append_tokens[(blocks, batch * heads, 2)](
            *(k, v, lengths_or_counts, lengths, written, matrix),
            *(key.means, key.head_scales, value.means, value.head_scales),
            *(key.codes, key.scales, value.codes, value.scales, *strides),
            *(heads, tokens, capacity, key.codes.shape[2], has_counts, int(rolling)),
            GROUP=head_dim // key.scales.shape[-1],
            BLOCK=_APPEND_BLOCK,
            BEGIN=blocks == 1,
            **meta,
        )
        triton_append.advance[(triton.cdiv(batch, _ADVANCE_BLOCK),)](
            *(lengths_or_counts, lengths, written, batch, tokens, capacity, has_counts, int(rolling)),
            BLOCK=_ADVANCE_BLOCK,
            num_warps=1,
        )


def attend(
    q: Tensor,
    key: CachedOperand,
    value: CachedOperand,
    lengths: Tensor,
    capacity: int,
    scale: float,
    is_causal: bool,
    splits: int | None,
    config: DecodeConfig | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Two launches; output [B, H, Nq, D] in `dtype` (None: q's), LSE float32 [B, H, Nq]."""
    q = q if q.stride(-1) == 1 else q.contiguous()
    batch, heads, query_length, head_dim = q.shape
    kv_heads = key.codes.shape[1]
    group_heads = heads // kv_heads
    output = q.new_empty(q.shape, dtype=dtype)
    lse = q.new_empty((batch, heads, query_length), dtype=torch.float32)
    if output.numel() == 0:
        return output, lse
    rows = group_heads * query_length
    block_m = 16 if rows <= 16 else 64
    row_blocks = triton.cdiv(rows, block_m)
    config = config or (DEFAULT_CONFIG if block_m == 16 else MANY_ROWS_CONFIG)
    if splits is None:
        splits = _choose_splits(batch * kv_heads * row_blocks, capacity, _processors(q.device), config.block_n)
    partial_outputs = q.new_empty((splits, *q.shape), dtype=torch.float32)
    partial_lse = q.new_empty((splits, *lse.shape), dtype=torch.float32)
    with _on_device(q.device):
        triton_decode.attend_split[(splits, batch * kv_heads, row_blocks)](
            *(q, lengths, key.codes, key.scales, key.means, key.head_scales, value.codes, value.scales),
            *(partial_outputs, partial_lse, scale, *q.stride()[:3]),
            *(heads, group_heads, query_length, key.codes.shape[2], splits),
            HEAD_DIM=head_dim,
            GROUP=head_dim // key.scales.shape[-1],
            BLOCK_M=block_m,
            BLOCK_N=config.block_n,
            CAUSAL=is_causal,
            PTX=config.ptx,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )
        triton_decode.combine_splits[(lse.numel(),)](
            *(partial_outputs, partial_lse, value.means, value.head_scales, output, lse),
            *(lse.numel(), group_heads, query_length, splits),
            HEAD_DIM=head_dim,
            MAX_SPLITS=MAX_SPLITS,
            STEP=_COMBINE_STEP,
            num_warps=2,
        )
    return output, lse


def _choose_splits(programs: int, capacity: int, processors: int, block_n: int) -> int:
    most, least = (triton.cdiv(each * processors, programs) for each in _PROGRAMS_PER_PROCESSOR)
    wanted = min(most, max(least, triton.cdiv(capacity, _KEYS_PER_SPLIT)), triton.cdiv(capacity, block_n))
    return int(max(1, min(wanted, MAX_SPLITS)))


@lru_cache
def _processors(device: torch.device) -> int:
    if device.type != "cuda":
        return 1
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


@contextlib.contextmanager
def _on_device(device: torch.device) -> Iterator[None]:
    with torch.cuda.device(device if device.type == "cuda" else -1):
        yield
