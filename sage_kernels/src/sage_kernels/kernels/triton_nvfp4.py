"""SageAttention3's attention (algorithm 1, lines 4 to 16) on NVFP4 operands with Triton's block-scaled dot product.

Triton makes of `tl.dot_scaled` what the GPU has: tcgen05 block-scaled MMAs on sm_100 and sm_103, elsewhere a product of
16-bit numbers, in which the operands are exact.

delta_s takes two more products with the mean of each row's block as the row. That triples the multiplications of Q K^T
(its price on those GPUs is not measured), and needs neither a matrix of delta_s nor 16-bit keys in memory.
"""

import triton
import triton.language as tl

LN2 = tl.constexpr(0.6931471805599453)
GROUP = tl.constexpr(16)
E2M1_MAX = tl.constexpr(6.0)
E4M3_MAX = tl.constexpr(448.0)


@triton.jit
def encode_e2m1(x):
    """E2M1 codes of x >= 0, ties to the even code, saturating at 6; NaN becomes 0."""
    return (
        (x > 0.25).to(tl.uint8)
        + (x >= 0.75).to(tl.uint8)
        + (x > 1.25).to(tl.uint8)
        + (x >= 1.75).to(tl.uint8)
        + (x > 2.5).to(tl.uint8)
        + (x >= 3.5).to(tl.uint8)
        + (x > 5.0).to(tl.uint8)
    )


@triton.jit
def decode_e2m1(codes):
    """float32 values of codes 0..7."""
    code = codes.to(tl.float32)
    return tl.where(code < 4, code * 0.5, tl.where(code < 6, code - 2, code * 2 - 8))


@triton.jit
def quantize_weights(weights, ROWS: tl.constexpr, KEYS: tl.constexpr):
    """Codes uint8 [ROWS, KEYS / 2] and scales E4M3 [ROWS, KEYS / 16] of weights >= 0, and the sum of each row."""
    groups = tl.reshape(weights, (ROWS, KEYS // GROUP, GROUP))
    largest = tl.full((ROWS, KEYS // GROUP), E2M1_MAX, tl.float32)
    # The clamp: what a cast does above 448 differs.
    scales = tl.minimum(tl.math.div_rn(tl.max(groups, axis=2), largest), E4M3_MAX).to(tl.float8e4nv)
    divisors = scales.to(tl.float32)[:, :, None] + tl.zeros((ROWS, KEYS // GROUP, GROUP), tl.float32)
    codes = encode_e2m1(tl.where(divisors == 0, 0.0, tl.math.div_rn(groups, divisors)))
    sums = tl.sum(tl.sum(decode_e2m1(codes) * divisors, axis=2), axis=1)
    low, high = tl.split(tl.reshape(codes, (ROWS, KEYS // 2, 2)))
    return low | (high << 4), scales, sums


@triton.jit
def dequantize(codes, scales):
    """Codes [R, K / 2] and scales [R, K / 16] -> float16 [R, K], which holds every product of a code and a scale."""
    ROWS: tl.constexpr = codes.shape[0]
    GROUPS: tl.constexpr = scales.shape[1]
    codes = tl.reshape(tl.join(codes & 15, codes >> 4), (ROWS, GROUPS, GROUP))
    magnitudes = decode_e2m1(codes & 7) * scales.to(tl.float32)[:, :, None]
    return tl.reshape(tl.where(codes < 8, magnitudes, -magnitudes), (ROWS, GROUPS * GROUP)).to(tl.float16)


@triton.jit
def block_scaled_dot(a, a_scales, b, b_scales, accumulator, DOT_SCALED: tl.constexpr):
    """accumulator + A B^T of codes [M, K / 2] and [N, K / 2] and scales [M, K / 16] and [N, K / 16]."""
    if DOT_SCALED:
        return tl.dot_scaled(a, a_scales, "e2m1", tl.trans(b), b_scales, "e2m1", acc=accumulator)
    return tl.dot(dequantize(a, a_scales), tl.trans(dequantize(b, b_scales)), acc=accumulator)


@triton.jit
def load_rows(codes, scales, rows, HEAD_DIM: tl.constexpr):
    """Codes [rows, HEAD_DIM / 2] and scales [rows, HEAD_DIM / 16] of these rows."""
    byte, group = tl.arange(0, HEAD_DIM // 2), tl.arange(0, HEAD_DIM // GROUP)
    return (
        tl.load(codes + rows[:, None] * (HEAD_DIM // 2) + byte[None, :]),
        tl.load(scales + rows[:, None] * (HEAD_DIM // GROUP) + group[None, :]),
    )


# Lengths come in all sizes: a compilation for each that is 1 or a multiple of 16 would cost more than it gains.
@triton.jit(do_not_specialize=["heads", "kv_heads", "query_length", "key_length"])
def attention(  # noqa: PLR0915 one loop
    query,  # u8 [B H, Nq', D / 2], Nq' rows padded to BLOCK_M
    query_scales,  # e4m3 [B H, Nq', D / 16]
    means,  # u8 [B H, Nq' / MEAN_ROWS, D / 2]
    mean_scales,
    query_factors,  # f32 [B H, Nq' / MEAN_ROWS]: what one unit of the quantised Q is worth
    key,  # u8 [B Hkv, Nk', D / 2], Nk' keys padded to BLOCK_N
    key_scales,  # e4m3 [B Hkv, Nk', D / 16]
    residual,  # second digit of K, as key
    residual_scales,
    key_factors,  # f32 [B Hkv]
    value,  # u8 [B Hkv, D, Nk' / 2]
    value_scales,  # e4m3 [B Hkv, D, Nk' / 16]
    value_factors,  # f32 [B Hkv]
    value_means,  # f32 [B Hkv, D]
    lse_shifts,  # f32 [B H, Nq]: q . mean(k)
    output,  # bf16, fp16 or f32 [B H, Nq, D]
    lse,  # f32 [B H, Nq]
    heads,
    kv_heads,
    query_length,
    key_length,
    padded_queries,
    padded_keys,
    scale,
    HEAD_DIM: tl.constexpr,
    MEAN_ROWS: tl.constexpr,
    THRESHOLD: tl.constexpr,
    LOG2_STRETCH: tl.constexpr,
    CAUSAL: tl.constexpr,
    DOT_SCALED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One tile of BLOCK_M query rows of one head."""
    head = tl.program_id(1).to(tl.int64)
    kv_head = head // heads * kv_heads + head % heads // (heads // kv_heads)
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    query_row = head * padded_queries + rows
    mean_row = head * (padded_queries // MEAN_ROWS) + rows // MEAN_ROWS

    q, q_scale = load_rows(query, query_scales, query_row, HEAD_DIM)
    mean, mean_scale = load_rows(means, mean_scales, mean_row, HEAD_DIM)
    factor = tl.load(query_factors + mean_row) * tl.load(key_factors + kv_head) * (scale / LN2)

    maximum = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    row_sum = tl.zeros((BLOCK_M,), tl.float32)
    accumulator = tl.zeros((BLOCK_M, HEAD_DIM), tl.float32)
    end = key_length
    if CAUSAL:
        end = tl.minimum(end, (tl.program_id(0) + 1) * BLOCK_M)
    for start in range(0, end, BLOCK_N):
        columns = start + tl.arange(0, BLOCK_N)
        key_row = kv_head * padded_keys + columns
        k, k_scale = load_rows(key, key_scales, key_row, HEAD_DIM)
        k2, k2_scale = load_rows(residual, residual_scales, key_row, HEAD_DIM)
        scores = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        scores = block_scaled_dot(mean, mean_scale, k2, k2_scale, scores, DOT_SCALED)
        scores = block_scaled_dot(mean, mean_scale, k, k_scale, scores, DOT_SCALED)
        scores = block_scaled_dot(q, q_scale, k, k_scale, scores, DOT_SCALED)
        visible = columns[None, :] < key_length
        if CAUSAL:
            visible = visible & (columns[None, :] <= rows[:, None])
        scores = tl.where(visible, scores * factor[:, None], float("-inf"))

        tile_maximum = tl.max(scores, axis=1)
        new_maximum = tl.where(tile_maximum > maximum + THRESHOLD, tile_maximum, maximum)
        # A maximum passes over NaN, and codes can't hold it: a row that has one is made NaN as a whole.
        has_nan = tl.max((scores != scores).to(tl.int32), axis=1) > 0  # noqa: PLR0124
        new_maximum = tl.where(has_nan, float("nan"), new_maximum)
        shift = tl.where(new_maximum == float("-inf"), 0.0, new_maximum)
        rescale = tl.exp2(maximum - shift)
        weights = tl.exp2(scores - shift[:, None] + LOG2_STRETCH)
        p, p_scale, sums = quantize_weights(weights, BLOCK_M, BLOCK_N)
        row_sum = row_sum * rescale + sums
        maximum = new_maximum

        dim, byte, group = tl.arange(0, HEAD_DIM), tl.arange(0, BLOCK_N // 2), tl.arange(0, BLOCK_N // GROUP)
        value_row = (kv_head * HEAD_DIM + dim[:, None]) * padded_keys + start
        v = tl.load(value + value_row // 2 + byte[None, :])
        v_scale = tl.load(value_scales + value_row // GROUP + group[None, :])
        accumulator = accumulator * rescale[:, None]
        accumulator = block_scaled_dot(p, p_scale, v, v_scale, accumulator, DOT_SCALED)

    seen = row_sum != 0  # rows that may see nothing give zeros
    dim = tl.arange(0, HEAD_DIM)
    result = accumulator * (tl.load(value_factors + kv_head) / tl.where(seen, row_sum, 1.0))[:, None]
    result = tl.where(seen[:, None], result + tl.load(value_means + kv_head * HEAD_DIM + dim)[None, :], 0.0)
    inside = rows < query_length
    place = (head * query_length + rows)[:, None] * HEAD_DIM + dim[None, :]
    tl.store(output + place, result.to(output.dtype.element_ty), mask=inside[:, None])
    row = head * query_length + rows
    shift = scale * tl.load(lse_shifts + row, mask=inside, other=0.0)
    log_sum = (maximum + tl.log2(row_sum) - LOG2_STRETCH) * LN2 + shift
    tl.store(lse + row, tl.where(seen, log_sum, float("-inf")), mask=inside)
