"""Measures what low precision does to a model: per head, to the model's output, and to the final latents.

One sampling in 16 bit, during which the steps looked at are evaluated again with one block (or a few neighbours) in low
precision; then one sampling per part of the schedule with all blocks in low precision there, which says how errors made
early and late grow until the end; and one with low precision everywhere.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from sage_kernels.block_overrides import BlockId, BlockLayout, StepShare
from sage_kernels.coverage import Coverage
from sage_kernels.precision_policy import PrecisionPolicy, noise_rank

from .attention_override import AttentionOverride
from .attention_timing import Timing
from .block_tracking import BlockTracker
from .fp16_choice import cost_settings, segments
from .frame_metrics import relative_l1
from .model_families import block_layout, find_blocks, find_family
from .model_fingerprint import model_fingerprint
from .model_patching import OVERRIDE_KEY, WRAPPER_KEY
from .profile import LARGEST, MEASURABLE, CalibrationProfile
from .shadow_attention import ShadowAttention

METHOD = "output with each block alone in low precision; final latents with all blocks in parts of the schedule"
Sample = Callable[[Any], Tensor]


class CalibrationError(ValueError):
    """A model or settings that can't be calibrated; the message is one line."""


@dataclass(frozen=True)
class CalibrationSettings:
    """How to measure.

    Attributes:
        precisions: which to measure.
        steps_looked_at: at how many steps of the schedule.
        rows: query rows per head that errors of attention are measured on.
        min_tokens: attention over fewer tokens stays in FP16, as in AttentionSettings.
        allow_emulation: compute in plain PyTorch what the GPU lacks.
        max_groups: a model with more blocks is measured in groups of neighbours, whose effect is split by their errors.

    Raises:
        CalibrationError: impossible values.
    """

    precisions: tuple[str, ...] = ("fp4",)
    steps_looked_at: int = 3
    rows: int = 256
    min_tokens: int = 0
    allow_emulation: bool = False
    max_groups: int = 32

    def __post_init__(self) -> None:
        if not self.precisions or not set(self.precisions) <= set(MEASURABLE):
            raise CalibrationError(f"precisions must be of {', '.join(MEASURABLE)}, got {', '.join(self.precisions)}")
        for name in ("steps_looked_at", "rows", "max_groups"):
            if getattr(self, name) < 1:
                raise CalibrationError(f"{name} must be 1 or more, got {getattr(self, name)}")


def evaluations(settings: CalibrationSettings, blocks: int, steps: int) -> int:
    """At most how often a calibration evaluates the model, with a sampler of one evaluation per step."""
    looked_at = min(settings.steps_looked_at, steps)
    precisions = len(settings.precisions)
    return steps + precisions * (looked_at * min(blocks, settings.max_groups) + (looked_at + 1) * steps)


def middle_steps(total: int, wanted: int) -> tuple[int, ...]:
    """The middles of `wanted` equal parts of a schedule of `total` steps."""
    wanted = min(wanted, total)
    return tuple((2 * part + 1) * total // (2 * wanted) for part in range(wanted))


def calibrate(
    model: Any,
    sample: Sample,
    settings: CalibrationSettings,
    kernels: ModuleType,
    *,
    progress: Callable[[], None] = lambda: None,
) -> tuple[CalibrationProfile, Tensor]:
    """Measure a ComfyUI ModelPatcher; it stays as it is.

    Args:
        model: what to measure.
        sample: draws the final latents with a model like `model`; the same noise every time.
        settings: how to measure.
        kernels: sage_kernels.
        progress: called before each evaluation of the model; may raise to end the calibration.

    Returns:
        The measurements, and the final latents of the 16-bit sampling.

    Raises:
        CalibrationError: nothing could be measured; says why.
    """
    run = _Calibration(model, settings, kernels, progress)
    expected = sample(run.model)
    run.finish_first_sampling()
    all_steps = range(len(run.schedule) - 1)
    ranges = [*segments(run.steps, len(all_steps)), all_steps]
    errors = torch.tensor(
        [
            [run.error_of_low_precision(sample, expected, precision, steps) for steps in ranges]
            for precision in settings.precisions
        ]
    )
    return run.profile(errors[:, :-1], errors[:, -1]), expected


class _Calibration:
    """The clone of a model that is measured, and what was measured so far.

    Attributes:
        model: the clone.
        schedule, steps: known once a sampling has begun.
    """

    def __init__(
        self, model: Any, settings: CalibrationSettings, kernels: ModuleType, progress: Callable[[], None]
    ) -> None:
        from comfy.patcher_extension import WrappersMP  # noqa: PLC0415  (tests import this file without core)

        diffusion_model = model.get_model_object("diffusion_model")
        blocks = find_blocks(diffusion_model)
        if not blocks:
            raise CalibrationError(f"no transformer blocks are known in {type(diffusion_model).__name__}")
        self.schedule: tuple[float, ...] = ()
        self.steps: tuple[int, ...] = ()
        self._original, self._settings, self._kernels, self._progress = model, settings, kernels, progress
        self._family, self._layout = find_family(diffusion_model).name, block_layout(blocks)
        self._native_blocks = {key: block.id for block in blocks for key in block.native_keys}
        self.model = model.clone()
        options = self.model.model_options["transformer_options"]
        previous = options.get(OVERRIDE_KEY)
        self._previous = previous.previous if isinstance(previous, AttentionOverride) else previous
        self._shadow = options[OVERRIDE_KEY] = ShadowAttention(
            self._layout,
            settings.precisions,
            kernels,
            rows=settings.rows,
            native_blocks=self._native_blocks,
            min_tokens=settings.min_tokens,
            previous=self._previous,
            allow_emulation=settings.allow_emulation,
        )
        # [precision, group] by step: relative L1 of the model's output, on the device.
        self._effects: list[list[list[Tensor]]] = []
        self._groups: list[list[BlockId]] = []
        self._coverage = Coverage()
        self._low: tuple[AttentionOverride, range] | None = None
        self._costs: dict[str, Timing] = {}
        for kind, wrapper in (
            (WrappersMP.APPLY_MODEL, BlockTracker(reads_sigma=False)),
            (WrappersMP.PREDICT_NOISE, self._predict_noise),
            (WrappersMP.OUTER_SAMPLE, None),
        ):
            self.model.remove_wrappers_with_key(kind, WRAPPER_KEY)  # of a Sage3Attention before
            if wrapper is not None:
                self.model.add_wrapper_with_key(kind, WRAPPER_KEY, wrapper)

    def error_of_low_precision(self, sample: Sample, expected: Tensor, precision: str, steps: range) -> float:
        """Relative L1 of the final latents with all blocks in low precision at these steps."""
        override = self._override(precision, self._layout, measure_speedup=True)
        self._low = override, steps
        error = relative_l1(sample(self.model), expected)
        self._costs[precision] = override.timer.read()  # of the last, with everything in low precision
        return error

    def finish_first_sampling(self) -> None:
        """Check that it saw what it had to."""
        if len(self._effects) < len(self.steps) or not self.steps:
            raise CalibrationError("the sampler ended before all steps that were to be looked at")

    def profile(self, final_errors: Tensor, full_error: Tensor) -> CalibrationProfile:
        """Read everything from the device."""
        from sage_kernels import __version__  # noqa: PLC0415

        errors, heads = self._shadow.errors(len(self.steps))
        errors = _bounded(errors)
        settings = self._settings
        return CalibrationProfile(
            family=self._family,
            fingerprint=model_fingerprint(self._original),
            pack_version=__version__,
            layout=self._layout,
            schedule=self.schedule,
            steps=self.steps,
            precisions=settings.precisions,
            heads=heads,
            errors=errors,
            sensitivity=_bounded(self._sensitivity(errors, heads)),
            final_errors=_bounded(final_errors),
            full_error=_bounded(full_error),
            attention_share=self._shadow.attention_share(),
            method=METHOD,
            settings={
                "rows": settings.rows,
                "min_tokens": settings.min_tokens,
                "max_groups": settings.max_groups,
                "allow_emulation": int(settings.allow_emulation),
                **{key: value for each in self._costs for key, value in cost_settings(each, self._costs[each]).items()},
            },
        )

    def _predict_noise(self, executor: Any, x: Tensor, timestep: Tensor, *rest: Any, **kwargs: Any) -> Tensor:
        """Wrapper for core's WrappersMP.PREDICT_NOISE: the output after guidance."""
        self._progress()
        rank = self._rank(timestep, rest[0] if rest else kwargs.get("model_options") or {})

        def evaluate() -> Tensor:
            return executor(x, timestep, *rest, **kwargs)

        if self._low is not None:
            override, steps = self._low
            return self._with(override, evaluate) if rank in steps else evaluate()
        slot = len(self._effects)
        if slot == len(self.steps) or rank < self.steps[slot]:
            return evaluate()
        self._shadow.slot = slot
        try:
            expected = evaluate()
        finally:
            self._shadow.slot = None
        self._effects.append(self._measure(evaluate, expected))
        return expected

    def _measure(self, evaluate: Callable[[], Tensor], expected: Tensor) -> list[list[Tensor]]:
        """Relative L1 of the output for each precision and each group of blocks alone in it."""
        if not self._groups:
            measured = self._shadow.measured_blocks
            if not measured:
                reasons = "; ".join(sorted(self._shadow.refusals)) or "the model never asked for another attention"
                raise CalibrationError(f"none of the model's attention can run in low precision here: {reasons}")
            self._groups = _group(measured, self._settings.max_groups)
        effects = []
        for precision in self._settings.precisions:
            row = []
            for group in self._groups:
                self._progress()
                row.append(_effect(self._with(self._override(precision, group), evaluate), expected))
            effects.append(row)
        return effects

    def _with(self, override: AttentionOverride, evaluate: Callable[[], Tensor]) -> Tensor:
        self._shadow.stand_in = override
        try:
            return evaluate()
        finally:
            self._shadow.stand_in = None

    def _override(
        self, precision: str, blocks: Sequence[BlockId] | BlockLayout, measure_speedup: bool = False
    ) -> AttentionOverride:
        """What Sage3Attention would put into the model with only these blocks in low precision."""
        fp16 = {block: StepShare(1.0) for block in self._layout if block not in blocks}
        override = AttentionOverride(
            PrecisionPolicy(precision, fp16, min_tokens=self._settings.min_tokens),
            self._kernels,
            native_blocks=self._native_blocks,
            previous=self._previous,
            allow_emulation=self._settings.allow_emulation,
            measure_speedup=measure_speedup,
        )
        override.coverage = self._coverage  # a new one would log its reasons anew, for each block
        return override

    def _rank(self, timestep: Tensor, model_options: dict[str, Any]) -> int:
        if not self.schedule:
            sigmas = model_options["transformer_options"]["sample_sigmas"]
            self.schedule = tuple(sigmas.flatten().tolist())
            self.steps = middle_steps(len(self.schedule) - 1, self._settings.steps_looked_at)
        return noise_rank(float(timestep.flatten()[0]), self.schedule)

    def _sensitivity(self, errors: Tensor, heads: tuple[int, ...]) -> Tensor:
        """[P, B, S] from the groups' effects: a group's is split in quadrature, by the errors of its blocks."""
        effects = torch.stack([torch.stack([torch.stack(row) for row in step]) for step in self._effects], dim=-1).cpu()
        by_block = (errors.square().sum(dim=2) / torch.tensor(heads)[:, None].clamp(min=1)).sqrt()
        rows = {block: row for row, block in enumerate(self._layout)}
        sensitivity = torch.zeros_like(by_block)
        for number, group in enumerate(self._groups):
            members = [rows[block] for block in group]
            weights = by_block[:, members].clamp(min=1e-12)
            weights = weights / weights.square().sum(dim=1, keepdim=True).sqrt()
            sensitivity[:, members] = effects[:, number, None] * weights
        return sensitivity


def _effect(output: Tensor, expected: Tensor) -> Tensor:
    """sum|a - b| / sum|b| that stays on the device."""
    return (output.float() - expected.float()).abs().sum() / expected.float().abs().sum().clamp(min=1e-30)


def _bounded(errors: Tensor) -> Tensor:
    """A result that isn't finite is the largest error there is."""
    return errors.nan_to_num(nan=LARGEST, posinf=LARGEST).clamp(max=LARGEST)


def _group(blocks: Sequence[BlockId], most: int) -> list[list[BlockId]]:
    """Neighbours of one type, in groups as small as `most` groups allow; types are never mixed."""
    size = math.ceil(len(blocks) / most)
    while True:
        groups: list[list[BlockId]] = []
        for block in blocks:
            if groups and groups[-1][0].type == block.type and len(groups[-1]) < size:
                groups[-1].append(block)
            else:
                groups.append([block])
        if len(groups) <= most or size >= len(blocks):
            return groups
        size += 1
