"""Block sizes of the Triton INT8 attention kernel, one row per architecture and shape class.

Fixed, because a search at run time would stall the first call of every shape.
`python sage_kernels/benchmarks/tune_int8.py` times candidates on the GPU at hand.
"""

from dataclasses import dataclass, replace
from typing import Literal

from sage_kernels.architectures import Architecture


@dataclass(frozen=True)
class AttentionConfig:
    """How one program works.

    Attributes:
        block_m, block_n: query rows of a program, keys of a step.
        warps: of a program.
        stages: steps whose keys and values are loaded ahead.
        partial_sums: add up P V of each step in float32, because Hopper's FP8 accumulators hold only 14 bits.
        row_sum: of the weights as they are rounded for P V; of those before rounding; or of the rounded ones, added up
            by the tensor cores as one more product with ones. Where MMAs are asynchronous and take P from registers
            (wgmma, sm_90) it must not be "rounded": Triton then reads these registers again while the MMA is under
            way, the assembler reuses them after that, and the MMA reads what the next instructions wrote.
    """

    block_m: int
    block_n: int
    warps: int
    stages: int
    partial_sums: bool = False
    row_sum: Literal["rounded", "unrounded", "ones"] = "rounded"


def find_config(architecture: Architecture | None, block_d: int, mask_bytes: int = 0) -> AttentionConfig:
    """The row for a head_dim padded to `block_d` and a mask's element size; None is Triton's interpreter on the CPU."""
    if architecture is not None and architecture.capability[0] == 9:
        return replace(_hopper_tiles(block_d, mask_bytes), row_sum="unrounded")
    if architecture is not None and architecture.shared_memory >= 227 << 10:
        return _large_tiles(block_d, mask_bytes)
    if block_d <= 64:
        return AttentionConfig(128, 64, 4, 3)
    stages = 3 - (block_d > 128) - (mask_bytes > 0)  # tiles of a mask are kept in shared memory, like those of K and V
    return AttentionConfig(128, 64, 8, 1 if mask_bytes > 2 else stages)


def _hopper_tiles(block_d: int, mask_bytes: int) -> AttentionConfig:
    if block_d > 128:
        return AttentionConfig(128, 64, 8, 2) if mask_bytes else AttentionConfig(64, 64, 4, 2)
    if mask_bytes:
        return AttentionConfig(128, 64, 4, 2) if block_d <= 64 else AttentionConfig(128, 32, 4, 3)
    return AttentionConfig(128, 64, 4, 3)


def _large_tiles(block_d: int, mask_bytes: int) -> AttentionConfig:
    # The addresses of a mask whose rows are not 16 bytes apart, one for each score, leave registers for half a tile.
    if block_d <= 128 and not mask_bytes:
        return AttentionConfig(128, 128, 8, 3)
    return AttentionConfig(128, 64, 8, 2)
