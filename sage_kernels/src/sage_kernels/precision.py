"""The ladder of precisions, fastest first. Pure Python: shared by the kernels, the policies and the nodes."""

from typing import Literal, get_args

Precision = Literal["auto", "fp4", "fp8_fp4", "int8", "int8_fp16", "fp16"]
PRECISIONS: tuple[Precision, ...] = get_args(Precision)

DESCRIPTIONS: dict[Precision, str] = {
    "auto": "the fastest rung that the device does well",
    "fp4": "Q, K, P, V in NVFP4 (SageAttention3)",
    "fp8_fp4": "Q, K in MXFP8, P, V in NVFP4",
    "int8": "Q, K in INT8, P, V in FP8 E4M3 where the device has it, else FP16",
    "int8_fp16": "Q, K in INT8, P, V in FP16",
    "fp16": "the framework's own 16-bit attention",
}


def check_precision(precision: str) -> Precision:
    """Return `precision` if it is one.

    Raises:
        ValueError: it is not.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, got {precision!r}")
    return precision
