"""(block, noise level, sizes) -> precision of one attention call. Pure Python: shared by ComfyUI and diffusers."""

import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Literal, get_args

from sage_kernels.block_overrides import (
    BlockId,
    BlockLayout,
    BlockOverrideError,
    StepShare,
    parse_block_overrides,
    resolve_block_overrides,
)
from sage_kernels.precision import PRECISIONS, Precision, check_precision

__all__ = [
    "BlockId",
    "BlockLayout",
    "BlockOverrideError",
    "Choice",
    "CrossAttention",
    "PrecisionPolicy",
    "StepShare",
    "fp16_steps",
    "noise_rank",
]

CrossAttention = Literal["same", "fp16"]

# Samplers compute sigmas in float32 and convert them to and fro; two steps are never as close as this.
SIGMA_TOLERANCE = 1e-5


@dataclass(frozen=True)
class Choice:
    """A precision, and why it is not the policy's default (None when it is)."""

    precision: Precision
    reason: str | None = None


OUTSIDE_BLOCKS = Choice("fp16", "outside the model's transformer blocks")
OUTSIDE_WINDOW = Choice("fp16", "outside the start-end window of the sampling")
SIGMA_UNKNOWN = Choice("fp16", "noise level unknown, so the start-end window can't be applied")
SCHEDULE_UNKNOWN = Choice("fp16", "step schedule unknown, so the block stays in FP16 for all steps")
BLOCK_OVERRIDE = Choice("fp16", "block override")
FEW_TOKENS = Choice("fp16", "fewer tokens than min_tokens")
CROSS_ATTENTION = Choice("fp16", "cross-attention")
_DEFAULTS = {
    precision: Choice(precision, "FP16 asked for" if precision == "fp16" else None) for precision in PRECISIONS
}


@dataclass(frozen=True)
class PrecisionPolicy:
    """What precision each attention call of a model gets.

    Attributes:
        precision: for every call that nothing below keeps in FP16.
        shares: blocks that run a share of the sampling steps in FP16.
        sigma_start, sigma_end: low precision only where sigma_end < sigma <= sigma_start; a higher sigma is more noise.
        min_tokens: calls with fewer query or key tokens run in FP16.
        cross_attention: "fp16" keeps calls in FP16 whose keys come from another sequence than their queries; "same"
            treats them as all others. They are told by their lengths, which is all that a call shows: unequal ones are
            cross-attention. A prompt of exactly as many tokens as the picture would pass for self-attention.
    """

    precision: Precision = "auto"
    shares: Mapping[BlockId, StepShare] = field(default_factory=dict)
    sigma_start: float = math.inf
    sigma_end: float = -math.inf
    min_tokens: int = 0
    cross_attention: CrossAttention = "same"

    def __post_init__(self) -> None:
        check_precision(self.precision)
        if not self.sigma_end < self.sigma_start:
            raise ValueError(f"sigma_start ({self.sigma_start}) must be higher than sigma_end ({self.sigma_end})")
        if self.min_tokens < 0:
            raise ValueError(f"min_tokens must be 0 or more, got {self.min_tokens}")
        if self.cross_attention not in get_args(CrossAttention):
            raise ValueError(f"cross_attention must be same or fp16, got {self.cross_attention!r}")
        object.__setattr__(self, "shares", dict(self.shares))

    @classmethod
    def for_model(
        cls,
        layout: BlockLayout,
        precision: str = "auto",
        fp16_blocks: str = "",
        min_tokens: int = 0,
        cross_attention: CrossAttention = "same",
    ) -> "PrecisionPolicy":
        """The policy that a user's text means for a model with these blocks.

        Raises:
            BlockOverrideError: fp16_blocks can't be read or names blocks that the model hasn't.
            ValueError: no such precision, or no such choice for cross-attention.
        """
        shares = resolve_block_overrides(parse_block_overrides(fp16_blocks), layout)
        return cls(check_precision(precision), shares, min_tokens=min_tokens, cross_attention=cross_attention)

    @property
    def has_window(self) -> bool:
        """Whether the choice depends on sigma_start and sigma_end."""
        return self.sigma_start < math.inf or self.sigma_end > -math.inf

    @property
    def depends_on_step(self) -> bool:
        """Whether choose() needs sigma: False lets a caller skip reading it from the GPU."""
        return self.has_window or any(0.0 < share.share < 1.0 for share in self.shares.values())

    def choose(
        self,
        block: BlockId | None,
        *,
        sigma: float | None,
        schedule: Sequence[float] | None,
        query_tokens: int,
        key_tokens: int,
    ) -> Choice:
        """The precision of one attention call. Cheap enough for every call.

        What is unknown is never guessed: a window without sigma, or a share of the steps without a schedule, gives
        FP16.

        Args:
            block: the block that is calling; None (token refiners, adapters) runs in FP16.
            sigma: noise level of this evaluation of the model; None when unknown.
            schedule: sigmas of the sampling run, one more than it has steps; None when unknown. A share counts the
                steps of this run, which are a part of the schedule where two experts share one.
            query_tokens, key_tokens: lengths of the two sequences.
        """
        if block is None:
            return OUTSIDE_BLOCKS
        if min(query_tokens, key_tokens) < self.min_tokens:
            return FEW_TOKENS
        if self.cross_attention == "fp16" and query_tokens != key_tokens:
            return CROSS_ATTENTION
        return self._window(sigma) or self._override(block, sigma, schedule) or _DEFAULTS[self.precision]

    def _window(self, sigma: float | None) -> Choice | None:
        if not self.has_window:
            return None
        if sigma is None:
            return SIGMA_UNKNOWN
        inside = self.sigma_end < sigma <= self.sigma_start * (1 + SIGMA_TOLERANCE)
        return None if inside else OUTSIDE_WINDOW

    def _override(self, block: BlockId, sigma: float | None, schedule: Sequence[float] | None) -> Choice | None:
        share = self.shares.get(block)
        if share is None or share.share == 0.0:
            return None
        if share.share == 1.0:
            return BLOCK_OVERRIDE
        if sigma is None or schedule is None:
            return SCHEDULE_UNKNOWN
        return BLOCK_OVERRIDE if _in_share(share, sigma, tuple(schedule)) else None


def fp16_steps(share: float, steps: int) -> int:
    """How many of `steps` steps a share means: rounded, halves up, but never all or none unless the share is 1 or 0.

    Of a single step any share above 0 is the whole step: the error is then on the side of quality.
    """
    if share in {0.0, 1.0}:
        return int(share) * steps
    # 1e-9: 0.145 * 100 is 14.499999999999998
    return max(1, min(math.floor(share * steps + 0.5 + 1e-9), steps - 1))


@lru_cache(maxsize=256)
def _in_share(share: StepShare, sigma: float, schedule: tuple[float, ...]) -> bool:
    steps = len(schedule) - 1
    count = fp16_steps(share.share, steps)
    rank = noise_rank(sigma, schedule)
    return rank < count if share.end == "high" else rank >= steps - count


def noise_rank(sigma: float, schedule: Sequence[float]) -> int:
    """Which step of the schedule an evaluation at `sigma` belongs to, 0 being the one with the most noise.

    It goes by sigma, not by counting calls: samplers with several stages evaluate between steps (that belongs to the
    step that began above), some add noise first, and an unsampling run goes from low to high.
    """
    starts = sorted(-start for start in schedule[:-1])
    at_least_as_noisy = bisect_right(starts, -sigma * (1 - SIGMA_TOLERANCE))
    return max(0, at_least_as_noisy - 1)
