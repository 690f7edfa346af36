"""One block-scaled MMA tile in Triton, to see what it emits for a GPU that is not there."""

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


@triton.jit
def _nvfp4_tile(a_ptr, b_ptr, scale_a_ptr, scale_b_ptr, output_ptr):
    row, column = tl.arange(0, 16)[:, None], tl.arange(0, 8)
    byte, group = tl.arange(0, 32), tl.arange(0, 4)[None, :]
    a = tl.load(a_ptr + row * 32 + byte[None, :])
    b = tl.load(b_ptr + column[None, :] * 32 + byte[:, None])
    scale_a = tl.load(scale_a_ptr + row * 4 + group)
    scale_b = tl.load(scale_b_ptr + column[:, None] * 4 + group)
    output = tl.dot_scaled(a, scale_a, "e2m1", b, scale_b, "e2m1")
    tl.store(output_ptr + row * 8 + column[None, :], output)


@triton.jit
def _mxfp8_tile(a_ptr, b_ptr, scale_a_ptr, scale_b_ptr, output_ptr):
    row, column, k = tl.arange(0, 16)[:, None], tl.arange(0, 8), tl.arange(0, 32)
    group = tl.arange(0, 1)[None, :]
    a = tl.load(a_ptr + row * 32 + k[None, :])
    b = tl.load(b_ptr + column[None, :] * 32 + k[:, None])
    scale_a = tl.load(scale_a_ptr + row + group)
    scale_b = tl.load(scale_b_ptr + column[:, None] + group)
    output = tl.dot_scaled(a, scale_a, "e4m3", b, scale_b, "e4m3")
    tl.store(output_ptr + row * 8 + column[None, :], output)


def mxfp8_tile_ptx(capability: int) -> str:
    """PTX of one warp that multiplies A [16, 32] and B [32, 8].

    Its parameters: A's and B's codes, rows (B: columns) of 32 bytes; their scales, a byte a row; the output [16, 8].
    """
    types = dict.fromkeys(("a_ptr", "b_ptr", "scale_a_ptr", "scale_b_ptr"), "*u8")
    source = ASTSource(fn=_mxfp8_tile, signature={**types, "output_ptr": "*fp32"})
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": 1}).asm["ptx"]


def nvfp4_tile_ptx(capability: int) -> str:
    """PTX of one warp that multiplies A [16, 64] and B [64, 8].

    Its parameters: A's and B's codes, rows (B: columns) of 32 bytes; their scales, rows of 4; the output [16, 8].
    """
    codes_and_scales = dict.fromkeys(("a_ptr", "b_ptr"), "*u8") | dict.fromkeys(
        ("scale_a_ptr", "scale_b_ptr"), "*fp8e4nv"
    )
    source = ASTSource(fn=_nvfp4_tile, signature={**codes_and_scales, "output_ptr": "*fp32"})
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": 1}).asm["ptx"]
