"""Run the Triton FP4 kernel in Triton's interpreter, on the CPU, and print how far it is from the quantised reference.

A program of its own, because Triton reads TRITON_INTERPRET when it is imported. Prints one JSON object a case, and one
about the rounding of weights.
"""

import json
import sys

import numpy as np
import torch
import triton
import triton.language as tl
from triton.runtime import interpreter

from sage_kernels.attention_call import make_call
from sage_kernels.formats import dequantize_nvfp4, quantize_nvfp4
from sage_kernels.kernels.nvfp4_triton import RECIPE, NVFP4TritonKernel
from sage_kernels.kernels.triton_nvfp4 import quantize_weights
from sage_kernels.recipes import Recipe
from sage_kernels.reference import quantized_attention

_convert_float = interpreter._convert_float


def _convert_e4m3_right(input_data, input_type, output_type, rounding_mode):
    """The interpreter loses the carry out of E4M3's mantissa, and reads its NaN as 480; torch converts instead."""
    data = np.ascontiguousarray(input_data)
    if (input_type, output_type) == (tl.float32, tl.float8e4nv):
        return torch.from_numpy(data.view(np.float32)).to(torch.float8_e4m3fn).view(torch.uint8).numpy()
    if (input_type, output_type) == (tl.float8e4nv, tl.float32):
        return torch.from_numpy(data.view(np.uint8)).view(torch.float8_e4m3fn).float().numpy().view(np.uint32)
    return _convert_float(input_data, input_type, output_type, rounding_mode)


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


@triton.jit
def _quantize_weights(weights, codes, scales, sums):
    row, column = tl.arange(0, 16), tl.arange(0, 64)
    packed, scale, total = quantize_weights(tl.load(weights + row[:, None] * 64 + column[None, :]), 16, 64)
    tl.store(codes + row[:, None] * 32 + tl.arange(0, 32)[None, :], packed)
    tl.store(scales + row[:, None] * 4 + tl.arange(0, 4)[None, :], scale)
    tl.store(sums + row, total)


def round_weights() -> dict[str, int]:
    """How many codes, scales and sums differ from the format's, for ties between neighbouring codes at many scales."""
    ties = torch.tensor([0, 0.25, 0.5, 0.75, 1, 1.25, 1.5, 1.75, 2, 2.5, 3, 3.5, 4, 5, 6, 6])
    weights = torch.ldexp(ties, torch.arange(-12, 4).repeat(4)[:, None]).reshape(16, 64)
    weights[3, :16] = 0
    expected = quantize_nvfp4(weights)
    codes, scales, sums = torch.empty(16, 32, dtype=torch.uint8), torch.empty_like(expected.scales), torch.empty(16)
    _quantize_weights[(1,)](weights, codes, scales, sums)
    return {
        "codes": (codes != expected.codes).sum().item(),
        "scales": (scales.view(torch.uint8) != expected.scales.view(torch.uint8)).sum().item(),
        "sums": (sums != dequantize_nvfp4(expected).sum(dim=1)).sum().item(),
    }


if __name__ == "__main__":
    interpreter._convert_float = _convert_e4m3_right
    for case in json.loads(sys.argv[1]):
        print(json.dumps(run(case)))
    print(json.dumps(round_weights()))
