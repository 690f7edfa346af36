"""The node Sage3Calibrate."""

from typing import Any

import comfy.model_management
import comfy.samplers
import comfy.utils
from comfy_api.latest import io
from torch import Tensor

from .calibrated_choice import choose, report
from .calibration import CalibrationSettings, calibrate, evaluations
from .comparison import sample_run
from .fp16_choice import cell_errors, fp16_cost, fp16_mask
from .heat_map import draw_heat_map
from .kernel_package import import_sage_kernels
from .model_families import block_layout, find_blocks
from .model_patching import AttentionSettings, patch_model
from .profile import MEASURABLE
from .schema_options import advanced, search_aliases

Profile = io.Custom("SAGE3_PROFILE")


class Sage3Calibrate(io.ComfyNode):
    """Measures which blocks and steps of a MODEL need FP16, and patches it so."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs and outputs."""
        return io.Schema(
            node_id="Sage3Calibrate",  # permanent: saved in workflows
            display_name="Sage3 Calibrate",
            category="model/attention/Sage3",
            description="Samples once in 16 bit and several times in low precision, measures what each block at each "
            "step does to the result, and keeps the fewest blocks and steps in FP16 that your goal allows.",
            inputs=[
                io.Model.Input("model"),
                io.Conditioning.Input("positive"),
                io.Conditioning.Input("negative"),
                io.Latent.Input("latent_image"),
                io.Int.Input("seed", default=0, min=0, max=(1 << 64) - 1, control_after_generate=True),
                io.Int.Input("steps", default=20, min=1, max=10000),
                io.Float.Input("cfg", default=8.0, min=0.0, max=100.0, step=0.1, round=0.01),
                io.Combo.Input("sampler_name", options=comfy.samplers.KSampler.SAMPLERS),
                io.Combo.Input("scheduler", options=comfy.samplers.KSampler.SCHEDULERS),
                io.Combo.Input(
                    "precision",
                    options=list(MEASURABLE),
                    default="fp4",
                    tooltip="What attention runs in wherever it isn't kept in FP16.",
                ),
                io.Combo.Input(
                    "goal",
                    options=["max_error", "max_slowdown"],
                    default="max_error",
                    tooltip="max_error: as fast as possible with a final error of at most goal_value. max_slowdown: as "
                    "exact as possible with attention at most goal_value slower than all in low precision.",
                ),
                io.Float.Input(
                    "goal_value",
                    default=3.0,
                    min=0.0,
                    max=1000.0,
                    step=0.1,
                    tooltip="In percent. Of an error: relative L1 of the final latents against 16-bit attention.",
                ),
                io.Int.Input(
                    "calibration_steps",
                    default=3,
                    min=1,
                    max=100,
                    tooltip="At how many of the steps every block is tried. Each costs one evaluation of the model per "
                    "block (at most 32) and one more sampling.",
                ),
                io.Int.Input(
                    "rows",
                    default=256,
                    min=128,
                    max=1 << 20,
                    step=128,
                    tooltip="Query rows per head on which the error of attention itself is measured.",
                    **advanced(io.Int.Input),
                ),
                io.Int.Input(
                    "min_tokens",
                    default=1024,
                    min=0,
                    max=1 << 20,
                    tooltip="Attention over fewer tokens stays in FP16, as in Sage3 Attention.",
                    **advanced(io.Int.Input),
                ),
                io.Boolean.Input(
                    "allow_emulation",
                    default=False,
                    tooltip="Where the GPU lacks the precision, compute it in plain PyTorch: very slow.",
                    **advanced(io.Boolean.Input),
                ),
            ],
            outputs=[
                io.Model.Output(),
                io.Image.Output(display_name="heat_map"),
                Profile.Output(display_name="profile"),
                io.String.Output(display_name="fp16_blocks"),
            ],
            **search_aliases("sage attention calibration", "fp4 sensitivity", "which blocks fp16"),
        )

    @classmethod
    def execute(
        cls,
        model: Any,
        positive: Any,
        negative: Any,
        latent_image: dict[str, Any],
        seed: int,
        steps: int,
        cfg: float,
        sampler_name: str,
        scheduler: str,
        precision: str,
        goal: str,
        goal_value: float,
        calibration_steps: int,
        rows: int,
        min_tokens: int,
        allow_emulation: bool,
    ) -> io.NodeOutput:
        """Measure, choose, draw."""
        kernels = import_sage_kernels()
        settings = CalibrationSettings((precision,), calibration_steps, rows, min_tokens, allow_emulation)
        blocks = len(block_layout(find_blocks(model.get_model_object("diffusion_model"))))
        # One sampling more, for what was chosen.
        bar = comfy.utils.ProgressBar(evaluations(settings, blocks, steps) + steps)

        def progress() -> None:
            comfy.model_management.throw_exception_if_processing_interrupted()
            bar.update(1)

        run = {"seed": seed, "steps": steps, "cfg": cfg, "sampler_name": sampler_name, "scheduler": scheduler}
        interrupted = comfy.model_management.throw_exception_if_processing_interrupted

        def sample(patched: Any) -> Tensor:
            sampled = sample_run(patched, latent_image, {**run, "denoise": 1.0}, positive, negative, interrupted)
            return sampled.latent["samples"]

        def patch(fp16_blocks: str) -> Any:
            chosen = AttentionSettings(precision, fp16_blocks, min_tokens=min_tokens, allow_emulation=allow_emulation)
            return patch_model(model, chosen, kernels)

        profile, expected = calibrate(model, sample, settings, kernels, progress=progress)
        choice, measured = choose(
            profile, precision, goal, goal_value / 100, lambda text: sample(patch(text)), expected
        )
        bar.update_absolute(bar.total)
        summary = report(choice, measured, precision, fp16_cost(profile, precision))
        names = [profile.layout.name(block) for block in profile.layout]
        picture = draw_heat_map(
            cell_errors(profile, precision),
            fp16_mask(choice, profile.layout, len(profile.schedule) - 1),
            names,
            f"{profile.family}, {precision}: what a block at a step does to the final latents\n{summary}",
        )
        return io.NodeOutput(patch(choice.text), picture, profile, choice.text, ui={"text": [summary]})
