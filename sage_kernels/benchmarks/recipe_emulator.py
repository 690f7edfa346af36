"""The quantised reference's inner loop as one Triton kernel, for runs of many videos; recipes with P and V in NVFP4.

Operands come from `reference.quantize_operands`: their values have six significant bits or fewer, so that bfloat16
holds them exactly and tensor cores multiply them exactly. Differs from the reference by the order of float32 sums.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from sage_kernels.formats import E2M1_MAX, E4M3_MAX
from sage_kernels.recipes import Recipe
from sage_kernels.reference import QuantizedOperands

ROWS = 64
_LINE_OFFSET = tl.constexpr(127 * 8192 - 530)  # as in reference.py
_LINE_RANGE = tl.constexpr(20.0)
_LOG2E = tl.constexpr(1.4426950408889634)
_ROUND = tl.constexpr(12582912.0)  # 1.5 * 2^23: adding and subtracting it rounds to an integer, ties to even
_INF = tl.constexpr(float("inf"))


@triton.jit
def _round_to_e2m1(x):
    """|x| to the nearest E2M1 magnitude, ties to the even code."""
    code = (x > 0.25).to(tl.int32) + (x >= 0.75).to(tl.int32) + (x > 1.25).to(tl.int32) + (x >= 1.75).to(tl.int32)
    code += (x > 2.5).to(tl.int32) + (x >= 3.5).to(tl.int32) + (x > 5.0).to(tl.int32)
    small = code.to(tl.float32) * 0.5
    return tl.where(code < 4, small, tl.where(code < 6, (code - 2).to(tl.float32), (code * 2 - 8).to(tl.float32)))


@triton.jit
def _emulate(
    query, key, value, delta, output, scale, rows, keys, delta_rows,
    HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, MEAN_ROWS: tl.constexpr,
    THRESHOLD: tl.constexpr, LOG2_STRETCH: tl.constexpr, LINEAR: tl.constexpr, ROUNDED_DIVISOR: tl.constexpr,
    ROUNDED_SUM: tl.constexpr, CAUSAL: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = (row < rows)[:, None]
    columns = tl.arange(0, HEAD_DIM)
    q = tl.load(query + (head * rows + row)[:, None] * HEAD_DIM + columns[None, :], mask=inside, other=0.0)
    accumulator = tl.zeros([BLOCK_M, HEAD_DIM], tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    row_max = tl.full([BLOCK_M], -_INF, tl.float32)
    groups: tl.constexpr = BLOCK_N // 16
    is_line = (tl.arange(0, 16) % 8 >= 8 - LINEAR)[None, None, :]
    end = tl.minimum(keys, (tl.program_id(0) + 1) * BLOCK_M) if CAUSAL else keys
    for start in range(0, end, BLOCK_N):
        column = start + tl.arange(0, BLOCK_N)
        exists = column < keys
        offsets = (head * keys + column)[:, None] * HEAD_DIM + columns[None, :]
        k = tl.load(key + offsets, mask=exists[:, None], other=0.0)
        scores = tl.dot(q, tl.trans(k))
        if MEAN_ROWS > 0:
            pointers = delta + (head * delta_rows + row // MEAN_ROWS)[:, None] * keys + column[None, :]
            scores += tl.load(pointers, mask=inside & exists[None, :], other=0.0)
        visible = exists[None, :] & (column[None, :] <= row[:, None]) if CAUSAL else exists[None, :]
        scores = tl.where(visible, scores * scale, -_INF)
        tile_max = tl.max(scores, 1)
        row_new = tl.where(tile_max > row_max + THRESHOLD * 0.6931471805599453, tile_max, row_max)
        powers = (scores - row_new[:, None]) * _LOG2E + LOG2_STRETCH
        weights = tl.reshape(tl.math.exp2(powers), [BLOCK_M, groups, 16])
        absmax = tl.max(weights, 2)
        quotient = tl.div_rn(absmax, tl.full(absmax.shape, 6.0, tl.float32))
        scales = tl.minimum(quotient, 448.0).to(tl.float8e4nv).to(tl.float32)
        divisor = scales if ROUNDED_DIVISOR else quotient
        positive = scales > 0
        divisor = tl.broadcast_to(tl.where(positive, divisor, 1.0)[:, :, None], weights.shape)
        rounded = _round_to_e2m1(tl.div_rn(weights, divisor))
        if LINEAR > 0:
            safe = tl.where(positive, scales, 1.0)
            power = tl.reshape(powers, [BLOCK_M, groups, 16]) - tl.math.log2(safe)[:, :, None]
            power = tl.minimum(tl.maximum(power, -_LINE_RANGE), _LINE_RANGE)
            fixed = ((power * 8192 + _ROUND) - _ROUND).to(tl.int32) + _LINE_OFFSET
            line = _round_to_e2m1((fixed << 10).to(tl.float32, bitcast=True))
            rounded = tl.where(is_line, line, rounded)
        p = tl.where(positive[:, :, None], rounded * scales[:, :, None], 0.0)
        p = tl.reshape(p, [BLOCK_M, BLOCK_N])
        rescale = tl.math.exp2((row_max - row_new) * _LOG2E)
        summed = p if ROUNDED_SUM else tl.reshape(weights, [BLOCK_M, BLOCK_N])
        row_sum = row_sum * rescale + tl.sum(summed, 1)
        v = tl.load(value + offsets, mask=exists[:, None], other=0.0)
        accumulator = tl.dot(p.to(tl.bfloat16), v, accumulator * rescale[:, None])
        row_max = row_new
    pointers = output + (head * rows + row)[:, None] * HEAD_DIM + columns[None, :]
    tl.store(pointers, accumulator / row_sum[:, None], mask=inside)


def emulate(operands: QuantizedOperands, recipe: Recipe, scale: float, keys: int, *, is_causal: bool = False) -> Tensor:
    """What `reference.attend` gives without attn_mask, float32 [B, H, Nq, D]; as many heads of K as of Q.

    Raises:
        ValueError: a recipe that the kernel doesn't compute.
    """
    is_served = recipe.pv == "nvfp4" and recipe.two_level and recipe.key_shares == 1 and "p" not in recipe.four_over_six
    if not is_served or keys % recipe.key_block:
        raise ValueError(f"emulate takes P in NVFP4 on two levels and whole blocks of keys, got {recipe}, {keys} keys")
    batch, heads, rows, head_dim = operands.query.shape
    output = torch.empty_like(operands.query)
    delta = output
    if operands.query_means is not None and operands.smooth_key is not None:
        delta = operands.query_means @ operands.smooth_key[:, :, :keys].transpose(-1, -2)
    bf16 = [x[:, :, :length].bfloat16().contiguous() for x, length in
            ((operands.query, rows), (operands.key, keys), (operands.value, keys))]  # fmt: skip
    _emulate[(triton.cdiv(rows, ROWS), batch * heads)](
        *(*bf16, delta, output, scale, rows, keys, delta.shape[2]),
        HEAD_DIM=head_dim,
        BLOCK_M=ROWS,
        BLOCK_N=recipe.key_block,
        MEAN_ROWS=recipe.mean_rows,
        THRESHOLD=recipe.rescale_threshold,
        LOG2_STRETCH=math.log2(E4M3_MAX * E2M1_MAX) - recipe.rescale_threshold,
        LINEAR=recipe.linear_exp_of_8,
        ROUNDED_DIVISOR=recipe.rounded_divisor,
        ROUNDED_SUM=recipe.quantized_row_sum,
        CAUSAL=is_causal,
    )
    return output if operands.value_mean is None else output + operands.value_mean
