"""Two nodes that belong to the pack's demo model, which has neither a text encoder nor a VAE.

The demo package is no part of the sage_kernels wheel, and its folder is on no path: it is loaded from the pack by file,
under a private name, so that a `demo` of another node pack is never met.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from comfy_api.latest import io

from .attention_override import AttentionOverride
from .model_patching import OVERRIDE_KEY

DEMO_FOLDER = Path(__file__).resolve().parents[1] / "sage_kernels" / "demo"
MODEL_FOLDER = DEMO_FOLDER / "model"
_PACKAGE = "_sage3_demo"
_CATEGORY = "sage3/demo"


def _demo_module(name: str) -> ModuleType:
    if _PACKAGE not in sys.modules:
        spec = importlib.util.spec_from_file_location(_PACKAGE, DEMO_FOLDER / "__init__.py")
        assert spec is not None
        assert spec.loader is not None
        sys.modules[_PACKAGE] = package = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(package)
    return importlib.import_module(f"{_PACKAGE}.{name}")


conditioning = _demo_module("conditioning")
latents = _demo_module("latents")
moving_digits = _demo_module("moving_digits")


class Sage3DemoConditioning(io.ComfyNode):
    """What stands in for a text encoder."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Digit and direction to CONDITIONING."""
        return io.Schema(
            node_id="Sage3DemoConditioning",
            display_name="Sage3 Demo Conditioning",
            category=_CATEGORY,
            description="Asks the demo model (wan_digits) for a clip of one handwritten digit moving in one direction.",
            inputs=[
                io.Int.Input("digit", default=3, min=0, max=moving_digits.NUM_DIGITS - 1, tooltip="The digit to draw."),
                io.Combo.Input(
                    "direction",
                    options=list(moving_digits.DIRECTION_NAMES),
                    default=moving_digits.DIRECTION_NAMES[0],
                    tooltip="Where the digit moves.",
                ),
            ],
            outputs=[io.Conditioning.Output()],
        )

    @classmethod
    def execute(cls, digit: int, direction: str) -> io.NodeOutput:
        """Context [1, 8, 4096]."""
        names = moving_digits.DIRECTION_NAMES
        if direction not in names:  # ComfyUI 0.3.64 lets any text through
            raise ValueError(f"direction must be one of {', '.join(names)}, got {direction!r}")
        return io.NodeOutput([[conditioning.conditioning(digit, names.index(direction)).unsqueeze(0), {}]])


class Sage3DemoDecode(io.ComfyNode):
    """What stands in for a VAE decoder."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """LATENT to IMAGE, and a report of the attention calls."""
        return io.Schema(
            node_id="Sage3DemoDecode",
            display_name="Sage3 Demo Decode",
            category=_CATEGORY,
            description="Turns the demo model's latents into frames. Only for wan_digits: it has no VAE.",
            inputs=[
                io.Latent.Input("samples", tooltip="Latents of the demo model, as KSampler gives them."),
                io.Model.Input(
                    "model",
                    optional=True,
                    tooltip="The model that was sampled: reports which kernel served how many of its attention calls.",
                ),
            ],
            outputs=[io.Image.Output()],
        )

    @classmethod
    def execute(cls, samples: dict[str, Any], model: Any = None) -> io.NodeOutput:
        """Frames [B * 8, 128, 128, 3] in 0..1."""
        pixels = latents.decode(latents.from_wan21_latent(samples["samples"].float()))
        frames = pixels.clamp(-1, 1).add(1).div(2).movedim(1, -1).flatten(0, 1)
        return io.NodeOutput(frames.expand(-1, -1, -1, 3).contiguous(), ui=_attention_report(model))


def _attention_report(model: Any) -> dict[str, list[Any]] | None:
    """What the last sampling of a MODEL counted, for the node's result in ComfyUI's history; None if not patched."""
    override = model and model.model_options["transformer_options"].get(OVERRIDE_KEY)
    if not isinstance(override, AttentionOverride):
        return None
    return {"calls": [override.coverage.by_kernel()], "text": [str(override.coverage)]}


DEMO_NODES = [Sage3DemoConditioning, Sage3DemoDecode]


def register_demo_model() -> None:
    """Let ComfyUI's loaders find the demo model where it lies in the pack, after the user's own folders."""
    import folder_paths  # noqa: PLC0415  (ComfyUI's; its loaders need it only once the pack is loaded)

    folder_paths.add_model_folder_path("diffusion_models", str(MODEL_FOLDER), is_default=False)
