"""The two ways to draw a video with the demo model: through diffusers, or through the workflow in a real ComfyUI."""

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

from sage_kernels.diffusers import patch

from .comfyui_client import run_workflow
from .comfyui_server import ComfyServer
from .conditioning import conditioning
from .latents import decode
from .moving_digits import DIRECTION_NAMES
from .sampling import sample

WORKFLOW = Path(__file__).resolve().parents[2] / "workflows" / "sage3_demo.json"
OnStep = Callable[[], object]


@dataclass(frozen=True)
class Drawing:
    """One video.

    Attributes:
        frames: uint8 [T, H, W].
        values: what cosine and L1 are taken of: the final latents, or the frames where only those are to be had.
        seconds: of the sampling.
        calls: attention calls per kernel.
        coverage: the same as text, with the reasons of those that stepped aside.
    """

    frames: np.ndarray
    values: Tensor
    seconds: float
    calls: dict[str, int]
    coverage: str


class Studio(Protocol):
    """Draws the video that the options ask for, as often as wanted, at different precisions."""

    host: str
    values: str

    def draw(self, precision: str, fp16_blocks: str, on_step: OnStep) -> Drawing:
        """Draw it once; on_step is called after each sampling step."""


class DiffusersStudio:
    """Draws with diffusers' Wan transformer."""

    host = "diffusers"
    values = "final latents"

    def __init__(self, transformer: nn.Module, options: argparse.Namespace) -> None:
        self._transformer = transformer
        self._options = options

    def draw(self, precision: str, fp16_blocks: str, on_step: OnStep) -> Drawing:
        """Sample with the transformer patched, and unpatch it."""
        start = time.monotonic()
        with patch(self._transformer, precision=precision, fp16_blocks=fp16_blocks, allow_emulation=True) as patched:
            latents = sample_demo(self._transformer, self._options, on_step)
        coverage = patched.coverage
        return Drawing(
            to_frames(decode(latents)), latents, time.monotonic() - start, coverage.by_kernel(), str(coverage)
        )


class ComfyUIStudio:
    """Draws by the shipped workflow through the HTTP API of a ComfyUI that it starts; a context manager."""

    values = "frames"

    def __init__(self, options: argparse.Namespace) -> None:
        self._options = options
        self._server = ComfyServer(
            options.comfyui_root, python=options.comfyui_python, cpu=not options.device.startswith("cuda")
        )
        self.host = f"ComfyUI in {options.comfyui_root}"

    def __enter__(self) -> "ComfyUIStudio":
        self._server.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._server.__exit__()

    def draw(self, precision: str, fp16_blocks: str, on_step: OnStep) -> Drawing:
        """Queue the workflow with the node's inputs replaced."""
        options = self._options
        overrides = {
            "Sage3Attention": {
                "precision": precision, "fp16_blocks": fp16_blocks, "allow_emulation": True, "min_tokens": 0,
            },
            "Sage3DemoConditioning": {"digit": options.digit, "direction": options.direction},
            "KSampler": {"seed": options.seed, "steps": options.steps},
        }  # fmt: skip
        run = run_workflow(self._server.url, WORKFLOW, overrides, on_progress=lambda *_: on_step())
        frames = np.stack([np.asarray(image.convert("L")) for image in run.frames])
        return Drawing(frames, torch.from_numpy(frames).float(), run.seconds, dict(run.calls), run.coverage)


def sample_demo(transformer: nn.Module, options: argparse.Namespace, on_step: OnStep) -> Tensor:
    """Latents [1, 16, 8, 32, 32] of the video that the options ask for."""
    parameter = next(transformer.parameters())
    return sample(
        transformer,
        conditioning(options.digit, DIRECTION_NAMES.index(options.direction)),
        seed=options.seed,
        steps=options.steps,
        device=parameter.device,
        dtype=parameter.dtype,
        on_step=lambda *_: on_step(),
    )


def to_frames(pixels: Tensor) -> np.ndarray:
    """Pixels [1, 1, T, H, W] in [-1, 1] to uint8 frames [T, H, W], as ComfyUI's SaveImage rounds them."""
    return ((pixels[0, 0].clamp(-1, 1) + 1) * 127.5).byte().cpu().numpy()
