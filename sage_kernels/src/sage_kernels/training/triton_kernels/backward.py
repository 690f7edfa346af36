"""Backward pass: one kernel for dK and dV, which walks over queries, and one for dQ, which walks over keys.

Both compute the scores and dP again, so that nothing is added up across programs: results don't depend on their order.
"""

import triton
import triton.language as tl

from sage_kernels.training.triton_kernels.numbers import (
    LOG2E,
    limit,
    multiply,
    permute_columns,
    round_codes,
)

_SIZES = ["heads", "kv_heads", "query_length", "key_length", "query_tiles", "key_tiles", "blocks"]


@triton.jit
def _row_codes(x, absmax, ROWS: tl.constexpr, COLUMNS: tl.constexpr, FP8: tl.constexpr):
    """Codes of [ROWS, COLUMNS] with a scale for each row, as the left operand of an MMA, and the scales."""
    inverse = tl.where(absmax > 0, limit(FP8) / absmax, 0.0)
    codes = round_codes(x * inverse[:, None], FP8)
    return permute_columns(codes, ROWS, COLUMNS), absmax * (1.0 / limit(FP8))


@triton.jit
def _walk_queries(
    d_key,
    d_key_high,
    d_value,
    d_value_high,
    k,
    v,
    key_factor,
    keys,
    query_codes,
    query_transposed,
    query_scales,
    d_output,
    d_output_row_stride,
    d_output_codes,
    d_output_scales,
    lse,
    delta,
    query_length,
    first,
    last,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    QUERY_TILE: tl.constexpr,
    EDGE: tl.constexpr,
    SPLIT: tl.constexpr,
    FP8: tl.constexpr,
):
    """Adds to dK and dV what query blocks first to last - 1 give; EDGE blocks hold queries that don't see all keys."""
    lanes = tl.arange(0, BLOCK_M)
    columns = tl.arange(0, BLOCK_D)
    half = tl.arange(0, BLOCK_D // 2 if SPLIT else BLOCK_D)
    for block in range(first, last):
        start = block * BLOCK_M
        rows = start + lanes
        tile = start // QUERY_TILE
        row_offset = start.to(tl.int64) * BLOCK_D
        q = tl.load(query_codes + row_offset + (lanes[None, :] * BLOCK_D + columns[:, None]))
        query_scale = tl.load(query_scales + tile)
        d_output_scale = tl.load(d_output_scales + tile)
        scores = multiply(k, q, FP8).to(tl.float32)  # transposed: [keys, queries]
        # Rows past the end are those of the last query: P is 0 there, because their LSE is infinite.
        place = d_output + start.to(tl.int64) * d_output_row_stride
        offsets = tl.minimum(lanes, query_length - 1 - start)[None, :] * d_output_row_stride + columns[:, None]
        if HEAD_DIM == BLOCK_D:
            d_out = tl.load(place + offsets)
        else:
            d_out = tl.load(place + offsets, mask=(columns < HEAD_DIM)[:, None], other=0.0)
        d_weights = tl.dot(v, d_out)
        factor = key_factor * query_scale
        weights = tl.math.exp2(scores * factor[:, None] - tl.load(lse + rows)[None, :])
        if EDGE:
            weights = tl.where(keys[:, None] <= rows[None, :], weights, 0.0)
        place = tile.to(tl.int64) * (QUERY_TILE * BLOCK_D)
        if BLOCK_M != QUERY_TILE:
            place += tl.multiple_of(start % QUERY_TILE, BLOCK_M)
        transposed = place + (lanes[:, None] + half[None, :] * QUERY_TILE)
        high: tl.constexpr = BLOCK_D // 2 * QUERY_TILE
        # Both are codes before either is multiplied: the products then take the registers of the scores.
        p, p_scale = _row_codes(weights, tl.max(weights, 1), BLOCK_N, BLOCK_M, FP8)
        d_scores = weights * (d_weights - tl.load(delta + rows)[None, :])
        ds, ds_scale = _row_codes(d_scores, tl.max(tl.abs(d_scores), 1), BLOCK_N, BLOCK_M, FP8)
        p_scale *= d_output_scale + query_scale * 0.0  # NaN where Q was not finite: maxima pass over it
        ds_scale *= query_scale + d_output_scale * 0.0
        d_value += multiply(p, tl.load(d_output_codes + transposed), FP8).to(tl.float32) * p_scale[:, None]
        if SPLIT:
            product = multiply(p, tl.load(d_output_codes + high + transposed), FP8)
            d_value_high += product.to(tl.float32) * p_scale[:, None]
        d_key += multiply(ds, tl.load(query_transposed + transposed), FP8).to(tl.float32) * ds_scale[:, None]
        if SPLIT:
            product = multiply(ds, tl.load(query_transposed + high + transposed), FP8)
            d_key_high += product.to(tl.float32) * ds_scale[:, None]
    return d_key, d_key_high, d_value, d_value_high


@triton.jit(do_not_specialize=_SIZES)
def key_value_gradients(
    query_codes,
    query_transposed,
    query_scales,
    key_codes,
    key_scales,
    value,
    d_output,
    d_output_codes,
    d_output_scales,
    lse,
    delta,
    d_key,
    d_value,
    softmax_scale,
    heads,
    kv_heads,
    query_length,
    key_length,
    query_tiles,
    key_tiles,
    blocks,
    value_batch_stride,
    value_head_stride,
    value_row_stride,
    d_output_batch_stride,
    d_output_head_stride,
    d_output_row_stride,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    QUERY_TILE: tl.constexpr,
    KEY_TILE: tl.constexpr,
    CAUSAL: tl.constexpr,
    SPLIT: tl.constexpr,
    FP8: tl.constexpr,
):
    """dK and dV of BLOCK_N keys of one head of K, contiguous [B * Hkv, Nk, HEAD_DIM]."""
    program = tl.program_id(0)
    block, kv_head = program % blocks, (program // blocks).to(tl.int64)
    batch = kv_head // kv_heads
    lanes = tl.arange(0, BLOCK_N)
    columns = tl.arange(0, BLOCK_D)
    start = block * BLOCK_N
    keys = start + lanes
    key_base = (kv_head * key_tiles * KEY_TILE + start) * BLOCK_D
    k = tl.load(key_codes + key_base + (lanes[:, None] * BLOCK_D + columns[None, :]))
    value += batch * value_batch_stride + kv_head % kv_heads * value_head_stride
    value_rows = value + tl.minimum(keys, key_length - 1).to(tl.int64) * value_row_stride
    v = tl.load(value_rows[:, None] + columns[None, :], mask=(columns < HEAD_DIM)[None, :], other=0.0)
    key_scale = tl.load(key_scales + kv_head * key_tiles + keys // KEY_TILE)
    key_factor = key_scale * (softmax_scale * LOG2E)
    query_blocks = tl.cdiv(query_length, BLOCK_M)
    first, full = 0, 0
    if CAUSAL:
        first = tl.minimum(start // BLOCK_M, query_blocks)
        full = tl.minimum(tl.cdiv(start + BLOCK_N - 1, BLOCK_M), query_blocks)

    # Halves of head_dim: an INT8 product needs registers of its own until it is added to the sum.
    width: tl.constexpr = BLOCK_D // 2 if SPLIT else BLOCK_D
    dk = tl.zeros([BLOCK_N, width], tl.float32)
    dk_high, dv, dv_high = dk, dk, dk
    group = heads // kv_heads
    for member in range(group):
        query_head = kv_head % kv_heads * group + member
        head = batch * heads + query_head
        row_base = head * query_tiles * QUERY_TILE
        d_out = d_output + batch * d_output_batch_stride + query_head * d_output_head_stride
        if CAUSAL:
            dk, dk_high, dv, dv_high = _walk_queries(
                dk, dk_high, dv, dv_high, k, v, key_factor, keys, query_codes + row_base * BLOCK_D,
                query_transposed + row_base * BLOCK_D, query_scales + head * query_tiles, d_out, d_output_row_stride,
                d_output_codes + row_base * BLOCK_D, d_output_scales + head * query_tiles, lse + row_base,
                delta + row_base, query_length, first, full,
                HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N, QUERY_TILE, True, SPLIT, FP8,
            )  # fmt: skip
        dk, dk_high, dv, dv_high = _walk_queries(
            dk, dk_high, dv, dv_high, k, v, key_factor, keys, query_codes + row_base * BLOCK_D,
            query_transposed + row_base * BLOCK_D, query_scales + head * query_tiles, d_out, d_output_row_stride,
            d_output_codes + row_base * BLOCK_D, d_output_scales + head * query_tiles, lse + row_base,
            delta + row_base, query_length, full, query_blocks,
            HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N, QUERY_TILE, False, SPLIT, FP8,
        )  # fmt: skip

    columns = tl.arange(0, width)
    offsets = (kv_head * key_length + keys)[:, None] * HEAD_DIM + columns[None, :]
    inside = (keys < key_length)[:, None] & (columns < HEAD_DIM)[None, :]
    factor = (softmax_scale + key_scale * 0.0)[:, None]
    tl.store(d_key + offsets, (dk * factor).to(d_key.dtype.element_ty), mask=inside)
    tl.store(d_value + offsets, dv.to(d_value.dtype.element_ty), mask=inside)
    if SPLIT:
        inside = (keys < key_length)[:, None] & (columns + width < HEAD_DIM)[None, :]
        tl.store(d_key + width + offsets, (dk_high * factor).to(d_key.dtype.element_ty), mask=inside)
        tl.store(d_value + width + offsets, dv_high.to(d_value.dtype.element_ty), mask=inside)


@triton.jit
def _walk_keys(
    d_query,
    q,
    d_out,
    query_factor,
    row_lse,
    row_delta,
    rows,
    key_codes,
    key_transposed,
    key_scales,
    value,
    value_row_stride,
    key_length,
    first,
    last,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    KEY_TILE: tl.constexpr,
    EDGE: tl.constexpr,
    CAUSAL: tl.constexpr,
    FP8: tl.constexpr,
):
    """Adds to dQ what key blocks first to last - 1 give; EDGE blocks may hold keys that some row must not see."""
    lanes = tl.arange(0, BLOCK_N)
    columns = tl.arange(0, BLOCK_D)
    for block in range(first, last):
        start = block * BLOCK_N
        keys = start + lanes
        tile = start // KEY_TILE
        k = tl.load(key_codes + start.to(tl.int64) * BLOCK_D + (lanes[None, :] * BLOCK_D + columns[:, None]))
        key_scale = tl.load(key_scales + tile)
        scores = multiply(q, k, FP8).to(tl.float32)
        value_rows = value + tl.minimum(keys, key_length - 1).to(tl.int64) * value_row_stride
        if HEAD_DIM == BLOCK_D:
            v = tl.load(value_rows[None, :] + columns[:, None])
        else:
            v = tl.load(value_rows[None, :] + columns[:, None], mask=(columns < HEAD_DIM)[:, None], other=0.0)
        d_weights = tl.dot(d_out, v)
        factor = query_factor * key_scale
        weights = tl.math.exp2(scores * factor[:, None] - row_lse[:, None])
        if EDGE:
            visible = (keys < key_length)[None, :]
            if CAUSAL:
                visible = visible & (keys[None, :] <= rows[:, None])
            weights = tl.where(visible, weights, 0.0)
        d_scores = weights * (d_weights - row_delta[:, None])
        ds, scale = _row_codes(d_scores, tl.max(tl.abs(d_scores), 1), BLOCK_M, BLOCK_N, FP8)
        place = key_transposed + tile.to(tl.int64) * (KEY_TILE * BLOCK_D)
        if BLOCK_N != KEY_TILE:
            place += tl.multiple_of(start % KEY_TILE, BLOCK_N)
        product = multiply(ds, tl.load(place + (lanes[:, None] + columns[None, :] * KEY_TILE)), FP8)
        d_query += product.to(tl.float32) * scale[:, None]
    return d_query


@triton.jit(do_not_specialize=_SIZES)
def query_gradients(
    query_codes,
    query_scales,
    key_codes,
    key_transposed,
    key_scales,
    channel_scales,
    value,
    d_output,
    lse,
    delta,
    d_query,
    softmax_scale,
    query_sign,
    heads,
    kv_heads,
    query_length,
    key_length,
    query_tiles,
    key_tiles,
    blocks,
    value_batch_stride,
    value_head_stride,
    value_row_stride,
    d_output_batch_stride,
    d_output_head_stride,
    d_output_row_stride,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    QUERY_TILE: tl.constexpr,
    KEY_TILE: tl.constexpr,
    CAUSAL: tl.constexpr,
    FP8: tl.constexpr,
):
    """dQ of BLOCK_M queries of one head, contiguous [B * H, Nq, HEAD_DIM]."""
    program = tl.program_id(0)
    block, head = program % blocks, (program // blocks).to(tl.int64)
    if CAUSAL:  # the longest first
        block = blocks - 1 - block
    batch, query_head = head // heads, head % heads
    kv_head = batch * kv_heads + query_head // (heads // kv_heads)
    rows = block * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.arange(0, BLOCK_D)
    padded_length = query_tiles * QUERY_TILE
    query_codes += head * padded_length * BLOCK_D
    stored_rows = tl.minimum(rows, padded_length - 1)
    q = tl.load(query_codes + (stored_rows[:, None] * BLOCK_D + columns[None, :]))
    query_factor = tl.load(query_scales + head * query_tiles + stored_rows // QUERY_TILE)
    query_factor *= softmax_scale * LOG2E
    d_output += batch * d_output_batch_stride + query_head * d_output_head_stride
    d_out_rows = d_output + tl.minimum(rows, query_length - 1).to(tl.int64) * d_output_row_stride
    d_out = tl.load(d_out_rows[:, None] + columns[None, :], mask=(columns < HEAD_DIM)[None, :], other=0.0)
    row_lse = tl.load(lse + head * padded_length + stored_rows)
    row_delta = tl.load(delta + head * padded_length + stored_rows)
    key_base = kv_head * key_tiles * KEY_TILE * BLOCK_D
    value += batch * value_batch_stride + (kv_head - batch * kv_heads) * value_head_stride
    full, last = key_length // BLOCK_N, tl.cdiv(key_length, BLOCK_N)
    if CAUSAL:
        full = tl.minimum(block * BLOCK_M + 1, key_length) // BLOCK_N
        last = tl.cdiv(tl.minimum(block * BLOCK_M + BLOCK_M, key_length), BLOCK_N)

    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    dq = _walk_keys(
        dq, q, d_out, query_factor, row_lse, row_delta, rows, key_codes + key_base, key_transposed + key_base,
        key_scales + kv_head * key_tiles, value, value_row_stride, key_length, 0, full,
        HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N, KEY_TILE, False, CAUSAL, FP8,
    )  # fmt: skip
    dq = _walk_keys(
        dq, q, d_out, query_factor, row_lse, row_delta, rows, key_codes + key_base, key_transposed + key_base,
        key_scales + kv_head * key_tiles, value, value_row_stride, key_length, full, last,
        HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N, KEY_TILE, True, CAUSAL, FP8,
    )  # fmt: skip

    offsets = (head * query_length + rows)[:, None] * HEAD_DIM + columns[None, :]
    dq *= (softmax_scale * query_sign + (query_factor + row_delta) * 0.0)[
        :, None
    ]  # NaN where Q, dO or V were: maxima pass over it
    dq *= tl.load(channel_scales + kv_head * BLOCK_D + columns)[None, :]
    valid = (rows < query_length)[:, None] & (columns < HEAD_DIM)[None, :]
    tl.store(d_query + offsets, dq.to(d_query.dtype.element_ty), mask=valid)
