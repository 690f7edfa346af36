"""The cache in plain PyTorch, on any device: the definition that its Triton kernels are tested against."""

import torch
from torch import Tensor

from sage_kernels.formats.grouping import group_absmax, split_last_axis
from sage_kernels.formats.nvfp4 import encode_e2m1, pack_e2m1, quantize_groups, unpack_e2m1
from sage_kernels.kv_cache.storage import MEAN_TOKENS, TOP_EXPONENT, CachedOperand


def append(
    key: CachedOperand,
    value: CachedOperand,
    k: Tensor,
    v: Tensor,
    counts: Tensor | None,
    lengths: Tensor,
    written: Tensor,
    rotation: Tensor | None,
    capacity: int,
    rolling: bool,
) -> None:
    """Quantise new tokens behind those that are there.

    Args:
        key, value, lengths, written: changed in place; lengths int32 [B] is what attention sees, written int32 [B] what
            was ever appended, which differs where rolling.
        k, v: [B, Hkv, n, D].
        counts: int32 [B]: sequence b takes its first counts[b] tokens (clamped to 0..n); None: all.
        rotation: float32 [D, D], by which keys are multiplied; None: they are not.
        capacity: tokens of a sequence at most; others are dropped, or where rolling take the place of the oldest.
    """
    tokens = k.shape[2]
    each = torch.full_like(lengths, tokens) if counts is None else counts.clamp(0, tokens)
    for operand, x, matrix in ((key, k, rotation), (value, v, None)):
        begin_sequences(operand, x, matrix, each, lengths)
        append_tokens(operand, x if matrix is None else x.float() @ matrix, each, written, capacity, rolling)
    written += each
    if not rolling:
        written.clamp_(max=capacity)
    torch.clamp(written, max=capacity, out=lengths)


def begin_sequences(
    operand: CachedOperand, x: Tensor, rotation: Tensor | None, counts: Tensor, lengths: Tensor
) -> None:
    """Fix what is subtracted from sequences that hold nothing yet, from their first tokens, and their scale.

    The scale is that of the tokens before they are rotated, which enlarges a number by 2^4 at most.

    Args:
        operand: changed in place.
        x: [B, Hkv, n, D], not rotated; rotation as in append().
        counts: int32 [B], how many of the n tokens each sequence has.
        lengths: int32 [B], before.
    """
    valid = (torch.arange(x.shape[2], device=x.device) < counts[:, None])[:, None, :, None]
    values = x.float().where(valid, 0.0)
    means = values.sum(dim=2) / counts.clamp_min(1)[:, None, None]
    if rotation is not None:
        means = means @ rotation
    means = torch.where((counts >= MEAN_TOKENS)[:, None, None] & means.isfinite(), means, 0.0)
    absmax = values.abs().where(values.isfinite(), 0.0).flatten(2).amax(dim=-1)
    power = (TOP_EXPONENT - torch.frexp(absmax).exponent).clamp(-126, 126)
    scales = torch.where(absmax > 0, torch.ldexp(torch.ones_like(absmax), power), 1.0)
    begins = (lengths == 0) & (counts > 0)
    operand.means.copy_(torch.where(begins[:, None, None], means, operand.means))
    operand.head_scales.copy_(torch.where(begins[:, None], scales, operand.head_scales))


def append_tokens(
    operand: CachedOperand, x: Tensor, counts: Tensor, written: Tensor, capacity: int, rolling: bool
) -> None:
    """Quantise x [B, Hkv, n, D] into the places that follow `written` [B]; codes and scales are changed in place."""
    group = x.shape[-1] // operand.scales.shape[-1]
    shifted = (x.float() - operand.means[:, :, None]) * operand.head_scales[:, :, None, None]
    groups = split_last_axis(shifted, group)
    values, scales = quantize_groups(groups, four_over_six=True)
    finite = torch.isfinite(group_absmax(groups))
    # The sign of what rounds to zero is kept, as a kernel that moves the sign bit keeps it.
    codes = encode_e2m1(torch.copysign(values, torch.where(finite, groups, 0.0)))
    packed = pack_e2m1(codes.flatten(-2))
    bits = scales.squeeze(-1).to(torch.float8_e4m3fn).view(torch.uint8)
    bits = torch.where(finite.squeeze(-1), bits, 0x7F).to(torch.uint8)
    for row, (count, start) in enumerate(zip(counts.tolist(), written.tolist(), strict=True)):
        places = torch.arange(start, start + count, device=x.device)
        places = places % capacity if rolling else places[places < capacity]
        operand.codes[row, :, places] = packed[row, :, : len(places)]
        operand.scales[row, :, places] = bits[row, :, : len(places)]


def dequantize(operand: CachedOperand) -> Tensor:
    """float32 [B, Hkv, N', D], the mean and the scale put back."""
    groups = split_last_axis(unpack_e2m1(operand.codes), operand.codes.shape[-1] * 2 // operand.scales.shape[-1])
    scales = operand.scales.view(torch.float8_e4m3fn).float()
    values = (groups * scales.unsqueeze(-1)).flatten(-2)
    return values / operand.head_scales[:, :, None, None] + operand.means[:, :, None]


def attend(
    query: Tensor, key: CachedOperand, value: CachedOperand, lengths: Tensor, *, scale: float, is_causal: bool
) -> tuple[Tensor, Tensor]:
    """Exact attention in float32 to what the cache holds, one sequence at a time.

    Returns:
        output float32 [B, H, Nq, D] and natural-log LSE float32 [B, H, Nq]; 0 and -inf where there is nothing to see.
    """
    batch, heads, rows, _ = query.shape
    output = query.new_zeros(query.shape, dtype=torch.float32)
    lse = query.new_full((batch, heads, rows), -torch.inf, dtype=torch.float32)
    keys, values = dequantize(key), dequantize(value)
    repeats = heads // keys.shape[1]
    for index, length in enumerate(lengths.tolist()):
        if length == 0:
            continue
        k, v = (x[index, :, :length].repeat_interleave(repeats, dim=0) for x in (keys, values))
        scores = query[index].float() @ k.transpose(-1, -2) * scale
        if is_causal:
            limits = length - rows + torch.arange(rows, device=query.device)
            scores = scores.masked_fill(torch.arange(length, device=query.device) > limits[:, None], -torch.inf)
        lse[index] = torch.logsumexp(scores, dim=-1)
        weights = torch.exp(scores - lse[index].unsqueeze(-1)).nan_to_num(0.0) if is_causal else scores.softmax(dim=-1)
        output[index] = weights @ v
    return output, lse
