"""Quantising: Q, K and V before the forward pass; dO, and transposed copies of Q and K, before the backward pass.

The 8-bit MMA of Hopper takes operands only along the axis that it sums over. So what is summed over tokens exists as
transposed tiles [block_d, tile], with tokens in the order of numbers.permuted. Rows are loaded in that order first.
"""

import triton
import triton.language as tl

from sage_kernels.training.triton_kernels.numbers import (
    INF,
    load_rows,
    permuted,
    quantize_tile,
    quantize_with,
    store_tile,
)

_SIZES = [
    "heads",
    "kv_heads",
    "query_length",
    "key_length",
    "query_tiles",
    "key_tiles",
    "query_programs",
    "key_programs",
]


@triton.jit(do_not_specialize=["kv_heads", "key_length", "steps"])
def sum_keys(
    key,
    partials,
    highest,
    lowest,
    batch_stride,
    head_stride,
    row_stride,
    column_stride,
    kv_heads,
    key_length,
    steps,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    """Sum and extremes of each channel over `steps` * ROWS keys: [head, chunk, :] of partials, highest and lowest."""
    program = tl.program_id(0)
    chunk, head = program % CHUNKS, (program // CHUNKS).to(tl.int64)
    key += head // kv_heads * batch_stride + head % kv_heads * head_stride
    columns = tl.arange(0, BLOCK_D)
    total = tl.zeros([ROWS, BLOCK_D], tl.float32)
    high, low = total - INF, total + INF
    for step in range(steps):
        rows = (chunk * steps + step) * ROWS + tl.arange(0, ROWS)
        valid = rows < key_length
        keys = load_rows(key, rows, row_stride, columns, column_stride, valid, HEAD_DIM)
        total += keys
        high = tl.maximum(high, tl.where(valid[:, None], keys, -INF))
        low = tl.minimum(low, tl.where(valid[:, None], keys, INF))
    place = (head * CHUNKS + chunk) * BLOCK_D + columns
    tl.store(partials + place, tl.sum(total, 0))
    tl.store(highest + place, tl.max(high, 0))
    tl.store(lowest + place, tl.min(low, 0))


@triton.jit(do_not_specialize=_SIZES)
def quantize_inputs(
    query,
    key,
    value,
    partials,
    highest,
    lowest,
    query_codes,
    query_scales,
    key_codes,
    key_scales,
    key_transposed,
    channel_scales,
    value_codes,
    value_scales,
    query_batch_stride,
    query_head_stride,
    query_row_stride,
    query_column_stride,
    key_batch_stride,
    key_head_stride,
    key_row_stride,
    key_column_stride,
    value_batch_stride,
    value_head_stride,
    value_row_stride,
    value_column_stride,
    heads,
    kv_heads,
    query_length,
    key_length,
    query_tiles,
    key_tiles,
    query_programs,
    key_programs,
    query_sign,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    QUERY_TILE: tl.constexpr,
    KEY_TILE: tl.constexpr,
    CHUNKS: tl.constexpr,
    FP8: tl.constexpr,
):
    """One tile of Q (the first query_programs), of K, of K transposed or of V."""
    program = tl.program_id(0)
    columns = tl.arange(0, BLOCK_D)
    if program < query_programs:
        head, tile = (program // query_tiles).to(tl.int64), program % query_tiles
        rows = tile * QUERY_TILE + tl.arange(0, QUERY_TILE)
        query += head // heads * query_batch_stride + head % heads * query_head_stride
        x = load_rows(query, rows, query_row_stride, columns, query_column_stride, rows < query_length, HEAD_DIM)
        codes, scale = quantize_tile(x * query_sign, FP8)
        place = (head * query_tiles + tile) * QUERY_TILE * BLOCK_D
        store_tile(codes, query_codes + place, QUERY_TILE, BLOCK_D)
        tl.store(query_scales + head * query_tiles + tile + tl.arange(0, 1), scale)
    else:
        program -= query_programs
        job = program // key_programs
        program -= job * key_programs
        head, tile = (program // key_tiles).to(tl.int64), program % key_tiles
        batch, kv_head = head // kv_heads, head % kv_heads
        key_lanes = tl.arange(0, KEY_TILE)
        place = (head * key_tiles + tile) * KEY_TILE * BLOCK_D
        if job == 2:
            key_rows = tile * KEY_TILE + permuted(key_lanes)
            value += batch * value_batch_stride + kv_head * value_head_stride
            values = load_rows(
                value, key_rows, value_row_stride, columns, value_column_stride, key_rows < key_length, HEAD_DIM
            )
            codes_of_value, scale = quantize_tile(values, FP8)
            store_tile(tl.trans(codes_of_value), value_codes + place, BLOCK_D, KEY_TILE)
            tl.store(value_scales + head * key_tiles + tile + tl.arange(0, 1), scale)
        else:
            key += batch * key_batch_stride + kv_head * key_head_stride
            pieces = tl.arange(0, CHUNKS)[:, None] * BLOCK_D + columns[None, :]
            mean = tl.sum(tl.load(partials + head * CHUNKS * BLOCK_D + pieces), 0) / key_length.to(tl.float32)
            if job == 0:
                key_rows = tile * KEY_TILE + key_lanes
                valid = key_rows < key_length
                keys = load_rows(key, key_rows, key_row_stride, columns, key_column_stride, valid, HEAD_DIM)
                codes_of_key, scale = quantize_tile(tl.where(valid[:, None], keys - mean[None, :], 0.0), FP8)
                store_tile(codes_of_key, key_codes + place, KEY_TILE, BLOCK_D)
                tl.store(key_scales + head * key_tiles + tile + tl.arange(0, 1), scale)
            else:
                # dS K sums over keys, so that K can have a scale for each channel there: all keys share it.
                absmax = tl.maximum(
                    tl.max(tl.load(highest + head * CHUNKS * BLOCK_D + pieces), 0) - mean,
                    mean - tl.min(tl.load(lowest + head * CHUNKS * BLOCK_D + pieces), 0),
                )
                key_rows = tile * KEY_TILE + permuted(key_lanes)
                valid = key_rows < key_length
                keys = load_rows(key, key_rows, key_row_stride, columns, key_column_stride, valid, HEAD_DIM)
                keys = tl.where(valid[:, None], keys - mean[None, :], 0.0)
                codes_of_key, scales = quantize_with(keys, absmax[None, :], FP8)
                store_tile(tl.trans(codes_of_key), key_transposed + place, BLOCK_D, KEY_TILE)
                if tile == 0:
                    tl.store(channel_scales + head * BLOCK_D + columns[None, :], scales)


@triton.jit(do_not_specialize=["heads", "query_length", "query_tiles"])
def prepare_backward(
    d_output,
    output,
    query_codes,
    d_output_codes,
    d_output_scales,
    delta,
    query_transposed,
    d_output_batch_stride,
    d_output_head_stride,
    d_output_row_stride,
    d_output_column_stride,
    output_batch_stride,
    output_head_stride,
    output_row_stride,
    output_column_stride,
    heads,
    query_length,
    query_tiles,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    QUERY_TILE: tl.constexpr,
    FP8: tl.constexpr,
):
    """One tile of dO, O and Q; delta = rowsum(dO * O)."""
    program = tl.program_id(0)
    columns = tl.arange(0, BLOCK_D)
    head, tile = (program // query_tiles).to(tl.int64), program % query_tiles
    batch, query_head = head // heads, head % heads
    lanes = permuted(tl.arange(0, QUERY_TILE))
    rows = tile * QUERY_TILE + lanes
    valid = rows < query_length
    d_output += batch * d_output_batch_stride + query_head * d_output_head_stride
    output += batch * output_batch_stride + query_head * output_head_stride
    d_out = load_rows(d_output, rows, d_output_row_stride, columns, d_output_column_stride, valid, HEAD_DIM)
    out = load_rows(output, rows, output_row_stride, columns, output_column_stride, valid, HEAD_DIM)
    row_sums = tl.sum(d_out * out, 1)
    tl.store(delta + head * query_tiles * QUERY_TILE + rows, row_sums)
    codes, scale = quantize_tile(d_out, FP8)
    # A NaN of V reaches dK only through delta, and the maxima of the backward kernels pass over it.
    scale += tl.sum(row_sums, 0) * 0.0
    tl.store(d_output_scales + head * query_tiles + tile + tl.arange(0, 1), scale)
    base = (head * query_tiles + tile) * QUERY_TILE * BLOCK_D
    store_tile(tl.trans(codes), d_output_codes + base, BLOCK_D, QUERY_TILE)
    q = tl.load(query_codes + base + lanes[:, None] * BLOCK_D + columns[None, :])
    store_tile(tl.trans(q), query_transposed + base, BLOCK_D, QUERY_TILE)
