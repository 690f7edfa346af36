"""8-bit numbers inside the kernels: rounding to them, their sums, and the order of their tokens."""

import triton
import triton.language as tl

INF = tl.constexpr(float("inf"))
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
# 1.5 * 2^23: adding it rounds to an integer, ties to even, and leaves the integer in the low bits.
ROUND = tl.constexpr(12582912.0)
INT8_MAX = tl.constexpr(127.0)
E4M3_MAX = tl.constexpr(448.0)
SMALLEST = tl.constexpr(2e-36)  # of numbers that get codes other than 0: 448 / x is infinite not far below


@triton.jit
def limit(FP8: tl.constexpr):
    """The largest code."""
    return E4M3_MAX if FP8 else INT8_MAX


@triton.jit
def round_codes(x, FP8: tl.constexpr):
    """Codes of numbers that are within the codes' range."""
    if FP8:  # noqa: SIM108 a branch of the compiler
        codes = x.to(tl.float8e4nv)
    else:
        # Not a conversion to an integer: that goes through the pipe of the exponentials, which is the busiest.
        codes = (x + ROUND).to(tl.int32, bitcast=True).to(tl.int8)
    return codes


@triton.jit
def multiply(a, b, FP8: tl.constexpr):
    """a b of codes: int32, or float32."""
    return tl.dot(a, b, out_dtype=tl.float32 if FP8 else tl.int32)


@triton.jit
def permuted(lanes):
    """Token at each position of a transposed tile.

    Within 16, so that the accumulators that a thread holds are its operand of the next 8-bit MMA as they are.
    """
    return lanes // 16 * 16 + (lanes // 2 % 2 * 8 + lanes // 4 % 4 * 2 + lanes % 2)


@triton.jit
def permute_columns(x, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The columns of codes [ROWS, COLUMNS] in the order of permuted()."""
    x = tl.reshape(x, [ROWS, COLUMNS // 16, 2, 4, 2])
    return tl.reshape(tl.permute(x, [0, 1, 3, 2, 4]), [ROWS, COLUMNS])


@triton.jit
def store_tile(codes, place, ROWS: tl.constexpr, ROW_BYTES: tl.constexpr):
    """Codes [ROWS, ROW_BYTES] as one contiguous tile."""
    offsets = tl.arange(0, ROWS)[:, None] * ROW_BYTES + tl.arange(0, ROW_BYTES)[None, :]
    tl.store(place + offsets, codes)


@triton.jit
def load_rows(pointer, rows, row_stride, columns, column_stride, valid, HEAD_DIM: tl.constexpr):
    """float32 [rows, columns] of a strided matrix; 0 where there is nothing."""
    offsets = rows.to(tl.int64)[:, None] * row_stride + columns.to(tl.int64)[None, :] * column_stride
    return tl.load(pointer + offsets, mask=valid[:, None] & (columns < HEAD_DIM)[None, :], other=0.0).to(tl.float32)


@triton.jit
def quantize_tile(x, FP8: tl.constexpr):
    """Codes of [rows, columns] with one scale, and that scale [1]: NaN where the tile is not finite everywhere."""
    magnitude = tl.abs(x)
    absmax = tl.max(tl.max(tl.where(magnitude < INF, magnitude, INF), 1), 0)
    codes, scale = quantize_with(x, (absmax + tl.zeros([1], tl.float32))[:, None], FP8)
    return codes, tl.reshape(scale, [1])


@triton.jit
def quantize_with(x, absmax, FP8: tl.constexpr):
    """Codes of [rows, columns] with the scales of their largest magnitudes `absmax`, and the scales, NaN for infinity.

    Both of one shape, to which and from which rows and columns may be broadcast.
    """
    scale = tl.div_rn(absmax, tl.full(absmax.shape, 1.0, tl.float32) * limit(FP8))
    usable = (absmax > SMALLEST) & (absmax < INF)
    divisor = tl.where(usable, scale, 1.0)
    inverse = tl.broadcast_to(tl.div_rn(tl.full(absmax.shape, 1.0, tl.float32), divisor), x.shape)
    # Quotients correctly rounded: 16-bit numbers fall between two codes often enough for x * inverse to tell. By
    # Markstein's correction of it, exact where `inverse` is, which is a fifth of a division's instructions.
    numerator = tl.where(usable & (tl.abs(x) < INF), x, 0.0)
    estimate = numerator * inverse
    rest = tl.fma(-estimate, tl.broadcast_to(divisor, x.shape), numerator)
    quotient = tl.fma(rest, inverse, estimate)
    return round_codes(quotient, FP8), tl.where(absmax < INF, scale, absmax - absmax)
