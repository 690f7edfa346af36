"""Attention in plain PyTorch, exact and quantised: the definition that every kernel is tested against.

The quantised form follows SageAttention3 (sections 3.1 to 3.3, algorithm 1), corrected where the public kernel departs
from it: P is divided by the *rounded* scale, and the row sum is that of the quantised P, so that weights sum to one.
Works on tiles with an online softmax, as the kernels do, so memory is bounded at any length.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from sage_kernels.formats import E2M1_MAX, E4M3_MAX, MXFP8_GROUP, NVFP4_GROUP, round_to_e4m3
from sage_kernels.formats.fp8_e4m3 import dequantize_fp8, quantize_fp8
from sage_kernels.formats.grouping import divide, group_absmax, pad_last_axis, split_last_axis
from sage_kernels.formats.int8 import dequantize_int8, quantize_int8
from sage_kernels.formats.mxfp8 import dequantize_mxfp8, quantize_mxfp8
from sage_kernels.formats.nvfp4 import quantize_groups, round_to_e2m1
from sage_kernels.recipes import EXACT, PVFormat, QKFormat, Recipe
from sage_kernels.score_mask import ScoreMask, valid_tokens

# Scores held at once: a tile and its temporaries stay in a CPU's cache; on a GPU launches are what costs.
_TILE_ELEMENTS = 1 << 20
_GPU_TILE_ELEMENTS = 1 << 24
_P_MAX: dict[PVFormat, float] = {"nvfp4": E4M3_MAX * E2M1_MAX, "fp8": E4M3_MAX, "fp16": 1.0, "none": 1.0}
_TOKEN_PADDING = NVFP4_GROUP
_LARGEST_POWER = 126  # its reciprocal is a normal float32 too
_LARGEST_E4M3_CODE = 126
# Lowers the line between powers of two: so that it crosses E2M1's thresholds within 0.5 %, in 1/8192; and so that it
# meets 2^x on average.
_E2M1_LINE_OFFSET = 530
_E4M3_LINE_OFFSET = 0.0564
_LINE_RANGE = 20.0


@dataclass(frozen=True, eq=False)
class QuantizedOperands:
    """Q, K and V after smoothing, quantising and dequantising, in float32, with what puts the smoothing back.

    Attributes:
        query: [B, H, Nq, D].
        key: [B, Hkv, Nk', D], tokens padded with zeros to a multiple of 16.
        value: [B, Hkv, Nk', D].
        query_means: [B, H, ceil(Nq / mean_rows), D], or None.
        smooth_key: what query_means meet, or None: the smoothed key, unquantised or in two quantised digits, or only
            what `key` misses of it.
        lse_shift: [B, H, Nq], the scores q . mean(k) that smoothing K took from every row (without the softmax scale).
        value_mean: [B, Hkv, 1, D], or None.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    query_means: Tensor | None
    smooth_key: Tensor | None
    lse_shift: Tensor | None
    value_mean: Tensor | None


def power_of_two_scale(x: Tensor, rows: int = 0) -> Tensor:
    """The power of two that brings the largest magnitude of a head, or of each `rows` tokens of it, into (672, 1344].

    E4M3 group scales reach 448 * 6 = 2688; half of it is left free because subtracting a mean can double a magnitude.
    Zeros, and what holds a NaN or an infinity, get 1.

    Args:
        x: [B, H, N, D].
        rows: tokens that share a scale; 0 for a whole head.

    Returns:
        float32 [B, H, 1, 1], or [B, H, N, 1] with rows.
    """
    if x.numel() == 0:
        return x.new_ones((*x.shape[:2], x.shape[2] if rows else 1, 1), dtype=torch.float32)
    if rows:
        padded = torch.nn.functional.pad(x.float(), (0, 0, 0, -x.shape[2] % rows))
        blocks = padded.reshape(*x.shape[:2], -1, rows * x.shape[3])
        absmax = group_absmax(blocks).repeat_interleave(rows, dim=2)[:, :, : x.shape[2]]
    else:
        absmax = group_absmax(x.float().flatten(-2)).unsqueeze(-1)
    usable = absmax > 0
    mantissa, exponent = torch.frexp(torch.where(usable, absmax, 1.0))
    top = 11 - (mantissa > 1344 / 2048).int()  # 1344 = 0.65625 * 2^11
    power = (top - exponent).clamp_max(_LARGEST_POWER)
    return torch.where(usable, torch.ldexp(torch.ones_like(mantissa), power), 1.0)


def _power_scale(x: Tensor, needed: bool, rows: int = 0) -> Tensor:
    return power_of_two_scale(x, rows) if needed else x.new_ones(())


def attention_fp32(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    key_lengths: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Exact attention in float32 with bounded memory.

    Args:
        q: [B, H, Nq, D]. k, v: [B, Hkv, Nk, D] with H a multiple of Hkv.
        attn_mask, is_causal, scale, key_lengths: as in `sage_kernels.attention`.

    Returns:
        output float32 [B, H, Nq, D] and natural-log LSE float32 [B, H, Nq]. Fully masked rows give 0 and -inf.
    """
    return quantized_attention(
        q, k, v, EXACT, attn_mask=attn_mask, is_causal=is_causal, scale=scale, key_lengths=key_lengths
    )


def quantized_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    recipe: Recipe,
    *,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    key_lengths: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention with the operands of `recipe`; arguments and results as `attention_fp32`."""
    mask = ScoreMask(attn_mask, is_causal, key_lengths, k.shape[2])
    operands = quantize_operands(q, k, v, recipe, key_lengths=key_lengths)
    return attend(operands, mask, recipe, q.shape[-1] ** -0.5 if scale is None else scale)


def quantize_operands(
    q: Tensor, k: Tensor, v: Tensor, recipe: Recipe, *, key_lengths: Tensor | None = None
) -> QuantizedOperands:
    """Smooth and quantise Q, K and V (SageAttention3, section 3.1 and algorithm 1, lines 1 to 3)."""
    q, k, v = q.float(), k.float(), v.float()
    if key_lengths is not None:
        valid = valid_tokens(key_lengths, k.shape[2])
        k, v = k.where(valid, 0.0), v.where(valid, 0.0)
    has_nvfp4 = recipe.qk == "nvfp4" or recipe.key_correction_rows > 0
    query_scale = _power_scale(q, has_nvfp4, recipe.mean_rows)
    key_scale = _power_scale(k, has_nvfp4)

    lse_shift = None
    if recipe.smooth_k:
        key_mean = _token_mean(k, key_lengths)
        lse_shift = _grouped_matmul(q, key_mean.transpose(-1, -2)).squeeze(-1)
        k = _subtract_from_tokens(k, key_mean, key_lengths)
    k = _pad_tokens(k)
    first = _round_trip_qk(k * key_scale, recipe.qk, recipe.int8_rows[1], "k" in recipe.four_over_six)

    query_means = smooth_key = None
    if recipe.smooth_q_rows:
        query_means = _block_means(q, recipe.smooth_q_rows)
        smooth_key = k
        if recipe.quantized_delta:
            block_scale = query_scale[:, :, :: recipe.smooth_q_rows] if query_scale.dim() else query_scale
            query_means = _round_trip_qk(query_means * block_scale, recipe.qk, 1) / block_scale
            second = _round_trip_qk(k * key_scale - first, recipe.qk, recipe.int8_rows[1])
            smooth_key = (first + second) / key_scale
        q = q - query_means.repeat_interleave(recipe.smooth_q_rows, dim=2)[:, :, : q.shape[2]]
    elif recipe.key_correction_rows:
        block_scale = query_scale[:, :, :: recipe.key_correction_rows]
        query_means = _block_means(q, recipe.key_correction_rows)
        query_means = _round_trip_qk(query_means * block_scale, "nvfp4", 1) / block_scale
        smooth_key = _round_trip_qk(k * key_scale - first, "nvfp4", 1) / key_scale

    value_mean = None
    value_scale = _power_scale(v, recipe.pv in ("nvfp4", "fp16"))
    if recipe.smooth_v:
        value_mean = _token_mean(v, key_lengths)
        v = _subtract_from_tokens(v, value_mean, key_lengths)
    value = _round_trip_v(_pad_tokens(v) * value_scale, recipe.pv, "v" in recipe.four_over_six) / value_scale
    if recipe.recenter_v and value_mean is not None:
        value_mean = value_mean - _token_mean(value[:, :, : v.shape[2]], key_lengths)
    return QuantizedOperands(
        _round_trip_qk(q * query_scale, recipe.qk, recipe.int8_rows[0], "q" in recipe.four_over_six) / query_scale,
        first / key_scale,
        value,
        query_means,
        smooth_key,
        lse_shift,
        value_mean,
    )


def attend(
    operands: QuantizedOperands,
    mask: ScoreMask,
    recipe: Recipe,
    scale: float,
    round_weights: Callable[[Tensor, Recipe], Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Online softmax over tiles (SageAttention3, algorithm 1, lines 4 to 16).

    Args:
        operands, mask, recipe, scale: of the call.
        round_weights: `round_p`, or a compiled form of it.

    Returns:
        output float32 [B, H, Nq, D] and LSE float32 [B, H, Nq].
    """
    batch, heads, rows, _ = operands.query.shape
    output = operands.query.new_empty((batch, heads, rows, operands.value.shape[-1]))
    lse = operands.query.new_empty((batch, heads, rows))
    step = max(1, recipe.mean_rows)
    elements = _TILE_ELEMENTS if operands.query.device.type == "cpu" else _GPU_TILE_ELEMENTS
    step *= max(1, elements // max(1, batch * heads * recipe.key_block * step))
    for start in range(0, rows, step):
        tile = slice(start, min(start + step, rows))
        output[:, :, tile], lse[:, :, tile] = _attend_rows(
            operands, mask, recipe, scale, tile, round_weights or round_p
        )
    if operands.lse_shift is not None:
        lse += scale * operands.lse_shift
    return output, lse


def _attend_rows(
    operands: QuantizedOperands,
    mask: ScoreMask,
    recipe: Recipe,
    scale: float,
    rows: slice,
    round_weights: Callable[[Tensor, Recipe], Tensor],
) -> tuple[Tensor, Tensor]:
    stretch = (_P_MAX[recipe.pv] if recipe.two_level else 1.0) * 2.0**-recipe.rescale_threshold
    shares = [
        _attend_share(operands, mask, recipe, scale, rows, share, stretch, round_weights)
        for share in range(recipe.key_shares)
    ]
    maximum, row_sum, accumulator = shares[0]
    for their_maximum, their_sum, theirs in shares[1:]:
        larger = torch.maximum(maximum, their_maximum)
        shift = torch.where(larger == -torch.inf, 0.0, larger)
        rescale, their_rescale = torch.exp(maximum - shift), torch.exp(their_maximum - shift)
        row_sum = row_sum * rescale + their_sum * their_rescale
        accumulator = accumulator * rescale + theirs * their_rescale
        maximum = larger
    empty = row_sum == 0
    output = accumulator / torch.where(empty, 1.0, row_sum)
    if operands.value_mean is not None:
        groups = output.shape[1] // operands.value_mean.shape[1]
        output = output + operands.value_mean.repeat_interleave(groups, dim=1)
    lse = torch.where(empty, -torch.inf, maximum + torch.log(row_sum / stretch))
    return output.masked_fill(empty, 0.0), lse.squeeze(-1)


def _attend_share(
    operands: QuantizedOperands,
    mask: ScoreMask,
    recipe: Recipe,
    scale: float,
    rows: slice,
    share: int,
    stretch: float,
    round_weights: Callable[[Tensor, Recipe], Tensor],
) -> tuple[Tensor, Tensor, Tensor]:
    """Maximum, row sum and accumulator of every key_shares-th key block, the first of which is `share`."""
    query = operands.query[:, :, rows]
    maximum = query.new_full((*query.shape[:3], 1), -torch.inf)
    row_sum = torch.zeros_like(maximum)
    accumulator = query.new_zeros((*query.shape[:3], operands.value.shape[-1]))
    step = recipe.key_block * recipe.key_shares
    for key_start in range(recipe.key_block * share, operands.key.shape[2], step):
        keys = slice(key_start, min(key_start + recipe.key_block, operands.key.shape[2]))
        if mask.skips(rows, keys):
            break
        scores = mask.apply(_scores(operands, recipe, rows, keys).mul_(scale), rows, keys)
        tile_maximum = scores.amax(dim=-1, keepdim=True)
        grown = tile_maximum > maximum + recipe.rescale_threshold * math.log(2)
        new_maximum = torch.where(grown | tile_maximum.isnan(), tile_maximum, maximum)
        shift = torch.where(new_maximum == -torch.inf, 0.0, new_maximum)
        powers = scores.sub_(shift).mul_(math.log2(math.e)).add_(math.log2(stretch))
        weights = round_weights(powers, recipe)
        rescale = torch.exp(maximum - shift)
        summed = weights if recipe.quantized_row_sum else _exp2(powers, recipe)
        row_sum = row_sum * rescale + summed.sum(dim=-1, keepdim=True)
        accumulator = accumulator * rescale + _grouped_matmul(weights, operands.value[:, :, keys])
        maximum = new_maximum
    return maximum, row_sum, accumulator


def _scores(operands: QuantizedOperands, recipe: Recipe, rows: slice, keys: slice) -> Tensor:
    """Q K^T of one tile, with delta_s added in full precision: what smoothing Q took away, or rounding K."""
    scores = _grouped_matmul(operands.query[:, :, rows], operands.key[:, :, keys].transpose(-1, -2))
    if operands.query_means is None or operands.smooth_key is None:
        return scores
    blocks = slice(rows.start // recipe.mean_rows, math.ceil(rows.stop / recipe.mean_rows))
    delta = _grouped_matmul(operands.query_means[:, :, blocks], operands.smooth_key[:, :, keys].transpose(-1, -2))
    return scores.add_(delta.repeat_interleave(recipe.mean_rows, dim=2)[:, :, : scores.shape[2]])


def _grouped_matmul(a: Tensor, b: Tensor) -> Tensor:
    """[B, H, n, k] @ [B, Hkv, k, m] -> [B, H, n, m], each of the Hkv matrices serving H / Hkv heads."""
    if a.shape[1] == b.shape[1]:
        return a @ b
    batch, heads, rows, inner = a.shape
    folded = a.reshape(batch, b.shape[1], heads // b.shape[1] * rows, inner) @ b
    return folded.reshape(batch, heads, rows, b.shape[-1])


def _token_mean(x: Tensor, key_lengths: Tensor | None) -> Tensor:
    """Mean over the valid tokens, [B, H, 1, D]; tokens beyond key_lengths are zero already."""
    if key_lengths is None:
        return x.mean(dim=2, keepdim=True)
    return x.sum(dim=2, keepdim=True) / key_lengths.clamp(1, x.shape[2])[:, None, None, None]


def _subtract_from_tokens(x: Tensor, mean: Tensor, key_lengths: Tensor | None) -> Tensor:
    return x - (mean if key_lengths is None else mean * valid_tokens(key_lengths, x.shape[2]))


def _block_means(x: Tensor, rows: int) -> Tensor:
    """Means of consecutive blocks of `rows` tokens, [B, H, blocks, D]; the last block may be short."""
    batch, heads, length, head_dim = x.shape
    blocks = -(-length // rows)
    padded = torch.nn.functional.pad(x, (0, 0, 0, blocks * rows - length))
    counts = (length - rows * torch.arange(blocks, device=x.device)).clamp(max=rows)
    return padded.reshape(batch, heads, blocks, rows, head_dim).sum(dim=3) / counts[:, None]


def _pad_tokens(x: Tensor) -> Tensor:
    return torch.nn.functional.pad(x, (0, 0, 0, -x.shape[2] % _TOKEN_PADDING))


def _round_trip_nvfp4(x: Tensor, four_over_six: bool) -> Tensor:
    values, scales = quantize_groups(split_last_axis(x, NVFP4_GROUP), four_over_six=four_over_six)
    return (values * scales).flatten(-2)


def _round_trip_qk(x: Tensor, qk: QKFormat, int8_rows: int, four_over_six: bool = False) -> Tensor:
    """Quantise along head_dim and back; the padding that a group needs is cut off again."""
    head_dim = x.shape[-1]
    if qk == "nvfp4":
        return _round_trip_nvfp4(pad_last_axis(x, NVFP4_GROUP), four_over_six)[..., :head_dim]
    if qk == "mxfp8":
        return dequantize_mxfp8(quantize_mxfp8(pad_last_axis(x, MXFP8_GROUP)))[..., :head_dim]
    if qk == "int8":
        return dequantize_int8(quantize_int8(x, block=int8_rows))
    return x


def _round_trip_v(x: Tensor, pv: PVFormat, four_over_six: bool = False) -> Tensor:
    """Quantise along the tokens and back."""
    if pv == "nvfp4":
        return _round_trip_nvfp4(x.transpose(-1, -2), four_over_six).transpose(-1, -2)
    if pv == "fp8":
        return dequantize_fp8(quantize_fp8(x, dim=-2))
    if pv == "fp16":
        return x.half().float()
    return x


def round_p(powers: Tensor, recipe: Recipe) -> Tensor:
    """Round the stretched softmax weights 2^powers (two-level quantisation, section 3.2)."""
    weights = _exp2(powers, recipe)
    if recipe.pv == "nvfp4":
        groups = split_last_axis(weights, NVFP4_GROUP)
        values, scales = quantize_groups(groups, four_over_six="p" in recipe.four_over_six)
        if not recipe.rounded_divisor:
            divisor = divide(group_absmax(groups), E2M1_MAX)
            values = round_to_e2m1(torch.where(scales > 0, groups / divisor, 0.0))
        if recipe.linear_exp_of_8:
            line = _line_exp2(split_last_axis(powers, NVFP4_GROUP) - scales.log2(), _E2M1_LINE_OFFSET)
            line = line.where(scales > 0, 0.0)
            is_linear = torch.arange(NVFP4_GROUP, device=powers.device) % 8 >= 8 - recipe.linear_exp_of_8
            values = torch.where(is_linear, round_to_e2m1(line), values)
        return (values * scales).flatten(-2)
    if recipe.pv == "fp8":
        return round_to_e4m3(weights)
    if recipe.pv == "fp16":
        return weights.half().float()
    return weights


def _exp2(powers: Tensor, recipe: Recipe) -> Tensor:
    """2^powers, for E4M3 in part by lines: those of evenly spread groups of 16 keys."""
    if recipe.pv != "fp8" or not recipe.linear_exp_of_8:
        return powers.exp2()
    group = torch.arange(powers.shape[-1], device=powers.device) // 16
    is_linear = group * recipe.linear_exp_of_8 % 8 + recipe.linear_exp_of_8 >= 8
    return torch.where(is_linear, _line_exp2_e4m3(powers), powers.exp2())


def _line_exp2_e4m3(power: Tensor) -> Tensor:
    """2^power by a straight line between powers of two, as E4M3 codes, of which 8 make a power of two."""
    codes = ((power + (7 - _E4M3_LINE_OFFSET)) * 8).clamp(0, _LARGEST_E4M3_CODE).round()
    return codes.to(torch.uint8).view(torch.float8_e4m3fn).float()


def _line_exp2(power: Tensor, offset: int) -> Tensor:
    """2^power by a straight line between powers of two: power in fixed point is the bits of a float32 (Schraudolph)."""
    fixed = torch.round(power.clamp(-_LINE_RANGE, _LINE_RANGE) * 8192).int() + (127 * 8192 - offset)
    return (fixed << 10).view(torch.float32)
