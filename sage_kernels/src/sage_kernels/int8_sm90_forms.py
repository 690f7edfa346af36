"""How the INT8 kernel for sm_90a is compiled for each head dimension.

Fixed, because a search at run time would stall the first call of every shape. Found by
`python sage_kernels/benchmarks/tune_int8_sm90.py`.
"""

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Int8Sm90Form:
    """One compilation of csrc/int8_sm90_attention.cu.

    Attributes:
        head_dim: 64 or 128; smaller ones are padded.
        warpgroups: of 64 query rows each.
        stages: key blocks in flight.
        pingpong: two warpgroups take turns with the tensor cores.
        promote: key blocks whose P V adds up with the 14 bits of FP8 wgmma before it is added in float32; 0 for all.
        headroom: the output is rescaled only when the row maximum has grown by more than this many powers of two.
        ones: the row sum, then of the rounded weights, comes from columns of ones beside V rather than from additions.
        line: of every eight weights, how many come from a straight line in place of an exponential.
        keys: of a block; they share an INT8 scale.
        split: eighths of the weights that are computed before waiting for P V, the rest overlaps their packing; 0: all.
        park: the float32 sums wait in shared memory for the next promotion, which frees registers.
        share: all warpgroups work on 64 rows that are left over for the end, each on its share of the key blocks.
        longest: serves up to so many keys; 0 for any number.
    """

    head_dim: int
    warpgroups: int
    stages: int
    pingpong: bool
    promote: int
    headroom: int = 0
    ones: bool = False
    line: int = 0
    keys: int = 128
    split: int = 0
    park: bool = False
    share: bool = False
    longest: int = 0

    def serves(self, head_dim: int, keys: int) -> bool:
        """Whether it is made for such a call."""
        return head_dim <= self.head_dim and (not self.longest or keys <= self.longest)

    @property
    def name(self) -> str:
        """What distinguishes it from other forms of its head dimension."""
        parts = [f"w{self.warpgroups}", f"k{self.keys}", f"s{self.stages}", f"p{self.promote}", f"h{self.headroom}"]
        parts += [f"l{self.line}", f"e{self.split}"]
        return "_".join(parts) + "p" * self.pingpong + "o" * self.ones + "s" * self.park + "u" * self.share

    @property
    def rows(self) -> int:
        """Query rows of a thread block."""
        return 64 * self.warpgroups

    @property
    def shared_bytes(self) -> int:
        """Q, the rings of K and V with 8 rows of ones, and their barriers."""
        tiles = self.rows * self.head_dim + 2 * self.stages * self.keys * self.head_dim
        tiles += 4 * self.park * 128 * self.warpgroups * (self.head_dim // 2 + 4 * self.ones)
        return tiles + self.stages * 8 * self.keys * self.ones + 8 * (4 * self.stages + 2 * self.warpgroups)


_D128 = Int8Sm90Form(128, warpgroups=2, stages=5, pingpong=True, promote=4, headroom=2, ones=True, line=3, split=3)
FORMS = (
    replace(
        Int8Sm90Form(64, warpgroups=3, stages=7, pingpong=False, promote=4, headroom=2, ones=True, line=5, split=2),
        park=True,
        share=True,
    ),
    # The error grows with length. Short sequences can afford a fourth line, long ones can do without its speed.
    replace(_D128, line=4, split=4, longest=16384),
    _D128,
)
