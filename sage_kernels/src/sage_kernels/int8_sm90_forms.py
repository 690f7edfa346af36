"""How the INT8 kernel for sm_90a is compiled for each head dimension.

Fixed, because a search at run time would stall the first call of every shape. Found by
`python sage_kernels/benchmarks/tune_int8_sm90.py`.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Int8Sm90Form:
    """One compilation of csrc/int8_sm90_attention.cu.

    Attributes:
        head_dim: 64 or 128; smaller ones are padded.
        warpgroups: of 64 query rows each.
        stages: key blocks in flight.
        pingpong: two warpgroups take turns with the tensor cores.
        promote: add up P V of every key block in float32, rather than with the 14 bits of FP8 wgmma.
        headroom: the output is rescaled only when the row maximum has grown by more than this many powers of two.
        line: of every eight weights, how many come from a straight line in place of an exponential.
        keys: of a block; they share an INT8 scale.
    """

    head_dim: int
    warpgroups: int
    stages: int
    pingpong: bool
    promote: bool
    headroom: int = 0
    line: int = 0
    keys: int = 128

    @property
    def rows(self) -> int:
        """Query rows of a thread block."""
        return 64 * self.warpgroups

    @property
    def shared_bytes(self) -> int:
        """Q, the rings of K and V, and their barriers."""
        return (self.rows + 2 * self.stages * self.keys) * self.head_dim + 8 * (4 * self.stages + 2 * self.warpgroups)


FORMS = (
    Int8Sm90Form(64, warpgroups=3, stages=8, pingpong=False, promote=False),
    Int8Sm90Form(128, warpgroups=2, stages=5, pingpong=True, promote=True),
)
