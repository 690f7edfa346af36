"""The attention kernel of the INT8 rungs: INT8 Q K^T, online softmax, P V in FP8 E4M3 or FP16.

One program has BLOCK_M query rows of one head and walks over its keys in tiles of BLOCK_N. Operands are padded with
zero codes to whole tiles, so that their loads need no masks; only tiles on an edge (causality, length) mask scores.
"""

import triton
import triton.language as tl

from sage_kernels.kernels.triton_int8.quantize import E4M3_STEP, TILE

NO_MASK, BOOL_MASK, ADDITIVE_MASK = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
_INF = tl.constexpr(float("inf"))
_LOG2E = tl.constexpr(1.4426950408889634)
_LN2 = tl.constexpr(0.6931471805599453)
_LOG2_E4M3_MAX = tl.constexpr(8.807354922057604)
# Scores, of magnitudes below 2^22, accumulate on top of these bits of 1.5 * 2^23 and so are floats without conversion.
_MAGIC_BITS = tl.constexpr(0x4B400000)
_MAGIC = tl.constexpr(12582912.0)
_LEAST_FACTOR = tl.constexpr(1e-35)


@triton.jit
def _load_mask(mask, mask_column_stride, start, lanes, keys_end, EDGE: tl.constexpr):
    """A tile of the mask; 0 beyond the end. mask: one pointer per row."""
    offsets = start.to(tl.int64) * mask_column_stride + lanes.to(tl.int64)[None, :] * mask_column_stride
    if EDGE:
        return tl.load(mask[:, None] + offsets, mask=(start + lanes < keys_end)[None, :], other=0)
    return tl.load(mask[:, None] + offsets)


@triton.jit
def _hide(scores, rows, keys, keys_end, EDGE: tl.constexpr, CAUSAL: tl.constexpr):
    """-inf beyond the last key, and beyond the diagonal where causal."""
    if EDGE:
        scores = tl.where((keys < keys_end)[None, :], scores, -_INF)
        if CAUSAL:
            scores = tl.where(keys[None, :] <= rows[:, None], scores, -_INF)
    return scores


@triton.jit
def _exponentials(scores, factor, row_max, stretch: tl.constexpr, MAY_BE_EMPTY: tl.constexpr):
    """New row maximum, what was subtracted from the exponents, and weights of a tile of scores on top of _MAGIC.

    The tile's largest is subtracted from a score before the product with the factor is rounded: products beyond 2^24
    are off by whole powers of two.
    """
    largest = tl.max(scores, 1)
    tile_max = (largest - _MAGIC) * factor
    new_max = tl.maximum(row_max, tile_max, tl.PropagateNan.ALL)
    shift = new_max
    # Not tile_max - shift, in which compilers would fuse the product and not round it as in shift.
    behind = tl.where(tile_max < row_max, tl.minimum(tile_max - row_max, 0.0), 0.0)
    if MAY_BE_EMPTY:  # a row may see nothing of this tile, or of any
        shift = tl.where(new_max == -_INF, 0.0, new_max)
        largest = tl.where(largest == -_INF, _MAGIC, largest)
    return new_max, shift, tl.math.exp2((scores - largest[:, None]) * factor[:, None] + (behind + stretch)[:, None])


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
    value_row_stride,
    mask,
    mask_column_stride,
    rows,
    keys_end,
    first,
    last,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    EDGE: tl.constexpr,
    CAUSAL: tl.constexpr,
    MASK: tl.constexpr,
    FP8: tl.constexpr,
    PARTIAL_SUMS: tl.constexpr,
    ROW_SUM: tl.constexpr,
):
    """Online softmax over key tiles first to last - 1; EDGE tiles may hold keys that some row must not see."""
    lanes = tl.arange(0, BLOCK_N)
    columns = tl.arange(0, BLOCK_D)
    stretch: tl.constexpr = _LOG2_E4M3_MAX if FP8 else 0.0
    for tile in range(first, last):
        start = tile * BLOCK_N
        row_offset = start.to(tl.int64) * BLOCK_D
        k = tl.load(key_codes + row_offset + (lanes[None, :] * BLOCK_D + columns[:, None]))
        factor = query_factor * tl.load(key_scales + start // TILE)
        factor = tl.where(factor < _LEAST_FACTOR, _LEAST_FACTOR, factor)  # keeps 0 * -inf away; a NaN passes
        integers = tl.full([BLOCK_M, BLOCK_N], _MAGIC_BITS, tl.int32)
        scores = tl.dot(q, k, integers, out_dtype=tl.int32).to(tl.float32, bitcast=True)
        if MASK == ADDITIVE_MASK:
            bias = _load_mask(mask, mask_column_stride, start, lanes, keys_end, EDGE).to(tl.float32)
            scores = (scores - _MAGIC) * factor[:, None] + bias * _LOG2E
            scores = _hide(scores, rows, start + lanes, keys_end, EDGE, CAUSAL)
            new_max = tl.maximum(row_max, tl.max(scores, 1))
            shift = tl.where(new_max == -_INF, 0.0, new_max)
            weights = tl.math.exp2((scores - shift[:, None]) + stretch)
        else:
            if MASK == BOOL_MASK:
                allowed = _load_mask(mask, mask_column_stride, start, lanes, keys_end, EDGE)
                scores = tl.where(allowed != 0, scores, -_INF)
            scores = _hide(scores, rows, start + lanes, keys_end, EDGE, CAUSAL)
            new_max, shift, weights = _exponentials(scores, factor, row_max, stretch, EDGE or MASK == BOOL_MASK)
        rescale = tl.math.exp2(row_max - shift)
        accumulator = accumulator * rescale[:, None]
        if FP8:
            p = weights.to(tl.float8e4nv)
            # The order of V's tokens: each thread's scores are then its operand of the MMA as they are.
            p = tl.reshape(p, [BLOCK_M, BLOCK_N // 16, 2, 4, 2])
            p = tl.reshape(tl.permute(p, [0, 1, 3, 2, 4]), [BLOCK_M, BLOCK_N])
            v = tl.load(value_codes + start + (lanes[:, None] + columns[None, :] * value_row_stride))
            accumulator = tl.dot(p, v, accumulator, max_num_imprecise_acc=BLOCK_N if PARTIAL_SUMS else None)
        else:
            p = weights.to(tl.float16)
            v = tl.load(value_codes + row_offset + (lanes[:, None] * BLOCK_D + columns[None, :]))
            accumulator = tl.dot(p, v, accumulator)
        if ROW_SUM == "rounded":
            row_sum = row_sum * rescale + tl.sum(p.to(tl.float32), 1)
        elif ROW_SUM == "unrounded":
            row_sum = row_sum * rescale + tl.sum(weights, 1)
        else:
            ones = tl.full([BLOCK_N, 16], 1.0, tl.float32).to(p.dtype)
            row_sum = row_sum * rescale + tl.max(tl.dot(p, ones), 1)
        row_max = new_max
    return accumulator, row_sum, row_max


# Sizes that differ from call to call: none of them is worth a compilation of its own.
_SIZES = [
    "heads",
    "kv_heads",
    "query_length",
    "key_length",
    "query_tiles",
    "key_tiles",
    "row_blocks",
]


@triton.jit(do_not_specialize=_SIZES)
def attend(  # noqa: PLR0915 one program: what is shared by its parts is most of its arguments
    query_codes,
    query_scales,
    key_codes,
    key_scales,
    value_codes,
    value_scales,
    value_mean,
    code_sums,
    lengths,
    mask,
    lse_shift,
    output,
    lse,
    softmax_scale,
    heads,
    kv_heads,
    query_length,
    key_length,
    query_tiles,
    key_tiles,
    row_blocks,
    mask_batch_stride,
    mask_head_stride,
    mask_row_stride,
    mask_column_stride,
    output_batch_stride,
    output_head_stride,
    output_row_stride,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr,
    MASK: tl.constexpr,
    HAS_LENGTHS: tl.constexpr,
    WITH_LSE: tl.constexpr,
    FP8: tl.constexpr,
    PARTIAL_SUMS: tl.constexpr,
    ROW_SUM: tl.constexpr,
):
    """softmax(Q K^T * softmax_scale + mask) V for BLOCK_M rows of one head; LSE in natural log."""
    program = tl.program_id(0)
    block, head = program % row_blocks, (program // row_blocks).to(tl.int64)
    if CAUSAL:  # the longest first, so that no long one is left for the end
        block = row_blocks - 1 - block
    batch, query_head = head // heads, head % heads
    kv_head = batch * kv_heads + query_head // (heads // kv_heads)
    query_base = head * query_tiles * TILE
    key_base = kv_head * key_tiles * TILE * BLOCK_D
    rows = block * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.arange(0, BLOCK_D)
    q = tl.load(query_codes + query_base * BLOCK_D + (rows[:, None] * BLOCK_D + columns[None, :]))
    query_factor = tl.load(query_scales + query_base + rows) * (tl.abs(softmax_scale) * _LOG2E)
    key_codes += key_base
    key_scales += kv_head * key_tiles
    value_codes += key_base
    if MASK != NO_MASK:
        mask += batch * mask_batch_stride + query_head * mask_head_stride
        mask += tl.minimum(rows, query_length - 1).to(tl.int64) * mask_row_stride

    keys_end = key_length
    if HAS_LENGTHS:
        keys_end = tl.minimum(tl.maximum(tl.load(lengths + batch), 0), key_length)
    full, last = keys_end // BLOCK_N, tl.cdiv(keys_end, BLOCK_N)
    if CAUSAL:
        first_row = block * BLOCK_M
        full = tl.minimum(first_row + 1, keys_end) // BLOCK_N
        last = tl.cdiv(tl.minimum(first_row + BLOCK_M, keys_end), BLOCK_N)

    accumulator = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    row_max = tl.full([BLOCK_M], -_INF, tl.float32)
    value_row_stride = key_tiles * TILE
    accumulator, row_sum, row_max = _walk(
        accumulator, row_sum, row_max, q, query_factor, key_codes, key_scales, value_codes, value_row_stride,
        mask, mask_column_stride, rows, keys_end, 0, full,
        BLOCK_D, BLOCK_M, BLOCK_N, False, CAUSAL, MASK, FP8, PARTIAL_SUMS, ROW_SUM,
    )  # fmt: skip
    accumulator, row_sum, row_max = _walk(
        accumulator, row_sum, row_max, q, query_factor, key_codes, key_scales, value_codes, value_row_stride,
        mask, mask_column_stride, rows, keys_end, full, last,
        BLOCK_D, BLOCK_M, BLOCK_N, True, CAUSAL, MASK, FP8, PARTIAL_SUMS, ROW_SUM,
    )  # fmt: skip

    empty = row_sum == 0
    channel = kv_head * BLOCK_D + columns
    result = accumulator / tl.where(empty, 1.0, row_sum)[:, None]
    scale = tl.load(value_scales + channel)
    result *= scale[None, :]
    if FP8:
        code_mean = tl.load(code_sums + channel).to(tl.float32) * E4M3_STEP / tl.maximum(keys_end, 1).to(tl.float32)
        result += (tl.load(value_mean + channel) - scale * code_mean)[None, :]
    result = tl.where(empty[:, None], 0.0, result)
    inside = (rows < query_length)[:, None] & (columns < HEAD_DIM)[None, :]
    output += batch * output_batch_stride + query_head * output_head_stride
    offsets = rows.to(tl.int64)[:, None] * output_row_stride + columns[None, :]
    tl.store(output + offsets, result.to(output.dtype.element_ty), mask=inside)
    if WITH_LSE:
        stretch: tl.constexpr = _LOG2_E4M3_MAX if FP8 else 0.0
        shift = tl.load(lse_shift + query_base + rows) * softmax_scale
        value = (row_max + tl.math.log2(row_sum) - stretch) * _LN2 + shift
        tl.store(lse + head * query_length + rows, tl.where(empty, -_INF, value), mask=rows < query_length)
