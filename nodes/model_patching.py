"""Puts the attention override, the block tracking and the report of what ran into a clone of a MODEL."""

import logging
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from sage_kernels.block_overrides import BlockLayout
from sage_kernels.precision_policy import PrecisionPolicy

from .attention_override import AttentionOverride
from .block_tracking import BlockTracker
from .model_families import block_layout, find_blocks

logger = logging.getLogger(__name__)

OVERRIDE_KEY = "optimized_attention_override"
WRAPPER_KEY = "sage3_attention"


@dataclass(frozen=True)
class AttentionSettings:
    """What a user chooses.

    Attributes:
        precision: as in sage_kernels.attention.
        fp16_blocks: text for parse_block_overrides().
        start_percent, end_percent: the part of the sampling, by noise level, that uses the precision; FP16 elsewhere.
        min_tokens: attention over fewer tokens stays in FP16.
        allow_emulation: compute in plain PyTorch what the GPU lacks.
        verbose: log a line per block after each sampling.
    """

    precision: str = "auto"
    fp16_blocks: str = ""
    start_percent: float = 0.0
    end_percent: float = 1.0
    min_tokens: int = 0
    allow_emulation: bool = False
    verbose: bool = False


def patch_model(model: Any, settings: AttentionSettings, kernels: ModuleType) -> Any:
    """A clone of `model`, a ComfyUI ModelPatcher, whose attention runs in `kernels`; `model` itself stays as it is.

    An override of another node stays behind this one, for the calls that this one leaves alone. An earlier one of this
    pack is replaced: two policies in a row would leave it to the first what the second keeps in FP16.

    Raises:
        ValueError: settings that don't fit the model; the message is one line.
    """
    from comfy.patcher_extension import WrappersMP  # noqa: PLC0415  (tests import this file without core)

    if not settings.start_percent < settings.end_percent:
        raise ValueError(
            f"start_percent ({settings.start_percent:g}) must be lower than end_percent ({settings.end_percent:g})"
        )
    diffusion_model = model.get_model_object("diffusion_model")
    blocks = find_blocks(diffusion_model)
    if not blocks:
        raise ValueError(
            f"no transformer blocks are known in {type(diffusion_model).__name__}, so there is nothing to speed up; "
            "bypass this node for this model"
        )
    layout = block_layout(blocks)
    policy = PrecisionPolicy.for_model(layout, settings.precision, settings.fp16_blocks, settings.min_tokens)

    patched = model.clone()
    options = patched.model_options["transformer_options"]
    previous = options.get(OVERRIDE_KEY)
    override = AttentionOverride(
        policy,
        kernels,
        native_blocks={key: block.id for block in blocks for key in block.native_keys},
        window=(settings.start_percent, settings.end_percent),
        previous=previous.previous if isinstance(previous, AttentionOverride) else previous,
        allow_emulation=settings.allow_emulation,
    )
    options[OVERRIDE_KEY] = override
    for kind, wrapper in (
        (WrappersMP.APPLY_MODEL, BlockTracker(override.reads_sigma)),
        (WrappersMP.OUTER_SAMPLE, SamplingReport(override, layout, settings.verbose)),
    ):
        patched.remove_wrappers_with_key(kind, WRAPPER_KEY)
        patched.add_wrapper_with_key(kind, WRAPPER_KEY, wrapper)
    return patched


class SamplingReport:
    """Wrapper for core's WrappersMP.OUTER_SAMPLE: counts each sampling anew and says what ran."""

    def __init__(self, override: AttentionOverride, layout: BlockLayout, verbose: bool) -> None:
        self._coverage = override.coverage
        self._layout = layout
        self._verbose = verbose

    def __call__(self, executor: Any, *args: Any, **kwargs: Any) -> Any:
        """Sample, then log."""
        self._coverage.reset()
        try:
            return executor(*args, **kwargs)
        finally:
            self._log()

    def _log(self) -> None:
        blocks = self._coverage.by_block()
        if not blocks:
            logger.warning("Sage3: this model never asked for another attention, so this node changed nothing")
            return
        logger.info("Sage3: attention calls by kernel: %s", self._coverage)
        if self._verbose:
            for block, kernels in blocks.items():
                name = "outside the blocks" if block is None else f"block {self._layout.name(block)}"
                logger.info("Sage3: %s: %s", name, ", ".join(f"{kernel} {calls}" for kernel, calls in kernels.items()))
