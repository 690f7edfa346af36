"""The node Sage3Compare."""

from typing import Any

import torch
from comfy_api.latest import io, ui
from torch import Tensor

from .comparison import MODES, compose, preview_frames, sample_run, write_report
from .schema_options import search_aliases


class Sage3Compare(io.ComfyNode):
    """Samples the same noise with two models and shows the difference."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """KSampler's inputs with two models; frames, report and both latents."""
        import comfy.samplers  # noqa: PLC0415  (tests import this file without core)

        return io.Schema(
            node_id="Sage3Compare",  # permanent: saved in workflows
            display_name="Sage3 Compare",
            category="model/attention/Sage3",
            **search_aliases("compare attention", "compare models", "psnr", "ssim", "ab test", "attention quality"),
            description="Samples the same noise with two models, such as one with and one without Sage3 Attention, and "
            "says how far the results are apart and what each took.",
            inputs=[
                io.Model.Input("model_a", tooltip="What B is measured against: mostly the model without patches."),
                io.Model.Input("model_b", tooltip="The other one: any patches of the same model."),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=0xFFFFFFFFFFFFFFFF,
                    control_after_generate=True,
                    tooltip="Of the noise, the same for both.",
                ),
                io.Int.Input("steps", default=20, min=1, max=10000, tooltip="Sampling steps of each run."),
                io.Float.Input("cfg", default=8.0, min=0.0, max=100.0, step=0.1, tooltip="As in KSampler."),
                io.Combo.Input("sampler_name", options=comfy.samplers.KSampler.SAMPLERS, tooltip="As in KSampler."),
                io.Combo.Input("scheduler", options=comfy.samplers.KSampler.SCHEDULERS, tooltip="As in KSampler."),
                io.Conditioning.Input("positive", tooltip="As in KSampler."),
                io.Conditioning.Input("negative", tooltip="As in KSampler."),
                io.Latent.Input("latent_image", tooltip="As in KSampler."),
                io.Float.Input("denoise", default=1.0, min=0.0, max=1.0, step=0.01, tooltip="As in KSampler."),
                io.Combo.Input(
                    "mode",
                    options=list(MODES),
                    default=MODES[0],
                    tooltip="A and B in a row, their difference four times as strong, or all three.",
                ),
                io.Vae.Input(
                    "vae",
                    optional=True,
                    tooltip="Decodes both. Without it the frames are rough previews, and PSNR and SSIM are left out.",
                ),
            ],
            outputs=[
                io.Image.Output(display_name="frames"),
                io.String.Output(display_name="report"),
                io.Latent.Output(display_name="latent_a"),
                io.Latent.Output(display_name="latent_b"),
            ],
        )

    @classmethod
    def execute(
        cls,
        model_a: Any,
        model_b: Any,
        positive: Any,
        negative: Any,
        latent_image: dict[str, Any],
        mode: str,
        vae: Any = None,
        **settings: Any,
    ) -> io.NodeOutput:
        """Sample twice, one after the other. `settings` are KSampler's."""
        import comfy.utils  # noqa: PLC0415  (tests import this file without core)

        if mode not in MODES:  # ComfyUI 0.3.64 lets any text through
            raise ValueError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")
        progress = comfy.utils.ProgressBar(2 * settings["steps"])
        run_a, run_b = (
            sample_run(model, latent_image, settings, positive, negative, lambda: progress.update(1))
            for model in (model_a, model_b)
        )
        latents = run_a.latent["samples"], run_b.latent["samples"]
        if vae is None:
            decoded = None
            pictures = preview_frames(model_a, latents[0]), preview_frames(model_b, latents[1])
        else:
            decoded = pictures = _decode(vae, latents[0]), _decode(vae, latents[1])
        text = write_report(run_a, run_b, decoded)
        frames = compose(*pictures, mode)
        return io.NodeOutput(frames, text, run_a.latent, run_b.latent, ui=ui.PreviewText(text))


def _decode(vae: Any, samples: Tensor) -> Tensor:
    """Frames [T, H, W, 3] in 0..1."""
    pixels: torch.Tensor = vae.decode(samples)
    return pixels.flatten(0, -4).float().clamp(0, 1)
