"""From what a calibration measured to the blocks and steps that are kept in FP16.

Errors of different blocks point in different directions, so they are taken to add in quadrature. Each block and step
has a square of its own, and the smallest set of squares to take away is found by dynamic programming.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby, pairwise
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from sage_kernels.block_overrides import BlockId, BlockLayout, BlockOverride, NoiseEnd, format_block_overrides
from sage_kernels.precision_policy import fp16_steps

if TYPE_CHECKING:
    from .attention_timing import Timing
    from .profile import CalibrationProfile

# Time of 16-bit attention over that of each precision where it was neither measured nor predicted: about what the
# kernels' papers report for long sequences. Only the conversion of a slowdown into block-steps depends on it.
FP16_COST = {"fp4": 4.0, "fp8_fp4": 2.5, "int8": 2.0, "int8_fp16": 1.5}
_WORK_UNITS = 16  # the largest block's attention at one step; smaller blocks round to a multiple of 1 / 16 of it
_ENDS: tuple[NoiseEnd, NoiseEnd] = ("high", "low")


@dataclass(frozen=True)
class Fp16Cost:
    """Time of 16-bit attention over that of a precision, and where it is from: "measured", "predicted" or "assumed"."""

    value: float
    origin: str


@dataclass(frozen=True)
class Fp16Choice:
    """Which blocks run how many steps in FP16.

    Attributes:
        steps: block -> (number of steps, at which end of the noise schedule), for blocks with at least one.
        predicted_error: relative L1 of the final latents that remains.
        work: the part of the model's attention arithmetic that runs in FP16, 0 to 1.
        text: the same for the input fp16_blocks.
    """

    steps: dict[BlockId, tuple[int, NoiseEnd]]
    predicted_error: float
    work: float
    text: str


def segments(steps: tuple[int, ...], total: int) -> list[range]:
    """The part of a schedule of `total` steps that each step looked at stands for: those nearest to it."""
    bounds = [0, *((a + b + 1) // 2 for a, b in pairwise(steps)), total]
    return [range(a, b) for a, b in pairwise(bounds)]


def cell_errors(profile: "CalibrationProfile", precision: str) -> Tensor:
    """What each block in low precision at each step of the whole schedule does to the final latents, float64 [B, N].

    The effect on the model's output, interpolated between the steps that were looked at, times the part of it that one
    step of the sampler takes over, (sigma - next sigma) / sigma; then scaled so that the squares of each part of the
    schedule, and of the whole, sum up to what was measured there.
    """
    index = profile.precision_index(precision)
    sigmas = np.asarray(profile.schedule)
    total = len(sigmas) - 1
    taken_over = np.abs(sigmas[:-1] - sigmas[1:]) / np.maximum(np.maximum(sigmas[:-1], sigmas[1:]), 1e-12)
    sensitivity = profile.sensitivity[index].double().numpy()
    cells = np.stack([np.interp(range(total), profile.steps, row) for row in sensitivity]) * taken_over
    for segment, measured in zip(segments(profile.steps, total), profile.final_errors[index].tolist(), strict=True):
        cells[:, segment] *= _ratio(measured, cells[:, segment])
    return torch.from_numpy(cells * _ratio(float(profile.full_error[index]), cells))


def cost_settings(precision: str, timing: "Timing") -> dict[str, str | float]:
    """What a calibration learned about the speed of a precision, as entries of CalibrationProfile.settings.

    Measured times count before predicted ones; those of emulated kernels count for nothing.
    """
    if timing.speedup is not None and not timing.emulated:
        value, origin = timing.speedup, "measured"
    elif timing.predicted_speedup is not None:
        value, origin = timing.predicted_speedup, "predicted"
    else:
        return {}
    return {f"fp16_cost_{precision}": float(value), f"fp16_cost_{precision}_is": origin}


def fp16_cost(profile: "CalibrationProfile", precision: str) -> Fp16Cost:
    """What FP16 costs where the profile was measured; FP16_COST where that could neither be measured nor predicted."""
    value, origin = (profile.settings.get(f"fp16_cost_{precision}{end}") for end in ("", "_is"))
    if isinstance(value, (int, float)) and value > 0 and origin in {"measured", "predicted"}:
        return Fp16Cost(float(value), str(origin))
    return Fp16Cost(FP16_COST[precision], "assumed")


def choose_for_error(profile: "CalibrationProfile", precision: str, max_error: float) -> Fp16Choice:
    """The least attention work in FP16 with which the predicted error is at most `max_error`.

    Raises:
        ProfileError: the precision wasn't measured.
        ValueError: a negative error.
    """
    if not max_error >= 0:
        raise ValueError(f"max_error must be 0 or more, got {max_error:g}")
    search = _Search(profile, precision)
    # The tolerance: everything in low precision sums up to the measured error only within rounding.
    enough = search.remaining <= max_error**2 * (1 + 1e-9)
    return search.choice(int(np.argmax(enough)) if enough.any() else search.all_units)


def choose_for_slowdown(
    profile: "CalibrationProfile", precision: str, max_slowdown: float, cost: float | None = None
) -> Fp16Choice:
    """The least predicted error for which attention gets at most `max_slowdown` slower.

    Args:
        profile: the measurements.
        precision: what is used elsewhere.
        max_slowdown: 0.2 for 20 % more attention time than with everything in low precision.
        cost: time of 16-bit attention over that of the precision, above 1; None for what the profile knows. Where
            that is 1 or less, low precision gains nothing, and everything stays in FP16.

    Raises:
        ProfileError: the precision wasn't measured.
        ValueError: a negative slowdown, or a cost not above 1.
    """
    profile.precision_index(precision)
    if not max_slowdown >= 0:
        raise ValueError(f"max_slowdown must be 0 or more, got {max_slowdown:g}")
    if cost is None:
        cost = fp16_cost(profile, precision).value
        if cost <= 1:
            return choose_for_work(profile, precision, 1.0)
    if not cost > 1:
        raise ValueError(f"cost must be above 1, got {cost}")
    return choose_for_work(profile, precision, max_slowdown / (cost - 1))


def choose_for_work(profile: "CalibrationProfile", precision: str, max_work: float) -> Fp16Choice:
    """The least predicted error with at most the part `max_work`, 0 to 1, of the attention arithmetic in FP16."""
    search = _Search(profile, precision)
    return search.choice(min(search.all_units, math.floor(max_work * search.all_units + 1e-9)))


class _Search:
    """For every amount of FP16 work, the least that remains of the squared error.

    Attributes:
        remaining: [U + 1], by units of work.
        all_units: U, all blocks at all steps.
    """

    def __init__(self, profile: "CalibrationProfile", precision: str) -> None:
        squares = cell_errors(profile, precision).square().numpy()
        blocks, self._total = squares.shape
        self._layout = profile.layout
        self._units = _work_units(profile.attention_share.double().numpy())
        self.all_units = int(self._units.sum()) * self._total
        self.remaining = np.zeros(self.all_units + 1)
        self._ends, self._counts = [], []
        for block in range(blocks):
            left, ends = _left_by_count(squares[block])
            self._ends.append(ends)
            self._add(left, int(self._units[block]))

    def choice(self, units: int) -> Fp16Choice:
        """The best choice that takes at most `units` of work."""
        steps: dict[BlockId, tuple[int, NoiseEnd]] = {}
        error = math.sqrt(max(0.0, float(self.remaining[units])))
        for number, block in reversed(list(enumerate(self._layout))):
            count = int(self._counts[number][units])
            units -= count * int(self._units[number])
            if count:
                steps[block] = count, self._ends[number][count]
        steps = {block: steps[block] for block in self._layout if block in steps}
        numbers = {block: number for number, block in enumerate(self._layout)}
        work = sum(count * int(self._units[numbers[block]]) for block, (count, _) in steps.items())
        return Fp16Choice(steps, error, work / self.all_units, overrides_text(steps, self._layout, self._total))

    def _add(self, left: "np.ndarray", units: int) -> None:
        best = self.remaining + left[0]
        counts = np.zeros(len(best), dtype=np.int32)
        for count in range(1, self._total + 1):
            work = count * units
            candidate = self.remaining[:-work] + left[count]
            better = candidate < best[work:]
            best[work:][better] = candidate[better]
            counts[work:][better] = count
        self.remaining = best
        self._counts.append(counts)


def fp16_mask(choice: Fp16Choice, layout: BlockLayout, total: int) -> Tensor:
    """The cells of a choice, bool [B, N]."""
    mask = torch.zeros(len(layout), total, dtype=torch.bool)
    for row, block in enumerate(layout):
        count, end = choice.steps.get(block, (0, "high"))
        mask[row, slice(0, count) if end == "high" else slice(total - count, total)] = True
    return mask


def overrides_text(steps: dict[BlockId, tuple[int, NoiseEnd]], layout: BlockLayout, total: int) -> str:
    """Numbers of steps out of `total` as the text that parse_block_overrides() reads; neighbours share an entry."""
    one_type = len(layout.counts) == 1

    def entry(block: BlockId) -> tuple[str, float, NoiseEnd] | None:
        count, end = steps.get(block, (0, "high"))
        return (block.type, _share(count, total), "high" if count == total else end) if count else None

    overrides = []
    for key, group in groupby(layout, entry):
        if key is not None:
            type_, share, end = key
            indices = [block.index for block in group]
            overrides.append(BlockOverride(indices[0], indices[-1], share, end, None if one_type else type_))
    return format_block_overrides(overrides)


def _share(count: int, total: int) -> float:
    """A short number that means `count` of `total` steps."""
    return next(share for share in _roundings(count / total) if fp16_steps(share, total) == count)


def _roundings(share: float) -> Iterator[float]:
    for digits in range(2, 17):
        yield round(share, digits)
    yield share


def _left_by_count(squares: "np.ndarray") -> tuple["np.ndarray", list[NoiseEnd]]:
    """What is left of a block's squared errors [N] with 0..N steps in FP16, and at which end these steps are better."""
    removed = np.stack([np.concatenate([[0.0], np.cumsum(row)]) for row in (squares, squares[::-1])])
    ends = [_ENDS[end] for end in removed.argmax(axis=0)]
    return np.maximum(0.0, removed[0, -1] - removed.max(axis=0)), ends


def _work_units(shares: "np.ndarray") -> "np.ndarray":
    units = np.maximum(1, np.rint(shares / shares.max() * _WORK_UNITS)).astype(int)
    return units // np.gcd.reduce(units)


def _ratio(measured: float, cells: "np.ndarray") -> float:
    norm = float(np.sqrt(np.square(cells).sum()))
    return measured / norm if norm > 0 else 0.0
