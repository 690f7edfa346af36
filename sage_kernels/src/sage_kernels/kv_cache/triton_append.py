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
    return tl.load(pointer + offsets, mask=valid[:, None], other=0.0).to(tl.float32)


@triton.jit
def _power_of_two_to(absmax, TOP: tl.constexpr):
    """The power of two that brings absmax into (2^(TOP - 1), 2^TOP], roughly; 1 for zeros and what is not finite."""
    usable = (absmax > 0) & (absmax < _INF)
    exponent = (tl.where(usable, absmax, 1.0).to(tl.int32, bitcast=True) >> 23) - 127
    power = tl.minimum(tl.maximum(TOP - 1 - exponent, -126), 126)
    scale = ((power + 127) << 23).to(tl.float32, bitcast=True)
    return tl.where(usable, scale, 1.0)


@triton.jit(do_not_specialize=["heads", "tokens", "has_counts"])
def begin_sequences(
    source,
    counts,
    lengths,
    means,
    scales,
    batch_stride,
    head_stride,
    row_stride,
    heads,
    tokens,
    has_counts,
    HEAD_DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    LEAST: tl.constexpr,
    TOP: tl.constexpr,
):
    """Mean and power-of-two scale of a sequence that holds nothing yet; a sequence that does keeps what it has."""
    head = tl.program_id(0)
    batch = head // heads
    count = tl.where(has_counts != 0, tl.minimum(tl.maximum(tl.load(counts + batch), 0), tokens), tokens)
    if (tl.load(lengths + batch) == 0) & (count > 0):
        source += batch.to(tl.int64) * batch_stride + (head % heads).to(tl.int64) * head_stride
        columns = tl.arange(0, HEAD_DIM)
        total = tl.zeros([HEAD_DIM], tl.float32)
        largest = tl.zeros([HEAD_DIM], tl.float32)
        for start in range(0, count, BLOCK):
            rows = start + tl.arange(0, BLOCK)
            x = _load_tokens(source, rows, row_stride, columns, rows < count)
            total += tl.sum(x, 0)
            largest = tl.maximum(largest, tl.max(tl.where(tl.abs(x) < _INF, tl.abs(x), 0.0), 0))
        mean = tl.where(count >= LEAST, total / count.to(tl.float32), 0.0)
        mean = tl.where(tl.abs(mean) < _INF, mean, 0.0)
        tl.store(means + head.to(tl.int64) * HEAD_DIM + columns, mean)
        tl.store(scales + head, _power_of_two_to(tl.max(largest, 0), TOP))


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


@triton.jit(do_not_specialize=["heads", "tokens", "capacity", "padded_capacity", "has_counts", "rolling"])
def append_tokens(
    source,
    counts,
    written,
    means,
    head_scales,
    codes,
    scales,
    batch_stride,
    head_stride,
    row_stride,
    heads,
    tokens,
    capacity,
    padded_capacity,
    has_counts,
    rolling,
    HEAD_DIM: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """NVFP4 along head_dim, four over six, of BLOCK tokens of one head; the place of a token is what was written."""
    head = tl.program_id(1)
    batch = head // heads
    count = tl.where(has_counts != 0, tl.minimum(tl.maximum(tl.load(counts + batch), 0), tokens), tokens)
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    place = tl.load(written + batch) + rows
    place = tl.where(rolling != 0, place % capacity, place)
    valid = (rows < count) & (place < capacity)
    source += batch.to(tl.int64) * batch_stride + (head % heads).to(tl.int64) * head_stride
    columns = tl.arange(0, HEAD_DIM)
    x = _load_tokens(source, rows, row_stride, columns, valid)
    x = (x - tl.load(means + head.to(tl.int64) * HEAD_DIM + columns)[None, :]) * tl.load(head_scales + head)
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

    first = head.to(tl.int64) * padded_capacity
    halves = tl.arange(0, HEAD_DIM // 2)
    offsets = (first + place)[:, None] * (HEAD_DIM // 2) + halves[None, :]
    tl.store(codes + offsets, packed, mask=valid[:, None])
    offsets = (first + place)[:, None] * groups + tl.arange(0, groups)[None, :]
    tl.store(scales + offsets, scale.to(tl.uint8), mask=valid[:, None])
