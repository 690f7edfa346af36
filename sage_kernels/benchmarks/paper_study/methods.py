"""Everything that is compared, as functions of Q, K and V: recipes, input transforms, 4-bit caches of other work."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sage_kernels.formats.nvfp4 import dequantize_nvfp4, quantize_nvfp4
from sage_kernels.kv_cache import KVCache
from sage_kernels.recipes import RECIPES, SAGE_ATTENTION_3, SAGE_ATTENTION_3_PUBLISHED, Recipe
from sage_kernels.reference import (
    QuantizedOperands,
    attend,
    attention_fp32,
    power_of_two_scale,
    quantize_operands,
    quantized_attention,
)
from sage_kernels.score_mask import ScoreMask

Function = Callable[[Tensor, Tensor, Tensor], Tensor]
Transform = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
PUBLISHED = SAGE_ATTENTION_3_PUBLISHED
UNSMOOTHED = replace(PUBLISHED, smooth_q_rows=0, smooth_k=False)
OURS = RECIPES["fp4"]


@dataclass(frozen=True)
class Method:
    """A row of a table."""

    name: str
    call: Function


def by_recipe(name: str, recipe: Recipe, transform: Transform | None = None) -> Method:
    """The quantised reference, on Q and K as they are or transformed so that Q K^T stays."""

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k = (q.float(), k.float()) if transform is None else transform(q.float(), k.float())
        return quantized_attention(q, k, v, recipe)[0]

    return Method(name, call)


def smooth_quant(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """SmoothQuant with alpha 0.5: each channel's range is shared evenly between Q and K."""
    ratio = (q.abs().amax(2, keepdim=True) / k.abs().amax(2, keepdim=True).clamp_min(1e-6)).clamp_min(1e-6).sqrt()
    return q / ratio, k * ratio


def rotate(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """Hadamard matrix with random signs; it commutes with subtracting means, so before or after smoothing is one."""
    size = 1 << (q.shape[-1] - 1).bit_length()
    matrix = torch.ones(1, 1, device=q.device)
    while matrix.shape[0] < size:
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)), 0)
    signs = torch.randint(0, 2, (size,), generator=torch.Generator().manual_seed(0)).float() * 2 - 1
    matrix = matrix * signs.to(q.device)[:, None] / size**0.5
    padding = (0, size - q.shape[-1])
    return torch.nn.functional.pad(q, padding) @ matrix, torch.nn.functional.pad(k, padding) @ matrix


def unsigned_int4(x: Tensor) -> Tensor:
    """Asymmetric INT4 round trip with one float16 scale and zero point for each token of a head."""
    low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    scale = ((high - low) / 15).clamp_min(1e-8).half().float()
    zero = (-low / scale).round().clamp(0, 15)
    return ((x / scale + zero).round().clamp(0, 15) - zero) * scale


def atom_cache(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """As Atom (MLSys 2024): asymmetric INT4 keys and values per token and head, attention in 16 bit."""
    return attention_fp32(q.float(), unsigned_int4(k.float()), unsigned_int4(v.float()))[0]


def qserve_cache(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """As QServe (MLSys 2025): the same with SmoothAttention, channels of K divided by the root of their range."""
    key = k.float()
    factor = key.abs().amax(2, keepdim=True).clamp_min(1e-6).sqrt()
    return attention_fp32(q.float() * factor, unsigned_int4(key / factor), unsigned_int4(v.float()))[0]


def quarot_cache(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """As QuaRot (NeurIPS 2024): the same with K and Q rotated by a Hadamard matrix."""
    query, key = rotate(q.float(), k.float())
    scale = q.shape[-1] ** -0.5
    return attention_fp32(query, unsigned_int4(key), unsigned_int4(v.float()), scale=scale)[0]


def our_cache(group: int, rotate_keys: bool = True) -> Function:
    """KVCache: NVFP4 keys and values, attention in 16 bit; narrower heads are padded with zeros."""

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        head_dim = q.shape[-1]
        q, k, v = (torch.nn.functional.pad(x.float(), (0, max(0, 64 - head_dim))) for x in (q, k, v))
        cache = KVCache(
            k.shape[0], k.shape[1], k.shape[2], k.shape[3], device=q.device, group=group, rotate_keys=rotate_keys
        )
        cache.append(k, v)
        output = attention_fp32(q, *cache.dequantize(), scale=head_dim**-0.5)[0]
        return output[..., :head_dim]

    return call


def int8_pv(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """P in INT8 with the fixed scale 1 / 127, V in INT8 with a scale for each channel, Q K^T exact."""
    scores = q.float() @ k.float().transpose(-1, -2) * q.shape[-1] ** -0.5
    weights = torch.exp(scores - scores.amax(-1, keepdim=True))
    weights = (weights * 127).round() / 127
    scale = v.float().abs().amax(2, keepdim=True).clamp_min(1e-8) / 127
    return weights @ ((v.float() / scale).round() * scale) / weights.sum(-1, keepdim=True)


def fp8_tensor_scales(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """As FlashAttention-3's FP8: Q, K, V in E4M3 with one scale for each head, P in E4M3, no smoothing."""

    def rounded(x: Tensor) -> Tensor:
        scale = x.float().abs().amax((2, 3), keepdim=True).clamp_min(1e-8) / 448
        return (x.float() / scale).to(torch.float8_e4m3fn).float() * scale

    recipe = Recipe("none", "fp8", smooth_k=False)
    operands = quantize_operands(rounded(q), rounded(k), v, recipe)
    return _attend(replace(operands, value=_padded(rounded(v), operands)), recipe, q, k)


def low_rank_means(rank: int) -> Function:
    """SageAttention3 with means of 128 rows replaced by their best approximation of `rank`; the rows keep the rest."""

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        recipe = replace(SAGE_ATTENTION_3, smooth_v=True)
        operands = quantize_operands(q, k, v, recipe)
        assert operands.query_means is not None
        u, s, w = torch.linalg.svd(operands.query_means, full_matrices=False)
        means = u[..., :rank] * s[..., None, :rank] @ w[..., :rank, :]
        rest = q.float() - means.repeat_interleave(recipe.smooth_q_rows, dim=2)[:, :, : q.shape[2]]
        scale = power_of_two_scale(rest, recipe.smooth_q_rows)
        query = dequantize_nvfp4(quantize_nvfp4(rest * scale)) / scale
        return _attend(replace(operands, query=query, query_means=means), recipe, q, k)

    return call


def _attend(operands: QuantizedOperands, recipe: Recipe, q: Tensor, k: Tensor) -> Tensor:
    mask = ScoreMask(None, False, None, k.shape[2])
    return attend(operands, mask, recipe, q.shape[-1] ** -0.5)[0]


def _padded(value: Tensor, operands: QuantizedOperands) -> Tensor:
    return torch.nn.functional.pad(value, (0, 0, 0, operands.value.shape[2] - value.shape[2]))
