"""Run the Triton FP4 kernel in Triton's interpreter, on the CPU, and print how far it is from the quantised reference.

A program of its own, because Triton reads TRITON_INTERPRET when it is imported. Prints one JSON object a case.
"""

import json
import sys

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

from sage_kernels.attention_call import make_call
from sage_kernels.kernels.nvfp4_triton import RECIPE, NVFP4TritonKernel
from sage_kernels.recipes import Recipe
from sage_kernels.reference import quantized_attention

_convert_float = interpreter._convert_float


def _convert_rounding_right(input_data, input_type, output_type, rounding_mode):
    """The interpreter loses the carry out of E4M3's mantissa; torch rounds instead."""
    if (input_type, output_type) != (tl.float32, tl.float8e4nv):
        return _convert_float(input_data, input_type, output_type, rounding_mode)
    codes = torch.from_numpy(np.ascontiguousarray(input_data).view(np.float32)).to(torch.float8_e4m3fn)
    return codes.view(torch.uint8).numpy().reshape(input_data.shape)


def run(case: dict) -> dict[str, float]:
    """Relative L1 of the output, mean difference of LSE, and how many numbers are NaN in only one of both outputs."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(case["heads"], case["rows"]), (case["kv_heads"], case["keys"]), (case["kv_heads"], case["keys"])]
    q, k, v = (
        torch.randn(2, heads, length, case["head_dim"], generator=generator)
        + 0.7 * torch.randn(2, heads, 1, case["head_dim"], generator=generator)
        for heads, length in shapes
    )
    if "nan_row" in case:
        q[0, 0, case["nan_row"], 3] = torch.nan
    q, k, v = (x.half() for x in (q, k, v))
    recipe = Recipe(**{**vars(RECIPE), **case.get("recipe", {})})
    scale, is_causal = case.get("scale"), case["causal"]
    call = make_call(q, k, v, None, is_causal, scale, True, None, "BHND", "fp4", True, False)
    kernel = NVFP4TritonKernel(recipe, dot_scaled=False)
    output, lse = kernel.run(kernel.prepare(call))
    expected, expected_lse = quantized_attention(q, k, v, recipe, is_causal=is_causal, scale=scale)
    error = (output.float() - expected).nan_to_num().abs().sum() / expected.nan_to_num().abs().sum()
    return {
        "relative_l1": error.item(),
        "lse": (lse - expected_lse).abs().nanmean().item(),
        "nan": (output.isnan() != expected.isnan()).sum().item(),
    }


if __name__ == "__main__":
    interpreter._convert_float = _convert_rounding_right
    for case in json.loads(sys.argv[1]):
        print(json.dumps(run(case)))
