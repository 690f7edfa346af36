"""Writing to the cache: what is subtracted from a sequence, once; then codes and scales of new tokens."""

import triton
import triton.language as tl

E2M1_MAX = tl.constexpr(6.0)
OTHER_MAX = tl.constexpr(4.0)
E4M3_MAX = tl.constexpr(448.0)
_INF = tl.constexpr(float("inf"))
_SIGN_BIT = tl.constexpr(8)


@triton.jit
def _load_tokens(pointer, tokens, row_stride, columns, valid):
    offsets = tokens.to(tl.int64)[:, None] * row_stride + columns[None, :]
    return tl.load(pointer + offsets, mask=valid[:, None], other=0.0)


@triton.jit
def _power_of_two_to(absmax, TOP: tl.constexpr):
    """The power of two that brings absmax into (2^(TOP - 1), 2^TOP], roughly; 1 for zeros and what is not finite."""
    usable = (absmax > 0) & (absmax < _INF)
    exponent = (tl.where(usable, absmax, 1.0).to(tl.int32, bitcast=True) >> 23) - 127
    power = tl.minimum(tl.maximum(TOP - 1 - exponent, -126), 126)
    scale = ((power + 127) << 23).to(tl.float32, bitcast=True)
    return tl.where(usable, scale, 1.0)


@triton.jit
def _count(counts, batch, tokens, has_counts):
    return tl.where(has_counts != 0, tl.minimum(tl.maximum(tl.load(counts + batch), 0), tokens), tokens)


@triton.jit
def _rotated(x, rotation, HEAD_DIM: tl.constexpr, ROTATE: tl.constexpr):
    """float32 [N, D] of x times the matrix of signs, whose entries every dtype holds, so that products are exact."""
    if ROTATE:
        columns = tl.arange(0, HEAD_DIM)
        matrix = tl.load(rotation + columns[:, None] * HEAD_DIM + columns[None, :]).to(x.dtype)
        return tl.dot(x, matrix, input_precision="ieee")
    return x.to(tl.float32)


@triton.jit
def _begin(
    source, row_stride, rotation, count, HEAD_DIM: tl.constexpr, BLOCK: tl.constexpr, LEAST: tl.constexpr,
    TOP: tl.constexpr, ROTATE: tl.constexpr,
):  # fmt: skip
    """Mean [D], rotated, and power-of-two scale of the first `count` tokens of a sequence that begins with them."""
    columns = tl.arange(0, HEAD_DIM)
    total = tl.zeros([HEAD_DIM], tl.float32)
    largest = tl.zeros([HEAD_DIM], tl.float32)
    for start in range(0, count, BLOCK):
        rows = start + tl.arange(0, BLOCK)
        x = _load_tokens(source, rows, row_stride, columns, rows < count).to(tl.float32)
        total += tl.sum(x, 0)
        largest = tl.maximum(largest, tl.max(tl.where(tl.abs(x) < _INF, tl.abs(x), 0.0), 0))
    mean = tl.where(count >= LEAST, total / count.to(tl.float32), 0.0)
    if ROTATE:
        matrix = tl.load(rotation + columns[:, None] * HEAD_DIM + columns[None, :])
        mean = tl.sum(mean[:, None] * matrix, 0)
    return tl.where(tl.abs(mean) < _INF, mean, 0.0), _power_of_two_to(tl.max(largest, 0), TOP)


@triton.jit(do_not_specialize=["heads", "tokens", "has_counts"])
def begin_sequences(
    keys, values, counts, lengths, rotation, key_means, key_scales, value_means, value_scales,
    key_batch_stride, key_head_stride, key_row_stride, value_batch_stride, value_head_stride, value_row_stride,
    heads, tokens, has_counts,
    HEAD_DIM: tl.constexpr, BLOCK: tl.constexpr, LEAST: tl.constexpr, TOP: tl.constexpr, ROTATE: tl.constexpr,
):  # fmt: skip
    """What is subtracted from sequences that hold nothing yet, and their scales; others keep what they have."""
    head = tl.program_id(0)
    batch, place = head // heads, head.to(tl.int64) * HEAD_DIM + tl.arange(0, HEAD_DIM)
    count = _count(counts, batch, tokens, has_counts)
    if (tl.load(lengths + batch) == 0) & (count > 0):
        if tl.program_id(1) == 0:
            keys += batch.to(tl.int64) * key_batch_stride + (head % heads).to(tl.int64) * key_head_stride
            mean, scale = _begin(keys, key_row_stride, rotation, count, HEAD_DIM, BLOCK, LEAST, TOP, ROTATE)
            tl.store(key_means + place, mean)
            tl.store(key_scales + head, scale)
        else:
            values += batch.to(tl.int64) * value_batch_stride + (head % heads).to(tl.int64) * value_head_stride
            mean, scale = _begin(values, value_row_stride, rotation, count, HEAD_DIM, BLOCK, LEAST, TOP, False)
            tl.store(value_means + place, mean)
            tl.store(value_scales + head, scale)


@triton.jit
def _e2m1_magnitude_codes(x):
    """Codes 0..7 of |x| >= 0, to nearest, ties to the even code."""
    code = (x > 0.25).to(tl.int32) + (x >= 0.75).to(tl.int32) + (x > 1.25).to(tl.int32) + (x >= 1.75).to(tl.int32)
    return code + (x > 2.5).to(tl.int32) + (x >= 3.5).to(tl.int32) + (x > 5.0).to(tl.int32)


@triton.jit
def _e2m1_magnitudes(code):
    small = code.to(tl.float32) * 0.5
    return tl.where(code < 4, small, tl.where(code < 6, (code - 2).to(tl.float32), (code * 2 - 8).to(tl.float32)))


@triton.jit
def _round_by(magnitudes, absmax, LARGEST: tl.constexpr):
    """E4M3 scale of absmax / LARGEST, E2M1 codes, and the squared error that they leave, for [rows, groups, group]."""
    quotient = tl.div_rn(absmax, tl.full(absmax.shape, LARGEST, tl.float32))
    scale8 = tl.minimum(quotient, E4M3_MAX).to(tl.float8e4nv)
    scale = scale8.to(tl.float32)
    divisor = tl.broadcast_to(tl.where(scale > 0, scale, 1.0)[:, :, None], magnitudes.shape)
    ratio = tl.where(scale[:, :, None] > 0, tl.div_rn(magnitudes, divisor), 0.0)
    codes = _e2m1_magnitude_codes(ratio)
    difference = magnitudes - _e2m1_magnitudes(codes) * scale[:, :, None]
    return codes, scale8.to(tl.uint8, bitcast=True), tl.sum(difference * difference, 2)


@triton.jit
def _quantize(x, codes, scales, first, place, valid, HEAD_DIM: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr):
    """NVFP4 along head_dim, four over six, of float32 [BLOCK, D], stored at the tokens `place` behind `first`."""
    groups: tl.constexpr = HEAD_DIM // GROUP
    x = tl.reshape(x, [BLOCK, groups, GROUP])
    magnitudes = tl.abs(x)
    # A maximum passes over a NaN; an infinity in its place does not get lost.
    magnitudes = tl.where(magnitudes < _INF, magnitudes, _INF)
    absmax = tl.max(magnitudes, 2)
    finite = absmax < _INF
    magnitudes = tl.where(finite[:, :, None], magnitudes, 0.0)
    absmax = tl.where(finite, absmax, 0.0)
    six, six_scale, six_error = _round_by(magnitudes, absmax, E2M1_MAX)
    four, four_scale, four_error = _round_by(magnitudes, absmax, OTHER_MAX)
    better = four_error < six_error
    nibbles = tl.where(better[:, :, None], four, six)
    nibbles += tl.where(x.to(tl.int32, bitcast=True) < 0, _SIGN_BIT, 0)
    scale = tl.where(finite, tl.where(better, four_scale, six_scale), 0x7F)
    low, high = tl.split(tl.reshape(nibbles, [BLOCK, HEAD_DIM // 2, 2]))
    packed = (low | (high << 4)).to(tl.uint8)
    offsets = (first + place)[:, None] * (HEAD_DIM // 2) + tl.arange(0, HEAD_DIM // 2)[None, :]
    tl.store(codes + offsets, packed, mask=valid[:, None])
    offsets = (first + place)[:, None] * groups + tl.arange(0, groups)[None, :]
    tl.store(scales + offsets, scale.to(tl.uint8), mask=valid[:, None])


@triton.jit
def _append(
    source, row_stride, rotation, means, head_scales, codes, scales, head, begins, count, rows, place, valid,
    padded_capacity,
    HEAD_DIM: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr, LEAST: tl.constexpr, TOP: tl.constexpr,
    ROTATE: tl.constexpr, BEGIN: tl.constexpr,
):  # fmt: skip
    columns = tl.arange(0, HEAD_DIM)
    mean = tl.load(means + head.to(tl.int64) * HEAD_DIM + columns)
    factor = tl.load(head_scales + head)
    if BEGIN:  # noqa: SIM102 what is false for the compiler is not compiled
        if begins:
            mean, factor = _begin(source, row_stride, rotation, count, HEAD_DIM, BLOCK, LEAST, TOP, ROTATE)
            tl.store(means + head.to(tl.int64) * HEAD_DIM + columns, mean)
            tl.store(head_scales + head, factor)
    x = _rotated(_load_tokens(source, rows, row_stride, columns, valid), rotation, HEAD_DIM, ROTATE)
    x = (x - mean[None, :]) * factor
    _quantize(x, codes, scales, head.to(tl.int64) * padded_capacity, place, valid, HEAD_DIM, GROUP, BLOCK)


@triton.jit(do_not_specialize=["heads", "tokens", "capacity", "padded_capacity", "has_counts", "rolling"])
def append_tokens(
    keys, values, counts, lengths, written, rotation,
    key_means, key_head_scales, value_means, value_head_scales, key_codes, key_scales, value_codes, value_scales,
    key_batch_stride, key_head_stride, key_row_stride, value_batch_stride, value_head_stride, value_row_stride,
    heads, tokens, capacity, padded_capacity, has_counts, rolling,
    HEAD_DIM: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr, LEAST: tl.constexpr, TOP: tl.constexpr,
    ROTATE: tl.constexpr, BEGIN: tl.constexpr,
):  # fmt: skip
    """Codes and scales of BLOCK tokens of one head's keys or values; the place of a token is what was written.

    Where BEGIN there is one block, which does what begin_sequences does too.
    """
    head = tl.program_id(1)
    batch = head // heads
    count = _count(counts, batch, tokens, has_counts)
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    place = tl.load(written + batch) + rows
    place = tl.where(rolling != 0, place % capacity, place)
    valid = (rows < count) & (place < capacity)
    begins = (tl.load(lengths + batch) == 0) & (count > 0)
    if tl.program_id(2) == 0:
        keys += batch.to(tl.int64) * key_batch_stride + (head % heads).to(tl.int64) * key_head_stride
        _append(
            keys, key_row_stride, rotation, key_means, key_head_scales, key_codes, key_scales, head, begins, count,
            rows, place, valid, padded_capacity, HEAD_DIM, GROUP, BLOCK, LEAST, TOP, ROTATE, BEGIN,
        )  # fmt: skip
    else:
        values += batch.to(tl.int64) * value_batch_stride + (head % heads).to(tl.int64) * value_head_stride
        _append(
            values, value_row_stride, rotation, value_means, value_head_scales, value_codes, value_scales, head, begins,
            count, rows, place, valid, padded_capacity, HEAD_DIM, GROUP, BLOCK, LEAST, TOP, False, BEGIN,
        )  # fmt: skip


@triton.jit(do_not_specialize=["batch", "tokens", "capacity", "has_counts", "rolling"])
def advance(counts, lengths, written, batch, tokens, capacity, has_counts, rolling, BLOCK: tl.constexpr):
    """Count the tokens that were appended, when all of them are in place."""
    sequences = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    exists = sequences < batch
    count = tl.load(counts + sequences, mask=exists, other=0)
    count = tl.where(has_counts != 0, tl.minimum(tl.maximum(count, 0), tokens), tokens)
    total = tl.load(written + sequences, mask=exists, other=0) + count
    held = tl.minimum(total, capacity)
    tl.store(written + sequences, tl.where(rolling != 0, total, held), mask=exists)
    tl.store(lengths + sequences, held, mask=exists)
