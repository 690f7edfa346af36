"""The Triton FP4 kernel compiled for a GPU that is not there."""

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from sage_kernels.kernels import triton_nvfp4
from sage_kernels.kernels.nvfp4_triton import QUERY_TILE, RECIPE

_TYPES = {
    "*u8": ("query", "means", "key", "residual", "value"),
    "*fp8e4nv": ("query_scales", "mean_scales", "key_scales", "residual_scales", "value_scales"),
    "*fp32": ("query_factors", "key_factors", "value_factors", "value_means", "lse_shifts", "lse"),
    "*bf16": ("output",),
    "i32": ("heads", "kv_heads", "query_length", "key_length", "padded_queries", "padded_keys"),
    "fp32": ("scale",),
}


def attention_ptx(capability: int, head_dim: int, causal: bool) -> str:
    """PTX of the kernel as nvfp4_triton launches it, with bfloat16 output."""
    constants = {
        "HEAD_DIM": head_dim,
        "MEAN_ROWS": RECIPE.smooth_q_rows,
        "THRESHOLD": RECIPE.rescale_threshold,
        "LOG2_STRETCH": 8.0,
        "CAUSAL": causal,
        "DOT_SCALED": True,
        "BLOCK_M": QUERY_TILE,
        "BLOCK_N": RECIPE.key_block,
    }
    signature = {name: kind for kind, names in _TYPES.items() for name in names} | dict.fromkeys(constants, "constexpr")
    source = ASTSource(fn=triton_nvfp4.attention, signature=signature, constexprs=constants)
    options = {"num_warps": 8, "num_stages": 2}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options).asm["ptx"]
