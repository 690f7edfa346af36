"""A calibration's choice for a goal, held against the sampling that it leads to."""

import math
from collections.abc import Callable

from torch import Tensor

from .fp16_choice import Fp16Choice, Fp16Cost, choose_for_error, choose_for_slowdown
from .frame_metrics import relative_l1
from .profile import CalibrationProfile

GOALS = ("max_error", "max_slowdown")
_ATTEMPTS = 3


def choose(
    profile: CalibrationProfile,
    precision: str,
    goal: str,
    value: float,
    sample: Callable[[str], Tensor],
    expected: Tensor,
) -> tuple[Fp16Choice, float]:
    """The best choice for a goal, and the error of the final latents that was measured with it.

    An error that turns out larger than the goal is aimed at again, lower, up to three times; after that everything
    stays in FP16.

    Args:
        profile: the measurements.
        precision: what is used where FP16 isn't.
        goal: one of GOALS.
        value: largest relative L1, or largest part by which attention may get slower.
        sample: draws the final latents with a text for fp16_blocks.
        expected: the final latents with 16-bit attention.

    Raises:
        ValueError: no such goal, or a value below 0.
    """
    if goal not in GOALS:
        raise ValueError(f"goal must be one of {', '.join(GOALS)}, got {goal!r}")
    if goal == "max_slowdown":
        choice = choose_for_slowdown(profile, precision, value)
        return choice, relative_l1(sample(choice.text), expected)
    aim = value
    for _ in range(_ATTEMPTS):
        choice = choose_for_error(profile, precision, aim)
        measured = relative_l1(sample(choice.text), expected)
        if measured <= value:
            return choice, measured
        # From what was predicted for the choice, not from the aim: else the same choice may come again.
        aim = 0.95 * choice.predicted_error * value / measured if math.isfinite(measured) else 0.0
    return choose_for_error(profile, precision, 0.0), 0.0


def report(choice: Fp16Choice, measured: float, precision: str, cost: Fp16Cost) -> str:
    """Three lines for the node."""
    kept = choice.text or "nothing"
    return (
        f"kept in FP16: {kept}\n"
        f"{choice.work:.0%} of the attention in FP16, the rest in {precision}; final error {measured:.2%} "
        f"(predicted {choice.predicted_error:.2%})\n{_speed(choice, precision, cost)}"
    )


def _speed(choice: Fp16Choice, precision: str, cost: Fp16Cost) -> str:
    origin = {
        "measured": "as measured in this calibration",
        "predicted": "as predicted from measured times",
        "assumed": "an assumption: nothing was measured here",
    }[cost.origin]
    times = f"FP16 takes {cost.value:.2f}x the time of {precision}, {origin}"
    if cost.value <= 1:
        return f"{precision} gains no speed here: {times}"
    return f"attention {choice.work * (cost.value - 1):.0%} slower than all in {precision} ({times})"
