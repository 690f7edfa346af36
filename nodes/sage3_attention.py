"""The node Sage3Attention."""

import inspect
from typing import Any

from comfy_api.latest import io

from sage_kernels.block_overrides import BlockOverrideError, parse_block_overrides

from .kernel_package import import_sage_kernels
from .model_patching import AttentionSettings, patch_model


class Sage3Attention(io.ComfyNode):
    """Patches a MODEL so that its attention runs in low precision, block by block."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs and outputs."""
        return io.Schema(
            node_id="Sage3Attention",  # permanent: saved in workflows
            display_name="Sage3 Attention",
            category="model/attention/Sage3",
            description="Runs the attention of a video or image model in FP4 or INT8, with full precision kept for the "
            "blocks and steps that need it. Bypass the node to switch it off.",
            inputs=[
                io.Model.Input("model"),
                io.Combo.Input(
                    "precision",
                    options=["auto", "fp4", "int8", "fp16"],
                    default="auto",
                    tooltip="auto: the fastest that this GPU does well. fp4: SageAttention3 (RTX 50 and other "
                    "Blackwell GPUs). fp16: the model's own attention. What the GPU can't do is left to the model's "
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
                    **_advanced(io.Int.Input),
                ),
                io.Boolean.Input(
                    "allow_emulation",
                    default=False,
                    tooltip="Where the GPU lacks the precision, compute it in plain PyTorch: very slow. To judge the "
                    "quality of FP4, not its speed.",
                    **_advanced(io.Boolean.Input),
                ),
                io.Boolean.Input(
                    "verbose",
                    default=False,
                    tooltip="After each sampling, log for each block which kernel ran how often.",
                    **_advanced(io.Boolean.Input),
                ),
            ],
            outputs=[io.Model.Output()],
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
    ) -> io.NodeOutput:
        """Patch a clone of the model."""
        settings = AttentionSettings(
            precision, fp16_blocks, start_percent, end_percent, min_tokens, allow_emulation, verbose
        )
        return io.NodeOutput(patch_model(model, settings, import_sage_kernels()))


def _advanced(input_type: type) -> dict[str, bool]:
    """Hide a widget behind "advanced", in versions of ComfyUI that can."""
    return {"advanced": True} if "advanced" in inspect.signature(input_type.__init__).parameters else {}
