"""FP4 attention in Triton for sm_100 and sm_103 (B200, B300): compiled for them, never run there.

What runs on the GPUs that were at hand is the same code with its block-scaled products done in 16 bit, in which the
operands are exact. That makes it a second, independent implementation of the recipe to check the CUDA kernel with.
"""

import importlib.util
import math
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor

from sage_kernels.architectures import Architecture
from sage_kernels.attention_call import AttentionCall
from sage_kernels.formats import E2M1_MAX, E4M3_MAX, NVFP4Tensor, dequantize_nvfp4, quantize_nvfp4
from sage_kernels.precision import Precision
from sage_kernels.recipes import RECIPES, Recipe
from sage_kernels.reference import power_of_two_scale

ARCHITECTURES = ("sm_100a", "sm_103a")
HEAD_DIMS = (64, 128)
OLDEST_TRITON = (3, 9)  # older ones can't compile the chain of products for tcgen05
QUERY_TILE = 128
# tcgen05 contracts 64 keys or more at a time.
RECIPE = replace(RECIPES["fp4"], key_block=128, linear_exp_of_8=0)


@dataclass(frozen=True, eq=False)
class Operands:
    """Q, K and V in NVFP4 and what restores them; rows padded to whole tiles, float tensors float32.

    Attributes:
        query: along head_dim, [B, H, Nq', D].
        means: of blocks of rows, [B, H, Nq' / rows, D].
        query_factors: [B, H, Nq' / rows], what one unit of query and means is worth.
        key, residual: both digits of K along head_dim, [B, Hkv, Nk', D].
        key_factors: [B, Hkv].
        value: along the tokens, [B, Hkv, D, Nk'].
        value_factors: [B, Hkv].
        value_means: [B, Hkv, D].
        lse_shifts: [B, H, Nq], q . mean(k).
    """

    query: NVFP4Tensor
    means: NVFP4Tensor
    query_factors: Tensor
    key: NVFP4Tensor
    residual: NVFP4Tensor
    key_factors: Tensor
    value: NVFP4Tensor
    value_factors: Tensor
    value_means: Tensor
    lse_shifts: Tensor


@dataclass(frozen=True, eq=False)
class _State:
    operands: Operands
    query_length: int
    key_length: int
    is_causal: bool
    scale: float
    dtype: torch.dtype
    return_lse: bool


@dataclass(frozen=True)
class NVFP4TritonKernel:
    """SageAttention3 with `tl.dot_scaled`.

    Attributes:
        recipe: NVFP4 with all smoothing, delta_s from quantised operands, key_block 64 or 128.
        dot_scaled: False does the block-scaled products in float16 instead, for tests on other GPUs.

    Raises:
        ValueError: another recipe.
    """

    recipe: Recipe = RECIPE
    dot_scaled: bool = True
    name: str = "nvfp4_triton"
    precision: Precision = "fp4"
    emulated: bool = False

    def __post_init__(self) -> None:
        recipe = self.recipe
        smoothed = recipe.smooth_k and recipe.smooth_v and recipe.smooth_q_rows and recipe.quantized_delta
        if (recipe.qk, recipe.pv) != ("nvfp4", "nvfp4") or not smoothed or recipe.linear_exp_of_8:
            raise ValueError("nvfp4_triton computes NVFP4 with all smoothing, quantized_delta and no linear_exp_of_8")
        if "p" in recipe.four_over_six:
            raise ValueError("nvfp4_triton takes one scale for each group of P: four_over_six is for Q, K and V")
        if recipe.key_block not in (64, 128) or QUERY_TILE % recipe.smooth_q_rows:
            raise ValueError(
                f"nvfp4_triton takes key_block 64 or 128 and smooth_q_rows that divide {QUERY_TILE}, got "
                f"{recipe.key_block} and {recipe.smooth_q_rows}"
            )

    def refuse(self, call: AttentionCall, architecture: Architecture | None) -> str | None:
        """Refuse all but the plain and the causal case on the architectures that it is compiled for."""
        if architecture is None or architecture.target not in ARCHITECTURES:
            return f"is compiled for {' and '.join(ARCHITECTURES)} (B200, B300) only"
        if call.precision == "auto":
            return "is compiled for this GPU, never run on one; ask for it with precision='fp4'"
        if call.needs_grad:
            return "the inputs require gradients; use trainable_attention or precision='fp16'"
        if call.attn_mask is not None or call.key_lengths is not None:
            return "takes no attn_mask and no key_lengths"
        if call.head_dim not in HEAD_DIMS:
            return f"head_dim must be {' or '.join(map(str, HEAD_DIMS))}, got {call.head_dim}"
        return triton_refusal()

    def prepare(self, call: AttentionCall) -> _State:
        """Smooth and quantise; float32 inputs are rounded to bfloat16 first."""
        query, key, value = call.query, call.key, call.value
        if query.dtype == torch.float32:
            query, key, value = query.bfloat16(), key.bfloat16(), value.bfloat16()
        operands = quantize(query.float(), key.float(), value.float(), self.recipe)
        return _State(
            operands,
            call.query_length,
            call.key_length,
            call.is_causal,
            call.scale,
            call.query.dtype,
            call.return_lse,
        )

    def run(self, state: Any) -> tuple[Tensor, Tensor | None]:
        """One launch."""
        from sage_kernels.kernels import triton_nvfp4  # noqa: PLC0415 Triton may be missing, and is slow to load

        operands: Operands = state.operands
        query, key = operands.query.codes, operands.key.codes
        batch, heads, padded_queries, packed_dim = query.shape
        output = query.new_empty((batch, heads, state.query_length, 2 * packed_dim), dtype=state.dtype)
        lse = query.new_empty(output.shape[:3], dtype=torch.float32)
        if output.numel() == 0:
            return output, lse if state.return_lse else None
        stretch = math.log2(E4M3_MAX * E2M1_MAX) - self.recipe.rescale_threshold
        with torch.cuda.device(query.device if query.is_cuda else -1):
            triton_nvfp4.attention[(padded_queries // QUERY_TILE, batch * heads)](
                *(query, operands.query.scales),
                *(operands.means.codes, operands.means.scales, operands.query_factors),
                *(key, operands.key.scales, operands.residual.codes, operands.residual.scales, operands.key_factors),
                *(operands.value.codes, operands.value.scales, operands.value_factors, operands.value_means),
                *(operands.lse_shifts, output, lse),
                *(heads, key.shape[1], state.query_length, state.key_length, padded_queries, key.shape[2]),
                state.scale,
                HEAD_DIM=2 * packed_dim,
                MEAN_ROWS=self.recipe.smooth_q_rows,
                THRESHOLD=self.recipe.rescale_threshold,
                LOG2_STRETCH=stretch,
                CAUSAL=state.is_causal,
                DOT_SCALED=self.dot_scaled,
                BLOCK_M=QUERY_TILE,
                BLOCK_N=self.recipe.key_block,
                num_warps=8,
                num_stages=2,
            )
        return output, lse if state.return_lse else None


def triton_refusal() -> str | None:
    """Why the Triton of this environment can't compile the kernel, or None."""
    wanted = ".".join(map(str, OLDEST_TRITON))
    if importlib.util.find_spec("triton") is None:
        return f"Triton is not installed; `pip install 'triton>={wanted}'` (Linux) or triton-windows"
    try:
        found = version("triton")
    except PackageNotFoundError:  # triton-windows
        return None
    if tuple(int(part) for part in found.split(".")[:2]) < OLDEST_TRITON:
        return f"needs Triton {wanted} or newer, found {found}; `pip install 'triton>={wanted}'`"
    return None


def quantize(query: Tensor, key: Tensor, value: Tensor, recipe: Recipe) -> Operands:
    """Smooth and quantise float32 Q [B, H, Nq, D], K and V [B, Hkv, Nk, D] (section 3.1)."""
    batch, heads, query_length, head_dim = query.shape
    key_scale, value_scale = power_of_two_scale(key), power_of_two_scale(value)
    key_mean, value_mean = key.mean(dim=2, keepdim=True), value.mean(dim=2, keepdim=True)
    grouped = query.reshape(batch, key.shape[1], heads // key.shape[1] * query_length, head_dim)
    lse_shifts = (grouped @ key_mean.transpose(-1, -2)).reshape(batch, heads, query_length)

    padded = _pad_tokens(query, QUERY_TILE)
    blocks = padded.reshape(batch, heads, padded.shape[2] // recipe.smooth_q_rows, recipe.smooth_q_rows, head_dim)
    rows = torch.arange(0, blocks.shape[2] * recipe.smooth_q_rows, recipe.smooth_q_rows, device=query.device)
    counts = (query_length - rows).clamp(1, recipe.smooth_q_rows)[:, None]
    query_scale = power_of_two_scale(blocks.flatten(0, 1)).reshape(*blocks.shape[:3], 1)
    means = quantize_nvfp4(blocks.sum(dim=3) / counts * query_scale)
    residual_rows = blocks * query_scale[..., None] - dequantize_nvfp4(means)[:, :, :, None]

    keys = _pad_tokens((key - key_mean) * key_scale, recipe.key_block)
    digit = quantize_nvfp4(keys, four_over_six="k" in recipe.four_over_six)
    values = _pad_tokens((value - value_mean) * value_scale, recipe.key_block)
    return Operands(
        quantize_nvfp4(residual_rows.flatten(2, 3), four_over_six="q" in recipe.four_over_six),
        means,
        1 / query_scale.squeeze(-1),
        digit,
        quantize_nvfp4(keys - dequantize_nvfp4(digit)),
        1 / key_scale.flatten(1),
        quantize_nvfp4(values.transpose(-1, -2).contiguous(), four_over_six="v" in recipe.four_over_six),
        1 / value_scale.flatten(1),
        value_mean.squeeze(2),
        lse_shifts,
    )


def _pad_tokens(x: Tensor, multiple: int) -> Tensor:
    return torch.nn.functional.pad(x, (0, 0, 0, -x.shape[2] % multiple))


KERNEL = NVFP4TritonKernel()
