"""What each precision means: which operand in which format, and what is subtracted before quantising."""

from dataclasses import dataclass, replace
from typing import Literal

from sage_kernels.precision import Precision

QKFormat = Literal["nvfp4", "mxfp8", "int8", "none"]
PVFormat = Literal["nvfp4", "fp8", "fp16", "none"]


@dataclass(frozen=True)
class Recipe:
    """Formats and smoothing of one quantised attention.

    Attributes:
        qk: format of Q and K along head_dim.
        pv: format of P and V along the tokens.
        smooth_q_rows: query rows that share a subtracted mean (SageAttention3's smooth Q); 0 subtracts nothing.
        quantized_delta: delta_s, what smoothing Q took away, from a quantised mean and two quantised digits of K, so
            that no 16-bit K is needed; what the mean loses by it stays in the rows. Else delta_s is exact.
        key_correction_rows: query rows by whose mean K's rounding error is made good: mean(q) (K - K^), both factors in
            NVFP4, is added to their scores, and the mean stays in the rows; 0 corrects nothing. Instead of
            smooth_q_rows, where Q itself loses little.
        smooth_k: subtract the mean key of each head.
        smooth_v: subtract the mean value of each head and add it back to the output; exact, since rows of P sum to one.
        recenter_v: what smoothing V adds back is the mean that the quantised values lack, rather than the mean that was
            subtracted: rounding errors of V then have mean zero in every channel.
        key_block: keys that one step of the online softmax takes.
        key_shares: online softmaxes that the key blocks are dealt out to in turns, and whose results are merged.
        rescale_threshold: the output is rescaled only when the row maximum has grown by more than this many powers of
            two; P is stretched that much less, to keep headroom.
        linear_exp_of_8: of every eight weights, how many come from a straight line between powers of two in place of an
            exponential, which costs no special-function instruction: the last ones where they are rounded to E2M1,
            evenly spread groups of 16 keys where they are rounded to E4M3.
        quantized_row_sum: weights are divided by the sum of what they were rounded to, else by the sum before rounding.
        int8_rows: query rows and key rows that share an INT8 scale.
        four_over_six: which NVFP4 operands take the better of two scales in each group: letters of "qkvp"; of K only
            the first digit.
        two_level: stretch rows of P to the range that E4M3 group scales have (SageAttention3, section 3.2); else P
            keeps a maximum of 1.
        rounded_divisor: divide P by the group scale as rounded to E4M3, which the products use; False is what the
            public SageAttention3 kernel does.
    """

    qk: QKFormat
    pv: PVFormat
    smooth_q_rows: int = 0
    quantized_delta: bool = False
    key_correction_rows: int = 0
    smooth_k: bool = True
    smooth_v: bool = False
    recenter_v: bool = False
    key_block: int = 128
    key_shares: int = 1
    rescale_threshold: float = 0.0
    linear_exp_of_8: int = 0
    quantized_row_sum: bool = True
    int8_rows: tuple[int, int] = (1, 128)
    four_over_six: str = ""
    two_level: bool = True
    rounded_divisor: bool = True

    def __post_init__(self) -> None:
        """Raise ValueError where the mean query would be both subtracted and kept."""
        if self.smooth_q_rows and self.key_correction_rows:
            raise ValueError("a recipe takes smooth_q_rows or key_correction_rows, not both")

    @property
    def mean_rows(self) -> int:
        """Query rows that share a mean, whatever it is for; 0 where none is needed."""
        return self.smooth_q_rows or self.key_correction_rows


EXACT = Recipe(qk="none", pv="none", smooth_k=False, key_block=512)
SAGE_ATTENTION_3 = Recipe(qk="nvfp4", pv="nvfp4", smooth_q_rows=128)
# As published: the row sum is that of P before rounding (algorithm 1), and the public kernel's divisor.
SAGE_ATTENTION_3_PUBLISHED = replace(SAGE_ATTENTION_3, quantized_row_sum=False, rounded_divisor=False)

RECIPES: dict[Precision, Recipe] = {
    "fp4": Recipe(
        qk="nvfp4",
        pv="nvfp4",
        smooth_q_rows=32,
        quantized_delta=True,
        smooth_v=True,
        key_block=32,
        rescale_threshold=3.0,
        linear_exp_of_8=3,
        four_over_six="kv",
    ),
    "fp8_fp4": Recipe(
        qk="mxfp8",
        pv="nvfp4",
        key_correction_rows=32,
        smooth_v=True,
        key_block=32,
        rescale_threshold=3.0,
        linear_exp_of_8=3,
        four_over_six="v",
    ),
    "int8": Recipe(qk="int8", pv="fp8", smooth_v=True, recenter_v=True),
    "int8_fp16": Recipe(qk="int8", pv="fp16"),
}
