"""Smoothing and quantising of Q, K and V in two launches: statistics over the tokens, then codes and scales.

K's mean and V's mean and range need all tokens, so no single pass can do it. Launch 1 leaves partial sums of CHUNKS
pieces of each head, launch 2 adds them up again in every program: a few KB from the L2 cache, and no third launch, no
atomics on floats, so that results don't depend on the order in which programs run.
"""

import triton
import triton.language as tl

from sage_kernels.kernels.int8_operands import TOKEN_TILE

TILE = tl.constexpr(TOKEN_TILE)
E4M3_STEP = tl.constexpr(2.0**-9)  # every E4M3 value is a multiple: code sums are exact as integers
_INT8_MAX = tl.constexpr(127.0)
_E4M3_MAX = tl.constexpr(448.0)
_ROUND = tl.constexpr(12582912.0)  # 1.5 * 2^23: adding and subtracting it rounds to an integer, ties to even
_INF = tl.constexpr(float("inf"))


@triton.jit
def _load_rows(pointer, rows, row_stride, columns, column_stride, valid, HEAD_DIM: tl.constexpr):
    """float32 [rows, columns] of a strided matrix, float32 inputs rounded to bfloat16; 0 where there is nothing."""
    offsets = rows.to(tl.int64)[:, None] * row_stride + columns.to(tl.int64)[None, :] * column_stride
    x = tl.load(pointer + offsets, mask=valid[:, None] & (columns < HEAD_DIM)[None, :], other=0.0)
    if x.dtype == tl.float32:
        x = x.to(tl.bfloat16)
    return x.to(tl.float32)


@triton.jit
def _infinite_where_not_finite(magnitude):
    """Makes a NaN show up in a maximum, which would pass over it."""
    return tl.where(magnitude < _INF, magnitude, _INF)


@triton.jit
def _scale(absmax, limit: tl.constexpr):
    """absmax / limit; NaN where that is not finite."""
    # inf - inf, because a NaN can't be a global: Triton compares globals at each launch, and a NaN differs from itself.
    quotient = tl.div_rn(absmax, tl.full(absmax.shape, limit, tl.float32))
    return tl.where(absmax < _INF, quotient, absmax - absmax)


@triton.jit
def _valid_keys(lengths, batch, key_length, HAS_LENGTHS: tl.constexpr):
    if HAS_LENGTHS:
        return tl.minimum(tl.maximum(tl.load(lengths + batch), 0), key_length)
    return key_length


@triton.jit(do_not_specialize=["kv_heads", "key_length", "steps"])
def gather_statistics(
    key,
    value,
    lengths,
    partials,
    code_sums,
    key_batch_stride,
    key_head_stride,
    key_row_stride,
    key_column_stride,
    value_batch_stride,
    value_head_stride,
    value_row_stride,
    value_column_stride,
    kv_heads,
    key_length,
    steps,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNKS: tl.constexpr,
    HAS_LENGTHS: tl.constexpr,
    FP8: tl.constexpr,
):
    """partials[head, (sum K, sum V, min V, max V), chunk, :] over `steps` * ROWS tokens; zeroes code_sums."""
    program = tl.program_id(0)
    chunk, head = program % CHUNKS, program // CHUNKS
    batch, kv_head = (head // kv_heads).to(tl.int64), (head % kv_heads).to(tl.int64)
    key += batch * key_batch_stride + kv_head * key_head_stride
    value += batch * value_batch_stride + kv_head * value_head_stride
    length = _valid_keys(lengths, batch, key_length, HAS_LENGTHS)
    columns = tl.arange(0, BLOCK_D)
    key_sum = tl.zeros([ROWS, BLOCK_D], tl.float32)
    value_sum = tl.zeros([ROWS, BLOCK_D], tl.float32)
    value_min = tl.full([ROWS, BLOCK_D], _INF, tl.float32)
    value_max = tl.full([ROWS, BLOCK_D], -_INF, tl.float32)
    for step in range(steps):
        rows = (chunk * steps + step) * ROWS + tl.arange(0, ROWS)
        valid = rows < length
        key_sum += _load_rows(key, rows, key_row_stride, columns, key_column_stride, valid, HEAD_DIM)
        v = _load_rows(value, rows, value_row_stride, columns, value_column_stride, valid, HEAD_DIM)
        value_sum += v
        value_min = tl.where(valid[:, None], tl.minimum(value_min, tl.where(v > -_INF, v, -_INF)), value_min)
        value_max = tl.where(valid[:, None], tl.maximum(value_max, tl.where(v < _INF, v, _INF)), value_max)
    partials += head.to(tl.int64) * 4 * CHUNKS * BLOCK_D + chunk * BLOCK_D + columns
    tl.store(partials, tl.sum(key_sum, 0))
    tl.store(partials + CHUNKS * BLOCK_D, tl.sum(value_sum, 0))
    tl.store(partials + 2 * CHUNKS * BLOCK_D, tl.min(value_min, 0))
    tl.store(partials + 3 * CHUNKS * BLOCK_D, tl.max(value_max, 0))
    if FP8 and chunk == 0:
        tl.store(code_sums + head.to(tl.int64) * BLOCK_D + columns, tl.zeros([BLOCK_D], tl.int64))


@triton.jit
def _load_partials(partials, head, which: tl.constexpr, CHUNKS: tl.constexpr, BLOCK_D: tl.constexpr):
    offsets = tl.arange(0, CHUNKS)[:, None] * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]
    return tl.load(partials + (head.to(tl.int64) * 4 + which) * CHUNKS * BLOCK_D + offsets)


@triton.jit
def _mean(partials, head, which: tl.constexpr, length, CHUNKS: tl.constexpr, BLOCK_D: tl.constexpr):
    total = tl.sum(_load_partials(partials, head, which, CHUNKS, BLOCK_D), 0)
    return tl.div_rn(total, tl.full([BLOCK_D], 1.0, tl.float32) * tl.maximum(length, 1).to(tl.float32))


@triton.jit
def _store_int8(x, rows, codes, scales, BLOCK_D: tl.constexpr, SHARED: tl.constexpr):
    """Codes and scales of [TILE, BLOCK_D], one scale a row, or one for the tile where SHARED (formats.int8)."""
    absmax = tl.max(_infinite_where_not_finite(tl.abs(x)), 1)
    if SHARED:
        absmax = tl.full([TILE], 1.0, tl.float32) * tl.max(absmax, 0)
    scale = _scale(absmax, _INT8_MAX)
    divisor = tl.where(scale > 0, scale, 1.0)
    quotient = tl.div_rn(x, tl.broadcast_to(divisor[:, None], [TILE, BLOCK_D]))
    rounded = (tl.where((scale > 0)[:, None], quotient, 0.0) + _ROUND) - _ROUND
    columns = tl.arange(0, BLOCK_D)
    tl.store(codes + rows.to(tl.int64)[:, None] * BLOCK_D + columns[None, :], rounded.to(tl.int8))
    if SHARED:
        tl.store(scales + rows // TILE, scale, mask=rows % TILE == 0)
    else:
        tl.store(scales + rows, scale)


@triton.jit
def _permuted(position):
    """The token at each position of 16 stored ones: 0 1 8 9 2 3 10 11 4 5 12 13 6 7 14 15."""
    return position // 16 * 16 + position // 2 % 2 * 8 + position % 16 // 4 * 2 + position % 2


@triton.jit
def _power_of_two_scale(absmax):
    """reference.power_of_two_scale of one positive number, up to 2^126; 1 for 0, NaN and infinity."""
    bits = absmax.to(tl.int32, bitcast=True)
    exponent = (bits >> 23) - 126
    top = 11 - ((bits & 0x7FFFFF) > 0x280000).to(tl.int32)  # mantissa above 1344 / 2048 = 0.65625 * 2 - 1 = 0.3125
    power = tl.minimum(top - exponent, 126)
    scale = ((power + 127) << 23).to(tl.float32, bitcast=True)
    return tl.where((absmax > 0) & (absmax < _INF), scale, 1.0)


# Sizes that differ from call to call: none of them is worth a compilation of its own.
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


@triton.jit(do_not_specialize=_SIZES)
def quantize(  # noqa: PLR0915 one launch: its three parts share most of their arguments
    query,
    key,
    value,
    lengths,
    partials,
    query_codes,
    query_scales,
    lse_shift,
    key_codes,
    key_scales,
    value_codes,
    value_scales,
    value_mean,
    code_sums,
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
    CHUNKS: tl.constexpr,
    HAS_LENGTHS: tl.constexpr,
    WITH_SHIFT: tl.constexpr,
    FP8: tl.constexpr,
):
    """One tile of Q (the first query_programs), of K (the next key_programs) or of V (the rest)."""
    program = tl.program_id(0)
    lanes = tl.arange(0, TILE)
    columns = tl.arange(0, BLOCK_D)
    if program < query_programs:
        head, tile = (program // query_tiles).to(tl.int64), program % query_tiles
        batch, query_head = head // heads, head % heads
        rows = tile * TILE + lanes
        query += batch * query_batch_stride + query_head * query_head_stride
        x = _load_rows(query, rows, query_row_stride, columns, query_column_stride, rows < query_length, HEAD_DIM)
        padded = query_tiles.to(tl.int64) * TILE
        # A negative softmax scale goes into the codes: the kernel's running maximum needs positive factors.
        signed = x * query_sign
        _store_int8(signed, rows, query_codes + head * padded * BLOCK_D, query_scales + head * padded, BLOCK_D, False)
        if WITH_SHIFT:
            length = _valid_keys(lengths, batch, key_length, HAS_LENGTHS)
            kv_head = batch * kv_heads + query_head // (heads // kv_heads)
            mean = _mean(partials, kv_head, 0, length, CHUNKS, BLOCK_D)
            tl.store(lse_shift + head * padded + rows, tl.sum(x * mean[None, :], 1))
    else:
        program -= query_programs
        is_key = program < key_programs
        program = tl.where(is_key, program, program - key_programs)
        head, tile = (program // key_tiles).to(tl.int64), program % key_tiles
        batch, kv_head = head // kv_heads, head % kv_heads
        length = _valid_keys(lengths, batch, key_length, HAS_LENGTHS)
        padded = key_tiles.to(tl.int64) * TILE
        if is_key:
            rows = tile * TILE + lanes
            key += batch * key_batch_stride + kv_head * key_head_stride
            x = _load_rows(key, rows, key_row_stride, columns, key_column_stride, rows < length, HEAD_DIM)
            mean = _mean(partials, head, 0, length, CHUNKS, BLOCK_D)
            x = tl.where((rows < length)[:, None], x - mean[None, :], 0.0)
            _store_int8(x, rows, key_codes + head * padded * BLOCK_D, key_scales + head * key_tiles, BLOCK_D, True)
        else:
            value += batch * value_batch_stride + kv_head * value_head_stride
            smallest = tl.min(_load_partials(partials, head, 2, CHUNKS, BLOCK_D), 0)
            largest = tl.max(_load_partials(partials, head, 3, CHUNKS, BLOCK_D), 0)
            channel = head * BLOCK_D + columns
            if FP8:
                rows = tile * TILE + _permuted(lanes)
                x = _load_rows(value, rows, value_row_stride, columns, value_column_stride, rows < length, HEAD_DIM)
                mean = _mean(partials, head, 1, length, CHUNKS, BLOCK_D)
                absmax = tl.where(length > 0, tl.maximum(largest - mean, mean - smallest), 0.0)
                scale = _scale(absmax, _E4M3_MAX)
                x = tl.where((rows < length)[:, None], x - mean[None, :], 0.0)
                divisor = tl.broadcast_to(tl.where(scale > 0, scale, 1.0)[None, :], [TILE, BLOCK_D])
                x = tl.where((scale > 0)[None, :], tl.div_rn(x, divisor), 0.0)
                codes = tl.clamp(x, -_E4M3_MAX, _E4M3_MAX).to(tl.float8e4nv)
                sums = tl.sum((codes.to(tl.float32) / E4M3_STEP).to(tl.int32), 0)
                tl.atomic_add(code_sums + channel, sums.to(tl.int64), sem="relaxed")
                offsets = columns[:, None] * padded + (tile * TILE + lanes)[None, :]
                tl.store(value_codes + head * padded * BLOCK_D + offsets, tl.trans(codes))
                if tile == 0:
                    tl.store(value_scales + channel, scale)
                    tl.store(value_mean + channel, mean)
            else:
                rows = tile * TILE + lanes
                x = _load_rows(value, rows, value_row_stride, columns, value_column_stride, rows < length, HEAD_DIM)
                absmax = tl.max(tl.where(length > 0, tl.maximum(largest, -smallest), 0.0), 0)
                scale = _power_of_two_scale(absmax)
                offsets = rows.to(tl.int64)[:, None] * BLOCK_D + columns[None, :]
                tl.store(value_codes + head * padded * BLOCK_D + offsets, (x * scale).to(tl.float16))
                if tile == 0:
                    tl.store(value_scales + channel, tl.full([BLOCK_D], 1.0, tl.float32) / scale)
