"""The node Sage3Attention."""

from typing import Any, get_args

from comfy_api.latest import io
from torch import nn

from sage_kernels.block_overrides import BlockOverrideError, parse_block_overrides
from sage_kernels.precision import PRECISIONS
from sage_kernels.precision_policy import CrossAttention

from .kernel_package import import_sage_kernels
from .model_families import block_layout, find_blocks, find_family
from .model_patching import AttentionSettings, patch_model
from .profile import MEASURABLE
from .sampling_report import text_on_node
from .schema_options import advanced, search_aliases


class Sage3Attention(io.ComfyNode):
    """Patches a MODEL so that its attention runs in low precision, block by block."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs and outputs."""
        return io.Schema(
            node_id="Sage3Attention",  # permanent: saved in workflows
            display_name="Sage3 Attention",
            category="model/attention/Sage3",
            **search_aliases("sage attention", "sageattention", "fp4 attention", "int8 attention", "fast attention"),
            description="Runs the attention of a video or image model in FP4 or INT8, with full precision kept for the "
            "blocks and steps that need it. Bypass the node to switch it off.",
            inputs=[
                io.Model.Input("model"),
                io.Combo.Input(
                    "precision",
                    options=list(PRECISIONS),  # the package's: saved workflows keep the word, not its place
                    default="auto",
                    tooltip="auto: the fastest that this GPU does well. fp4: SageAttention3 (RTX 50 and other "
                    "Blackwell GPUs). fp8_fp4: FP8 scores, between fp4 and int8. int8: SageAttention2. int8_fp16: the "
                    "more exact INT8. fp16: the model's own attention. What the GPU can't do is left to the model's "
                    "own attention, with the reason in the log.",
                ),
                io.String.Input(
                    "fp16_blocks",
                    default="",
                    multiline=False,
                    placeholder="0-2: 1, 17: 0.5",
                    tooltip="Blocks to keep in FP16, and for which share of the steps. '0-2: 1, 17: 0.5': blocks 0 to "
                    "2 always, block 17 for the first half (the high-noise end; '17: 0.5 low' for the last half). "
                    "'single.5: 1' addresses a block by type in models with several types.",
                ),
                io.Float.Input(
                    "start_percent",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.001,
                    tooltip="Where in the sampling low precision starts; before it attention runs in FP16.",
                ),
                io.Float.Input(
                    "end_percent",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.001,
                    tooltip="Where in the sampling low precision ends; after it attention runs in FP16.",
                ),
                io.Int.Input(
                    "min_tokens",
                    default=1024,
                    min=0,
                    max=1 << 20,
                    tooltip="Attention over fewer tokens stays in FP16, where it is as fast: cross-attention to a "
                    "prompt, mostly.",
                    **advanced(io.Int.Input),
                ),
                io.Boolean.Input(
                    "allow_emulation",
                    default=False,
                    tooltip="Where the GPU lacks the precision, compute it in plain PyTorch: very slow. To judge the "
                    "quality of FP4, not its speed.",
                    **advanced(io.Boolean.Input),
                ),
                io.Boolean.Input(
                    "verbose",
                    default=False,
                    tooltip="After each sampling, log for each block which kernel ran how often. Also runs the model's "
                    "own attention beside the kernels on three calls of each shape, to measure the speed-up.",
                    **advanced(io.Boolean.Input),
                ),
                # Optional, and after the others: workflows saved before it was there load as they were.
                io.Combo.Input(
                    "cross_attention",
                    options=list(get_args(CrossAttention)),
                    default="same",
                    optional=True,
                    tooltip="Attention between two sequences of different lengths, such as the picture and its prompt. "
                    "same: as all other attention. fp16: the model's own.",
                    **advanced(io.Combo.Input),
                ),
                io.Custom("SAGE3_PROFILE").Input(
                    "profile",
                    optional=True,
                    tooltip="A calibration of this model: colours its blocks by how sensitive they are.",
                ),
            ],
            outputs=[io.Model.Output()],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def validate_inputs(cls, fp16_blocks: str = "") -> bool | str:
        """Say before anything runs what is wrong with the text; whether the model has the blocks is seen later."""
        try:
            parse_block_overrides(fp16_blocks)
        except BlockOverrideError as error:
            return str(error)
        return True

    @classmethod
    def execute(
        cls,
        model: Any,
        precision: str,
        fp16_blocks: str,
        start_percent: float,
        end_percent: float,
        min_tokens: int,
        allow_emulation: bool,
        verbose: bool,
        cross_attention: str = "same",
        profile: Any = None,
    ) -> io.NodeOutput:
        """Patch a clone of the model, and tell the browser which blocks it has."""
        settings = AttentionSettings(
            precision,
            fp16_blocks,
            start_percent,
            end_percent,
            min_tokens,
            allow_emulation,
            verbose,
            cross_attention,
        )
        node_id = cls.hidden.unique_id if cls.hidden is not None else None
        show = None if node_id is None else text_on_node(node_id)
        patched = patch_model(model, settings, import_sage_kernels(), show)
        diffusion_model = model.get_model_object("diffusion_model")
        return io.NodeOutput(patched, ui={"sage3": [describe_blocks(diffusion_model, profile, precision)]})


def describe_blocks(diffusion_model: nn.Module, profile: Any, precision: str) -> dict[str, Any]:
    """The model's blocks in the order of the bare numbers, for the browser.

    Args:
        diffusion_model: the network.
        profile: its CalibrationProfile, or None.
        precision: as the node has it; auto and fp16 are coloured by the first that the profile has.

    Returns:
        {"family", "blocks": [{"name", "type", "index"}, ...], "sensitivity": one number per block, or None}.

    Raises:
        ValueError: the profile is of a model with other blocks.
    """
    layout = block_layout(find_blocks(diffusion_model))
    blocks = [{"name": layout.name(block), "type": block.type, "index": block.index} for block in layout]
    family = find_family(diffusion_model).name
    if profile is None:
        return {"family": family, "blocks": blocks, "sensitivity": None}
    measured = profile.sensitivity_by_block(precision if precision in MEASURABLE else profile.precisions[0])
    missing = [layout.name(block) for block in layout if block not in measured]
    if missing:
        raise ValueError(
            f"the profile says nothing about block {missing[0]} of this {family} model; calibrate this model"
        )
    return {"family": family, "blocks": blocks, "sensitivity": [float(measured[block]) for block in layout]}
