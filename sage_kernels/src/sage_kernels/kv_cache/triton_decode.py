"""Attention of query rows to the cache where cuda_decode.py serves none: split over the keys, then put together.

E2M1 codes become float16 by moving bits: sign to sign, the two exponent bits and the mantissa bit to where float16 has
its lowest exponent bits and highest mantissa bit, which is the value times 2^-14, subnormal numbers included. Times a
scale brought up by 2^7 that is the value times 2^-7, exact in float16: 2 + 4 significant bits, 2688 * 2^-7 at most.
Elements of even and odd channels stay apart, as the nibbles of a byte are: Q is split likewise.
"""

import triton
import triton.language as tl

_INF = tl.constexpr(float("inf"))
_LOG2E = tl.constexpr(1.4426950408889634)
_LN2 = tl.constexpr(0.6931471805599453)
OPERAND_UNIT = tl.constexpr(128.0)  # what 1 is worth in the float16 operands
_E4M3_TO_HALF = tl.constexpr(32768.0)  # E4M3's bits moved to float16's are the value times 2^-8; 2^7 is wanted
_E4M3_NAN = tl.constexpr(0x7F)

_NIBBLES = tl.constexpr(
    """
    {
    .reg .b32 a, b, t;
    prmt.b32 a, $4, 0, 0x1404;
    prmt.b32 b, $4, 0, 0x3424;
    shr.b32 t, a, 3;
    and.b32 t, t, 0x0E000E00;
    lop3.b32 $2, a, 0x80008000, t, 0xEA;
    shr.b32 t, b, 3;
    and.b32 t, t, 0x0E000E00;
    lop3.b32 $3, b, 0x80008000, t, 0xEA;
    shl.b32 a, a, 4;
    shl.b32 b, b, 4;
    shr.b32 t, a, 3;
    and.b32 t, t, 0x0E000E00;
    lop3.b32 $0, a, 0x80008000, t, 0xEA;
    shr.b32 t, b, 3;
    and.b32 t, t, 0x0E000E00;
    lop3.b32 $1, b, 0x80008000, t, 0xEA;
    }
    """
)


@triton.jit
def _halves(codes, PTX: tl.constexpr):
    """float16 of the low and of the high nibble of each byte, times 2^-14."""
    if PTX:
        return tl.inline_asm_elementwise(
            _NIBBLES, "=r,=r,=r,=r,r", [codes], dtype=(tl.float16, tl.float16), is_pure=True, pack=4
        )
    c = codes.to(tl.int16)
    low = ((c & 8) << 12) | ((c & 7) << 9)
    high = ((c & 0x80) << 8) | ((c & 0x70) << 5)
    return low.to(tl.float16, bitcast=True), high.to(tl.float16, bitcast=True)


@triton.jit
def _scaled(values, scales):
    """[N, C] times [N, groups], each scale serving C / groups neighbours."""
    grouped = tl.reshape(values, [values.shape[0], scales.shape[1], values.shape[1] // scales.shape[1]])
    return tl.reshape(grouped * scales[:, :, None], values.shape)


@triton.jit
def _load_operand(codes, scales, keys, end, HEAD_DIM: tl.constexpr, GROUP: tl.constexpr, PTX: tl.constexpr):
    """Even and odd channels [N, D / 2] of a tile in float16, times 2^-7. Beyond `end` 0, whatever is there."""
    columns = tl.arange(0, HEAD_DIM // 2)
    packed = tl.load(codes + keys[:, None] * (HEAD_DIM // 2) + columns[None, :])
    groups: tl.constexpr = HEAD_DIM // GROUP
    offsets = keys[:, None] * groups + tl.arange(0, groups)[None, :]
    bits = tl.load(scales + offsets, mask=(keys < end)[:, None], other=0).to(tl.int16)
    scale = (bits << 7).to(tl.float16, bitcast=True) * tl.full(bits.shape, _E4M3_TO_HALF, tl.float16)
    scale = tl.where(bits == _E4M3_NAN, tl.full(bits.shape, 0x7E00, tl.int16).to(tl.float16, bitcast=True), scale)
    low, high = _halves(packed, PTX)
    return _scaled(low, scale), _scaled(high, scale)


@triton.jit
def _walk(
    low_sum, high_sum, row_sum, row_max, q_low, q_high, factor, limits,
    key_codes, key_scales, value_codes, value_scales, begin, end, last,
    HEAD_DIM: tl.constexpr, GROUP: tl.constexpr, BLOCK_N: tl.constexpr, EDGE: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """Online softmax over keys begin to end; where EDGE a row sees only keys below its limit."""
    for start in range(begin, end, BLOCK_N):
        keys = start + tl.arange(0, BLOCK_N)
        k_low, k_high = _load_operand(key_codes, key_scales, keys, last, HEAD_DIM, GROUP, PTX)
        scores = tl.dot(q_low, tl.trans(k_low))
        scores = tl.dot(q_high, tl.trans(k_high), scores) * factor[:, None]
        if EDGE:
            scores = tl.where(keys[None, :] < limits[:, None], scores, -_INF)
        new_max = tl.maximum(row_max, tl.max(scores, 1))
        shift = tl.where(new_max == -_INF, 0.0, new_max)
        weights = tl.math.exp2(scores - shift[:, None])
        rescale = tl.math.exp2(row_max - shift)
        p = weights.to(tl.float16)
        row_sum = row_sum * rescale + tl.sum(p.to(tl.float32), 1)
        v_low, v_high = _load_operand(value_codes, value_scales, keys, last, HEAD_DIM, GROUP, PTX)
        low_sum = tl.dot(p, v_low, low_sum * rescale[:, None])
        high_sum = tl.dot(p, v_high, high_sum * rescale[:, None])
        row_max = new_max
    return low_sum, high_sum, row_sum, row_max


@triton.jit(do_not_specialize=["heads", "query_length", "padded_capacity", "splits", "group_heads"])
def attend_split(
    query, lengths, key_codes, key_scales, key_means, key_head_scales,
    value_codes, value_scales, partial_outputs, partial_lse,
    softmax_scale, query_batch_stride, query_head_stride, query_row_stride,
    heads, group_heads, query_length, padded_capacity, splits,
    HEAD_DIM: tl.constexpr, GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """One split of the keys of one key head, for BLOCK_M of the rows (query row major, query head minor) it serves.

    partial_outputs [splits, B, H, Nq, D] of what lies in this split, in units of the value head's scale;
    partial_lse [splits, B, H, Nq], in log2.
    """
    split, kv_head, block = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    kv_heads = heads // group_heads
    batch = kv_head // kv_heads
    rows = block * BLOCK_M + tl.arange(0, BLOCK_M)
    row, head = rows // group_heads, (kv_head % kv_heads) * group_heads + rows % group_heads
    inside = row < query_length
    length = tl.load(lengths + batch)

    halves = tl.arange(0, HEAD_DIM // 2)
    query += batch.to(tl.int64) * query_batch_stride
    q_rows = query + (row.to(tl.int64) * query_row_stride + head.to(tl.int64) * query_head_stride)[:, None]
    q_low = tl.load(q_rows + 2 * halves[None, :], mask=inside[:, None], other=0.0).to(tl.float32)
    q_high = tl.load(q_rows + (2 * halves + 1)[None, :], mask=inside[:, None], other=0.0).to(tl.float32)
    means = key_means + kv_head.to(tl.int64) * HEAD_DIM
    lse_shift = tl.sum(q_low * tl.load(means + 2 * halves)[None, :], 1)
    lse_shift += tl.sum(q_high * tl.load(means + 2 * halves + 1)[None, :], 1)
    # A power of two for each row, so that Q keeps its bits in float16 whatever its size.
    largest = tl.maximum(tl.max(tl.abs(q_low), 1), tl.max(tl.abs(q_high), 1))
    exponent = tl.minimum(tl.maximum((largest.to(tl.int32, bitcast=True) >> 23) & 255, 1), 253)
    up = ((254 - exponent) << 23).to(tl.float32, bitcast=True)
    down = (exponent << 23).to(tl.float32, bitcast=True)
    q_low, q_high = (q_low * up[:, None]).to(tl.float16), (q_high * up[:, None]).to(tl.float16)
    factor = down * (softmax_scale * OPERAND_UNIT * _LOG2E / tl.load(key_head_scales + kv_head))

    per_split = tl.cdiv(tl.cdiv(length, splits), BLOCK_N) * BLOCK_N
    begin = split * per_split
    limits = tl.full([BLOCK_M], length, tl.int32)
    last = tl.minimum(begin + per_split, length)
    full = tl.maximum(last, begin) // BLOCK_N * BLOCK_N
    if CAUSAL:
        limits = tl.minimum(length, tl.maximum(length - query_length + 1 + row, 0))
        full = tl.minimum(full, tl.maximum(length - query_length + 1 + block * BLOCK_M // group_heads, 0))
        full = tl.maximum(full // BLOCK_N * BLOCK_N, begin)
    first = kv_head.to(tl.int64) * padded_capacity
    key_codes += first * (HEAD_DIM // 2)
    value_codes += first * (HEAD_DIM // 2)
    key_scales += first * (HEAD_DIM // GROUP)
    value_scales += first * (HEAD_DIM // GROUP)

    low_sum = tl.zeros([BLOCK_M, HEAD_DIM // 2], tl.float32)
    high_sum = tl.zeros([BLOCK_M, HEAD_DIM // 2], tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    row_max = tl.full([BLOCK_M], -_INF, tl.float32)
    low_sum, high_sum, row_sum, row_max = _walk(
        low_sum, high_sum, row_sum, row_max, q_low, q_high, factor, limits,
        key_codes, key_scales, value_codes, value_scales, begin, full, last,
        HEAD_DIM, GROUP, BLOCK_N, False, PTX,
    )  # fmt: skip
    low_sum, high_sum, row_sum, row_max = _walk(
        low_sum, high_sum, row_sum, row_max, q_low, q_high, factor, limits,
        key_codes, key_scales, value_codes, value_scales, full, last, last,
        HEAD_DIM, GROUP, BLOCK_N, True, PTX,
    )  # fmt: skip

    empty = row_sum == 0
    inverse = tl.where(empty, 0.0, OPERAND_UNIT / tl.where(empty, 1.0, row_sum))[:, None]
    place = ((split * tl.num_programs(1) // kv_heads + batch) * heads + head).to(tl.int64) * query_length + row
    outputs = partial_outputs + place[:, None] * HEAD_DIM
    tl.store(outputs + 2 * halves[None, :], low_sum * inverse, mask=inside[:, None])
    tl.store(outputs + (2 * halves + 1)[None, :], high_sum * inverse, mask=inside[:, None])
    lse = row_max + tl.math.log2(row_sum) + lse_shift * (softmax_scale * _LOG2E)
    tl.store(partial_lse + place, tl.where(empty, -_INF, lse), mask=inside)


@triton.jit(do_not_specialize=["rows", "query_length", "splits", "group_heads"])
def combine_splits(
    partial_outputs, partial_lse, value_means, value_head_scales, output, lse,
    rows, group_heads, query_length, splits,
    HEAD_DIM: tl.constexpr, MAX_SPLITS: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """The output of one row from all splits, with the value head's mean and scale put back; LSE in natural log."""
    row = tl.program_id(0).to(tl.int64)
    kv_head = row // query_length // group_heads
    columns = tl.arange(0, HEAD_DIM)
    numbers = tl.arange(0, MAX_SPLITS)
    parts = tl.load(partial_lse + numbers.to(tl.int64) * rows + row, mask=numbers < splits, other=-_INF)
    largest = tl.max(parts, 0)
    empty = largest == -_INF
    shift = tl.where(empty, 0.0, largest)
    total = tl.sum(tl.math.exp2(parts - shift), 0)
    result = tl.zeros([HEAD_DIM], tl.float32)
    for start in range(0, splits, STEP):
        some = start + tl.arange(0, STEP)
        exists = some < splits
        part = tl.load(partial_lse + some.to(tl.int64) * rows + row, mask=exists, other=-_INF)
        offsets = (some.to(tl.int64)[:, None] * rows + row) * HEAD_DIM + columns[None, :]
        outputs = tl.load(partial_outputs + offsets, mask=exists[:, None], other=0.0)
        result += tl.sum(outputs * tl.math.exp2(part - shift)[:, None], 0)
    # A split without keys has weight 0; of a row with none at all the quotient would be 0 / 0.
    result = result / tl.where(empty, 1.0, total)
    result = result / tl.load(value_head_scales + kv_head) + tl.load(value_means + kv_head * HEAD_DIM + columns)
    result = tl.where(empty, 0.0, result)
    tl.store(output + row * HEAD_DIM + columns, result.to(output.dtype.element_ty))
    tl.store(lse + row, tl.where(empty, -_INF, (largest + tl.math.log2(total)) * _LN2))
