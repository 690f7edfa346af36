"""Block sizes of the Triton INT8 attention kernel, one row per architecture and shape class.

Fixed, because a search at run time would stall the first call of every shape. Rows are found by
`python -m sage_kernels.benchmarks.tune_int8`.
"""

from dataclasses import dataclass

from sage_kernels.architectures import Architecture


@dataclass(frozen=True)
class AttentionConfig:
    """Query rows and keys of one step, warps of a program, and loads in flight.

    partial_sums: add up P V of each step in float32, because Hopper's FP8 accumulators hold only 14 bits.
    """

    block_m: int
    block_n: int
    warps: int
    stages: int
    partial_sums: bool = False
    sum: int = 0


def find_config(architecture: Architecture | None, block_d: int, is_causal: bool, fp8: bool) -> AttentionConfig:
    """The row for a head_dim padded to `block_d`; None is Triton's interpreter on the CPU."""
    if architecture is not None and architecture.capability == (9, 0):
        if block_d <= 128:
            return AttentionConfig(128, 128, 8, 3)
        return AttentionConfig(128, 64, 8, 2)
    if block_d <= 64:
        return AttentionConfig(128, 64, 4, 3)
    return AttentionConfig(128, 64, 8, 3 if block_d == 128 else 2)
