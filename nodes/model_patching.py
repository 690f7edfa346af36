"""Puts the attention override, the block tracking and the report of what ran into a clone of a MODEL."""

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from sage_kernels.precision_policy import CrossAttention, PrecisionPolicy

from .attention_override import AttentionOverride
from .block_tracking import BlockTracker
from .model_families import block_layout, find_blocks
from .sampling_report import SamplingReport
from .sentinel import Sentinel

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
        verbose: log a line per block after each sampling, and time the model's own attention for comparison.
        cross_attention: as in PrecisionPolicy.
    """

    precision: str = "auto"
    fp16_blocks: str = ""
    start_percent: float = 0.0
    end_percent: float = 1.0
    min_tokens: int = 0
    allow_emulation: bool = False
    verbose: bool = False
    cross_attention: CrossAttention = "same"


def patch_model(
    model: Any, settings: AttentionSettings, kernels: ModuleType, show: Callable[[str], None] | None = None
) -> Any:
    """A clone of `model`, a ComfyUI ModelPatcher, whose attention runs in `kernels`.

    An override of another node stays behind this one, for the calls that this one leaves alone. An earlier one of this
    pack is replaced: two policies in a row would leave it to the first what the second keeps in FP16.

    Args:
        model: stays as it is.
        settings: what the user chose.
        kernels: sage_kernels.
        show: gets a text after each sampling that says what ran.

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
    policy = PrecisionPolicy.for_model(
        layout, settings.precision, settings.fp16_blocks, settings.min_tokens, settings.cross_attention
    )
    sentinel = Sentinel(layout)

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
        sentinel=sentinel,
        measure_speedup=settings.verbose,
    )
    options[OVERRIDE_KEY] = override
    wrappers = {
        # The first is the outermost: what the sentinel evaluates again is a new evaluation to the tracker.
        WrappersMP.APPLY_MODEL: (sentinel, BlockTracker(override.reads_sigma)),
        WrappersMP.OUTER_SAMPLE: (SamplingReport(override, layout, settings.verbose, show),),
    }
    for kind, ours in wrappers.items():
        patched.remove_wrappers_with_key(kind, WRAPPER_KEY)
        for wrapper in ours:
            patched.add_wrapper_with_key(kind, WRAPPER_KEY, wrapper)
    return patched
