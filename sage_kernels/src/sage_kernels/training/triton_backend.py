"""Launches of the Triton training kernels: three for the forward pass, three for the backward pass.

All but the first, sum_keys, give way to sm90_backend's where it serves the call, unless a config is given.

Triton is imported by the first call: it may be missing (Windows, CPU builds of torch), and it is slow to load.
"""

import torch
from torch import Tensor

from sage_kernels.architectures import device_architecture
from sage_kernels.training import sm90_backend
from sage_kernels.training.configs import TrainingConfig, find_config
from sage_kernels.training.recipe import RECIPES
from sage_kernels.training.saved import Saved
from sage_kernels.training.triton_launch import on_device

_CHUNKS = 16  # pieces of a head's keys that are summed up side by side for their mean
CODES = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}


def padded_head_dim(head_dim: int) -> int:
    """head_dim rounded up to what one MMA step takes and Triton allows: a power of two, at least 32."""
    return max(32, 1 << (head_dim - 1).bit_length())


def in_cuda(q: Tensor, precision: str) -> bool:
    """Whether sm90_backend serves q [B, H, Nq, D]; what has no keys or queries is left to Triton nevertheless."""
    return sm90_backend.serves(q.device, q.shape[3], padded_head_dim(q.shape[3]), q.dtype, precision)


def empty_saved(q: Tensor, k: Tensor, precision: str, in_cuda: bool) -> Saved:
    """Uninitialised, for q [B, H, Nq, D] and k [B, Hkv, Nk, D]."""
    recipe, block_d = RECIPES[precision], padded_head_dim(q.shape[3])
    query_tiles, key_tiles = -(-q.shape[2] // recipe.query_tile), -(-k.shape[2] // recipe.key_tile)
    query_heads, kv_heads = q.shape[0] * q.shape[1], k.shape[0] * k.shape[1]
    return Saved(
        q.new_empty((query_heads, query_tiles * recipe.query_tile), dtype=torch.float32),
        q.new_empty((query_heads, query_tiles * recipe.query_tile, block_d), dtype=CODES[precision]),
        q.new_empty((query_heads, query_tiles), dtype=torch.float32),
        q.new_empty((kv_heads, key_tiles * recipe.key_tile, block_d), dtype=CODES[precision]),
        q.new_empty((kv_heads, key_tiles), dtype=torch.float32),
        q.new_empty(0 if in_cuda else (kv_heads, key_tiles, block_d, recipe.key_tile), dtype=CODES[precision]),
        q.new_empty(0 if in_cuda else (kv_heads, block_d), dtype=torch.float32),
        q.new_empty((kv_heads, key_tiles * recipe.key_tile, block_d) if in_cuda else 0, dtype=torch.int16),
        q.new_empty((kv_heads, key_tiles) if in_cuda else 0, dtype=torch.float32),
    )


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    output: Tensor,
    is_causal: bool,
    scale: float,
    precision: str,
    config: TrainingConfig | None = None,
) -> Saved:
    """Fill `output` [B, H, Nq, D] (last axis contiguous) with softmax(q k^T * scale) v of 16-bit inputs."""
    from sage_kernels.training.triton_kernels import forward as kernels  # noqa: PLC0415 as the module says
    from sage_kernels.training.triton_kernels import quantize  # noqa: PLC0415

    recipe, fp8 = RECIPES[precision], precision == "fp8"
    batch, heads, query_length, head_dim = q.shape
    kv_heads, key_length = k.shape[1:3]
    cuda = config is None and in_cuda(q, precision)
    saved = empty_saved(q, k, precision, cuda)
    if q.numel() == 0:
        return saved
    block_d = saved.query.shape[2]
    config = config or find_config(device_architecture(q.device), block_d)
    query_tiles, key_tiles = saved.query_scales.shape[1], saved.key_scales.shape[1]
    value_codes = torch.empty_like(saved.key)
    value_scales = saved.value_scales if saved.value_scales.numel() else torch.empty_like(saved.key_scales)
    rows = 32 if block_d > 64 else 64
    steps = -(-key_length // rows)
    partials = saved.lse.new_empty((3, batch * kv_heads, _CHUNKS, block_d))  # sums, largest and smallest
    with on_device(q.device):
        quantize.sum_keys[(batch * kv_heads * _CHUNKS,)](
            k, *partials, *k.stride(), kv_heads, key_length, -(-steps // _CHUNKS),
            HEAD_DIM=head_dim, BLOCK_D=block_d, ROWS=rows, CHUNKS=_CHUNKS, num_warps=4,
        )  # fmt: skip
        if cuda and k.numel():
            sm90_backend.quantize(q, k, v, partials[0], saved, value_codes, value_scales, _sign(scale))
            sm90_backend.attend(saved, value_codes, value_scales, output, key_length, is_causal, scale)
            return saved
        query_programs = batch * heads * query_tiles
        key_programs = batch * kv_heads * key_tiles
        quantize.quantize_inputs[(query_programs + 3 * key_programs,)](
            q, k, v, *partials, saved.query, saved.query_scales, saved.key, saved.key_scales,
            saved.key_transposed, saved.channel_scales, value_codes, value_scales,
            *q.stride(), *k.stride(), *v.stride(), heads, kv_heads, query_length, key_length,
            query_tiles, key_tiles, query_programs, key_programs, _sign(scale),
            HEAD_DIM=head_dim, BLOCK_D=block_d, QUERY_TILE=recipe.query_tile, KEY_TILE=recipe.key_tile, CHUNKS=_CHUNKS,
            FP8=fp8, num_warps=4,
        )  # fmt: skip
        blocks = -(-query_length // config.forward.block_m)
        kernels.attend[(batch * heads * blocks,)](
            saved.query, saved.query_scales, saved.key, saved.key_scales, value_codes, value_scales, output, saved.lse,
            abs(scale), heads, kv_heads, query_length, key_length, query_tiles, key_tiles, blocks, *output.stride()[:3],
            HEAD_DIM=head_dim, BLOCK_D=block_d, BLOCK_M=config.forward.block_m, BLOCK_N=config.forward.block_n,
            QUERY_TILE=recipe.query_tile, KEY_TILE=recipe.key_tile, CAUSAL=is_causal, FP8=fp8,
            num_warps=config.forward.warps, num_stages=config.forward.stages,
        )  # fmt: skip
    return saved


def backward(
    d_output: Tensor,
    q: Tensor | None,
    v: Tensor,
    output: Tensor,
    saved: Saved,
    is_causal: bool,
    scale: float,
    precision: str,
    config: TrainingConfig | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """dQ [B, H, Nq, D], dK and dV [B, Hkv, Nk, D], contiguous, in the dtype of `output`.

    q [B, H, Nq, D] is needed by sm90_backend.
    """
    from sage_kernels.training.triton_kernels import backward as kernels  # noqa: PLC0415 as the module says
    from sage_kernels.training.triton_kernels import quantize  # noqa: PLC0415

    recipe, fp8 = RECIPES[precision], precision == "fp8"
    batch, heads, query_length, head_dim = output.shape
    kv_heads, key_length = v.shape[1:3]
    if output.numel() == 0:
        return output.new_empty(output.shape), v.new_zeros(v.shape), v.new_zeros(v.shape)
    if config is None and v.numel() and in_cuda(output, precision):
        assert q is not None
        return sm90_backend.backward(d_output, q, v, output, saved, is_causal, scale)
    # The kernels that multiply load rows of whole vectors.
    d_output, v = (x if x.stride(3) == 1 else x.contiguous() for x in (d_output, v))
    d_query = torch.empty(output.shape, dtype=output.dtype, device=output.device)
    d_key, d_value = (torch.empty(v.shape, dtype=v.dtype, device=v.device) for _ in range(2))
    block_d = saved.query.shape[2]
    config = config or find_config(device_architecture(v.device), block_d)
    query_tiles, key_tiles = saved.query_scales.shape[1], saved.key_scales.shape[1]
    query_transposed = torch.empty_like(saved.query)
    d_output_codes, d_output_scales = torch.empty_like(saved.query), torch.empty_like(saved.query_scales)
    delta = torch.empty_like(saved.lse)
    tiles = {"QUERY_TILE": recipe.query_tile, "KEY_TILE": recipe.key_tile, "FP8": fp8}
    dims = {"HEAD_DIM": head_dim, "BLOCK_D": block_d}
    sizes = (heads, kv_heads, query_length, key_length, query_tiles, key_tiles)
    strides = (*v.stride()[:3], *d_output.stride()[:3])
    with on_device(v.device):
        quantize.prepare_backward[(batch * heads * query_tiles,)](
            d_output, output, saved.query, d_output_codes, d_output_scales, delta, query_transposed,
            *d_output.stride(), *output.stride(), heads, query_length, query_tiles,
            **dims, QUERY_TILE=recipe.query_tile, FP8=fp8, num_warps=4,
        )  # fmt: skip
        blocks, block = -(-key_length // config.key_value.block_n), config.key_value
        kernels.key_value_gradients[(batch * kv_heads * blocks,)](
            saved.query, query_transposed, saved.query_scales, saved.key, saved.key_scales, v,
            d_output, d_output_codes, d_output_scales, saved.lse, delta, d_key, d_value, abs(scale), *sizes, blocks,
            *strides, **dims, BLOCK_M=block.block_m, BLOCK_N=block.block_n, CAUSAL=is_causal,
            SPLIT=config.split_head_dim, **tiles, num_warps=block.warps, num_stages=block.stages,
        )  # fmt: skip
        blocks, block = -(-query_length // config.query.block_m), config.query
        kernels.query_gradients[(batch * heads * blocks,)](
            saved.query, saved.query_scales, saved.key, saved.key_transposed, saved.key_scales,
            saved.channel_scales, v, d_output, saved.lse, delta, d_query, abs(scale), _sign(scale), *sizes, blocks,
            *strides, **dims, BLOCK_M=block.block_m, BLOCK_N=block.block_n, CAUSAL=is_causal, **tiles,
            num_warps=block.warps, num_stages=block.stages,
        )  # fmt: skip
    return d_query, d_key, d_value


def _sign(scale: float) -> float:
    """A negative softmax scale goes into the codes of Q: running maxima need positive factors."""
    return -1.0 if scale < 0 else 1.0
