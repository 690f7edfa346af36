"""Number formats of the kernels: plain PyTorch quantise and dequantise, on any device, as the definition of every bit.

One file per format. A kernel's quantiser must reproduce these codes and scales exactly.

==========  =======================  ============================  =============================================
format      element                  scale                         used for
==========  =======================  ============================  =============================================
nvfp4       E2M1, two per byte       E4M3 per 16 elements          Q, K (along head_dim), P, V (along tokens)
mxfp8       E4M3                     E8M0 per 32 elements          Q, K of the fp8_fp4 rung (along head_dim)
fp8_e4m3    E4M3                     float32 per token or channel  P, V of the int8 rung
int8        8-bit integer, +-127     float32 per block or token    Q, K of the int8 rungs, SageBwd
==========  =======================  ============================  =============================================
"""

from sage_kernels.formats.fp8_e4m3 import E4M3_MAX, FP8Tensor, dequantize_fp8, quantize_fp8, round_to_e4m3
from sage_kernels.formats.int8 import INT8_MAX, Int8Tensor, dequantize_int8, quantize_int8
from sage_kernels.formats.mxfp8 import MXFP8_GROUP, MXFP8Tensor, dequantize_mxfp8, quantize_mxfp8
from sage_kernels.formats.nvfp4 import (
    E2M1_MAX,
    E2M1_VALUES,
    NVFP4_GROUP,
    NVFP4Tensor,
    dequantize_nvfp4,
    pack_e2m1,
    quantize_nvfp4,
    round_to_e2m1,
    unpack_e2m1,
)

__all__ = [
    "E2M1_MAX",
    "E2M1_VALUES",
    "E4M3_MAX",
    "INT8_MAX",
    "MXFP8_GROUP",
    "NVFP4_GROUP",
    "FP8Tensor",
    "Int8Tensor",
    "MXFP8Tensor",
    "NVFP4Tensor",
    "dequantize_fp8",
    "dequantize_int8",
    "dequantize_mxfp8",
    "dequantize_nvfp4",
    "pack_e2m1",
    "quantize_fp8",
    "quantize_int8",
    "quantize_mxfp8",
    "quantize_nvfp4",
    "round_to_e2m1",
    "round_to_e4m3",
    "unpack_e2m1",
]
