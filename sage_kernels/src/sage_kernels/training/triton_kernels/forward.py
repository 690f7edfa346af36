"""Forward pass: Q K^T and P V in 8 bits, online softmax, LSE in units of log2 for the backward pass."""

import triton
import triton.language as tl

from sage_kernels.training.triton_kernels.numbers import (
    INF,
    LOG2E,
    multiply,
    permute_columns,
    round_codes,
)


@triton.jit
def _walk(
    accumulator,
    row_sum,
    row_max,
    q,
    query_factor,
    key_codes,
    key_scales,
    value_codes,
    value_scales,
    rows,
    key_length,
    first,
    last,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    KEY_TILE: tl.constexpr,
    EDGE: tl.constexpr,
    CAUSAL: tl.constexpr,
    FP8: tl.constexpr,
):
    """Online softmax over key blocks first to last - 1; EDGE blocks may hold keys that some row must not see."""
    lanes = tl.arange(0, BLOCK_N)
    columns = tl.arange(0, BLOCK_D)
    log2_limit: tl.constexpr = 8.807354922057604 if FP8 else 6.988684686772166
    for block in range(first, last):
        start = block * BLOCK_N
        tile = start // KEY_TILE
        k = tl.load(key_codes + start.to(tl.int64) * BLOCK_D + (lanes[None, :] * BLOCK_D + columns[:, None]))
        factor = query_factor * tl.load(key_scales + tile)
        scores = multiply(q, k, FP8).to(tl.float32)
        # The block's largest weight becomes the largest code: its scale is known without looking for a maximum.
        if EDGE:
            keys = start + lanes
            visible = (keys < key_length)[None, :]
            if CAUSAL:
                visible = visible & (keys[None, :] <= rows[:, None])
            scores = tl.where(visible, scores * factor[:, None], -INF)
            local_max = tl.max(scores, 1)
            shift = tl.where(local_max == -INF, 0.0, local_max)
            weights = tl.math.exp2(scores - (shift - log2_limit)[:, None])
        else:
            local_max = tl.max(scores, 1) * factor
            weights = tl.math.exp2(scores * factor[:, None] - (local_max - log2_limit)[:, None])
        new_max = tl.maximum(row_max, local_max)
        rescale = tl.math.exp2(row_max - new_max)
        weight_scale = tl.math.exp2(local_max - new_max - log2_limit)
        row_sum = row_sum * rescale + tl.sum(weights, 1) * weight_scale
        p = permute_columns(round_codes(weights, FP8), BLOCK_M, BLOCK_N)
        place = value_codes + tile.to(tl.int64) * (KEY_TILE * BLOCK_D)
        if BLOCK_N != KEY_TILE:
            place += tl.multiple_of(start % KEY_TILE, BLOCK_N)
        v = tl.load(place + (lanes[:, None] + columns[None, :] * KEY_TILE))
        output_scale = weight_scale * tl.load(value_scales + tile)
        product = multiply(p, v, FP8).to(tl.float32)
        accumulator = accumulator * rescale[:, None] + product * output_scale[:, None]
        row_max = new_max
    return accumulator, row_sum, row_max


@triton.jit(do_not_specialize=["heads", "kv_heads", "query_length", "key_length", "query_tiles", "key_tiles", "blocks"])
def attend(
    query_codes,
    query_scales,
    key_codes,
    key_scales,
    value_codes,
    value_scales,
    output,
    lse,
    softmax_scale,
    heads,
    kv_heads,
    query_length,
    key_length,
    query_tiles,
    key_tiles,
    blocks,
    output_batch_stride,
    output_head_stride,
    output_row_stride,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    QUERY_TILE: tl.constexpr,
    KEY_TILE: tl.constexpr,
    CAUSAL: tl.constexpr,
    FP8: tl.constexpr,
):
    """softmax(Q K^T * softmax_scale) V for BLOCK_M rows of one head; LSE of log2, infinite in rows of padding."""
    program = tl.program_id(0)
    block, head = program % blocks, (program // blocks).to(tl.int64)
    if CAUSAL:  # the longest first, so that no long one is left for the end
        block = blocks - 1 - block
    kv_head = head // heads * kv_heads + head % heads // (heads // kv_heads)
    rows = block * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.arange(0, BLOCK_D)
    padded_length = query_tiles * QUERY_TILE
    inside = rows < padded_length
    query_codes += head * padded_length * BLOCK_D
    stored_rows = tl.minimum(rows, padded_length - 1)
    q = tl.load(query_codes + (stored_rows[:, None] * BLOCK_D + columns[None, :]))
    query_factor = tl.load(query_scales + head * query_tiles + stored_rows // QUERY_TILE)
    query_factor *= softmax_scale * LOG2E
    key_base = kv_head * key_tiles * KEY_TILE * BLOCK_D
    key_codes += key_base
    value_codes += key_base
    key_scales += kv_head * key_tiles
    value_scales += kv_head * key_tiles
    full, last = key_length // BLOCK_N, tl.cdiv(key_length, BLOCK_N)
    if CAUSAL:
        full = tl.minimum(block * BLOCK_M + 1, key_length) // BLOCK_N
        last = tl.cdiv(tl.minimum(block * BLOCK_M + BLOCK_M, key_length), BLOCK_N)

    accumulator = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    row_max = tl.full([BLOCK_M], -INF, tl.float32)
    accumulator, row_sum, row_max = _walk(
        accumulator, row_sum, row_max, q, query_factor, key_codes, key_scales, value_codes, value_scales,
        rows, key_length, 0, full, BLOCK_D, BLOCK_M, BLOCK_N, KEY_TILE, False, CAUSAL, FP8,
    )  # fmt: skip
    accumulator, row_sum, row_max = _walk(
        accumulator, row_sum, row_max, q, query_factor, key_codes, key_scales, value_codes, value_scales,
        rows, key_length, full, last, BLOCK_D, BLOCK_M, BLOCK_N, KEY_TILE, True, CAUSAL, FP8,
    )  # fmt: skip

    output += head // heads * output_batch_stride + head % heads * output_head_stride
    offsets = rows.to(tl.int64)[:, None] * output_row_stride + columns[None, :]
    valid = rows < query_length
    result = accumulator / row_sum[:, None]
    tl.store(output + offsets, result.to(output.dtype.element_ty), mask=valid[:, None] & (columns < HEAD_DIM)[None, :])
    value = tl.where(valid, row_max + tl.math.log2(row_sum), INF)
    tl.store(lse + head * padded_length + rows, value, mask=inside)
