"""Block sizes of the training kernels, one row per architecture and padded head_dim.

Fixed, because a search at run time would stall the first call of every shape, and because they decide which numbers
share a scale. `python sage_kernels/benchmarks/tune_training.py` times candidates on the GPU at hand.
"""

from dataclasses import dataclass, replace

from sage_kernels.architectures import Architecture
from sage_kernels.training.recipe import RECIPES, TrainingRecipe


@dataclass(frozen=True)
class BlockConfig:
    """How one program works.

    Attributes:
        block_m, block_n: queries and keys of a block of scores.
        warps: of a program.
        stages: blocks that are loaded ahead.
    """

    block_m: int
    block_n: int
    warps: int
    stages: int


@dataclass(frozen=True)
class TrainingConfig:
    """The three kernels that multiply: a program of `key_value` keeps its keys, one of the others its queries.

    split_head_dim: dK and dV as two halves of head_dim, so that an INT8 product needs fewer registers at a time.
    """

    forward: BlockConfig
    key_value: BlockConfig
    query: BlockConfig
    split_head_dim: bool = False

    def recipe(self, precision: str) -> TrainingRecipe:
        """What kernels with these blocks compute, for comparison with the reference."""
        return replace(
            RECIPES[precision],
            forward_keys=self.forward.block_n,
            backward_queries=self.key_value.block_m,
            backward_keys=self.query.block_n,
        )


def find_config(architecture: Architecture | None, block_d: int) -> TrainingConfig:
    """The row for a head_dim padded to `block_d`; None is Triton's interpreter on the CPU.

    On Hopper the CUDA kernels of sm90_backend run in place of these, with a recipe of their own.
    """
    if architecture is not None and architecture.shared_memory >= 227 << 10:
        if block_d <= 64:
            return TrainingConfig(BlockConfig(64, 128, 4, 3), BlockConfig(64, 128, 8, 3), BlockConfig(128, 128, 8, 2))
        return TrainingConfig(
            BlockConfig(64, 128, 4, 3), BlockConfig(64, 128, 8, 3), BlockConfig(128, 128, 8, 2), split_head_dim=True
        )
    if block_d <= 64:
        return TrainingConfig(BlockConfig(128, 64, 4, 2), BlockConfig(64, 64, 4, 2), BlockConfig(64, 64, 4, 2))
    return TrainingConfig(BlockConfig(128, 64, 8, 2), BlockConfig(32, 64, 4, 1), BlockConfig(64, 64, 4, 1))
