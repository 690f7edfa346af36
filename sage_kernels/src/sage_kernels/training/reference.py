"""Trainable attention in plain PyTorch, forward and backward: the definition of what the INT8 and FP8 kernels compute.

Written for reading and testing, with whole score matrices in float32; memory grows with the square of the length.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from sage_kernels.formats.fp8_e4m3 import E4M3_MAX, round_to_e4m3
from sage_kernels.formats.grouping import divide
from sage_kernels.formats.int8 import INT8_MAX
from sage_kernels.training.recipe import TrainingRecipe


@dataclass(frozen=True, eq=False)
class SavedForward:
    """What the backward pass needs. Tensors are [B, H, N, D] and, of K and V, [B, Hkv, Nk, D].

    Attributes:
        query, key: as the matmuls see them: dequantised, K without its mean.
        query_exact, key_exact: before quantising.
        key_mean: [B, Hkv, 1, D].
        value: in 16 bit.
        output: in the input's dtype.
        lse: natural log, float32 [B, H, Nq], of the scores without the mean key's part.
    """

    query: Tensor
    key: Tensor
    query_exact: Tensor
    key_exact: Tensor
    key_mean: Tensor
    value: Tensor
    output: Tensor
    lse: Tensor
    is_causal: bool
    scale: float


def forward(
    q: Tensor, k: Tensor, v: Tensor, recipe: TrainingRecipe, *, is_causal: bool = False, scale: float | None = None
) -> SavedForward:
    """softmax(q k^T * scale) v.

    Args:
        q: [B, H, Nq, D], float16 or bfloat16.
        k, v: [B, Hkv, Nk, D]; H is a multiple of Hkv.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    mean = k.float().mean(2, keepdim=True) if recipe.smooth_k else torch.zeros_like(k[:, :, :1], dtype=torch.float32)
    query, key, value = q.float(), k.float() - mean, v.float()
    query_codes, key_codes = query, key
    if "qk" not in recipe.exact:
        query_codes = quantized(query, recipe, (recipe.query_tile, query.shape[-1]))
        key_codes = quantized(key, recipe, (recipe.key_tile, key.shape[-1]))
    scores = _scores(query_codes, key_codes, is_causal, scale)
    lse = scores.logsumexp(-1)
    weights = (scores - lse[..., None]).exp()
    value_codes = value
    if "pv" not in recipe.exact:
        weights = quantized(weights, recipe, (1, recipe.forward_keys))
        value_codes = quantized(value, recipe, (recipe.key_tile, value.shape[-1]))
    output = (weights @ _expand(value_codes, query)).to(q.dtype)
    return SavedForward(query_codes, key_codes, query, key, mean, value, output, lse, is_causal, scale)


def backward(saved: SavedForward, d_output: Tensor, recipe: TrainingRecipe) -> tuple[Tensor, Tensor, Tensor]:
    """dQ [B, H, Nq, D], dK and dV [B, Hkv, Nk, D] in float32 for the gradient [B, H, Nq, D] of the output."""
    group = saved.query.shape[1] // saved.key.shape[1]
    d_out = d_output.float()
    delta = (d_out * saved.output.float()).sum(-1, keepdim=True)
    scores = _scores(saved.query, saved.key, saved.is_causal, saved.scale)
    weights = (scores - saved.lse[..., None]).exp()

    d_out_codes = quantized(d_out, recipe, (recipe.query_tile, d_out.shape[-1]))
    if "dp" in recipe.exact:
        d_weights = d_out @ _expand(saved.value, d_out).mT
    else:
        value_codes = quantized(saved.value, recipe, (recipe.key_tile, saved.value.shape[-1]))
        d_weights = d_out_codes @ _expand(value_codes, d_out).mT
    d_weights = d_weights - delta
    key_exact = saved.key_exact
    if recipe.rounds:
        weights, d_weights, key_exact = (_in_16bit(x, saved) for x in (weights, d_weights, key_exact))
    d_scores = weights * d_weights
    if recipe.rounds:
        d_scores = _in_16bit(d_scores, saved)

    columns = (recipe.backward_queries, 1)
    d_value = _product(weights, columns, d_out, d_out_codes, recipe, "dv", transpose=True)
    query = saved.query if "qk" not in recipe.exact else quantized(saved.query, recipe, (recipe.query_tile, -1))
    d_key = _product(d_scores, columns, saved.query_exact, query, recipe, "dk", transpose=True) * saved.scale
    key = quantized(saved.key_exact, recipe, (-1, 1) if recipe.channel_keys else (recipe.key_tile, -1))
    operands = (_expand(key_exact, d_out), _expand(key, d_out))
    d_query = _product(d_scores, (1, recipe.backward_keys), *operands, recipe, "dq") * saved.scale
    if recipe.return_mean:
        d_query += d_scores.sum(-1, keepdim=True) * _expand(saved.key_mean, d_out) * saved.scale
    return d_query, _sum_groups(d_key, group), _sum_groups(d_value, group)


def quantized(x: Tensor, recipe: TrainingRecipe, block: tuple[int, int]) -> Tensor:
    """The numbers that the codes of [..., n, d] stand for, with one scale for each block; -1 is the whole axis.

    A block with a NaN or an infinity becomes NaN, one of zeros stays zero.
    """
    rows, columns = x.shape[-2:]
    height, width = (size if size != -1 else whole for size, whole in zip(block, (rows, columns), strict=True))
    padded = torch.nn.functional.pad(x, (0, -columns % width, 0, -rows % height))
    shape = (*x.shape[:-2], padded.shape[-2] // height, height, padded.shape[-1] // width, width)
    blocks = padded.reshape(shape)
    absmax = blocks.abs().amax((-3, -1), keepdim=True)
    limit = INT8_MAX if recipe.number == "int8" else E4M3_MAX
    scales = divide(torch.where(absmax.isfinite(), absmax, torch.nan), limit)
    codes = torch.where(scales > 0, blocks / scales, 0.0)
    codes = codes.round() if recipe.number == "int8" else round_to_e4m3(codes)
    return (codes * scales).flatten(-2).flatten(-3, -2)[..., :rows, :columns]


def _in_16bit(x: Tensor, saved: SavedForward) -> Tensor:
    return x.to(saved.output.dtype).float()


def _scores(query: Tensor, key: Tensor, is_causal: bool, scale: float) -> Tensor:
    scores = query @ _expand(key, query).mT * scale
    if is_causal:
        hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
        scores = scores.masked_fill(hidden, -torch.inf)
    return scores


def _product(
    left: Tensor,
    block: tuple[int, int],
    exact: Tensor,
    codes: Tensor,
    recipe: TrainingRecipe,
    name: str,
    transpose: bool = False,
) -> Tensor:
    if name in recipe.exact:
        right = exact
    else:
        left, right = quantized(left, recipe, block), codes
    return (left.mT if transpose else left) @ right


def _expand(x: Tensor, query: Tensor) -> Tensor:
    """Heads of K or V repeated for the query heads that share them."""
    return x.repeat_interleave(query.shape[1] // x.shape[1], dim=1)


def _sum_groups(x: Tensor, group: int) -> Tensor:
    batch, heads, rows, columns = x.shape
    return x.reshape(batch, heads // group, group, rows, columns).sum(2)
