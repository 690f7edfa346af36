"""Two samplings of the same noise, what each took, and how far the results are apart."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .attention_override import AttentionOverride
from .frame_metrics import SSIM_WINDOW, cosine, psnr, relative_l1, ssim
from .model_patching import OVERRIDE_KEY

DIFFERENCE_GAIN = 4.0


@dataclass(frozen=True)
class SampledRun:
    """One sampling.

    Attributes:
        latent: ComfyUI's LATENT.
        seconds: all of it, loading of the model and warm-up of kernels included.
        seconds_per_step: mean over the steps after the first; None where there is only one.
        peak_bytes: most memory that torch held on the GPU; None without one.
        coverage: which kernels served its attention; None for a model without Sage3 Attention.
    """

    latent: dict[str, Any]
    seconds: float
    seconds_per_step: float | None
    peak_bytes: int | None
    coverage: str | None


class StepClock:
    """Callback of a sampler that notes the time after each step.

    Args:
        on_step: called after each step.
        device: waited for before the time is taken.
    """

    def __init__(self, on_step: Callable[[], None], device: torch.device) -> None:
        self._on_step = on_step
        self._device = device
        self._times: list[float] = []

    def __call__(self, step: int, x0: Tensor, x: Tensor, total_steps: int) -> None:
        """A step is done."""
        synchronize(self._device)
        self._times.append(time.perf_counter())
        self._on_step()

    def seconds_per_step(self) -> float | None:
        """Mean over the steps after the first, which loads and warms up; None without any."""
        return (self._times[-1] - self._times[0]) / (len(self._times) - 1) if len(self._times) > 1 else None


def sample_run(
    model: Any,
    latent: Mapping[str, Any],
    settings: Mapping[str, Any],
    positive: Any,
    negative: Any,
    on_step: Callable[[], None],
) -> SampledRun:
    """Sample as KSampler does.

    Args:
        model: MODEL.
        latent: LATENT to start from; stays as it is.
        settings: seed, steps, cfg, sampler_name, scheduler and denoise.
        positive, negative: CONDITIONING.
        on_step: called after each step.
    """
    import comfy.sample  # noqa: PLC0415  (tests import this file without core)

    samples = comfy.sample.fix_empty_latent_channels(model, latent["samples"])
    noise = comfy.sample.prepare_noise(samples, settings["seed"], latent.get("batch_index"))
    clock = StepClock(on_step, model.load_device)
    if model.load_device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(model.load_device)
    start = time.perf_counter()
    sampled = comfy.sample.sample(
        model,
        noise,
        settings["steps"],
        settings["cfg"],
        settings["sampler_name"],
        settings["scheduler"],
        positive,
        negative,
        samples,
        denoise=settings["denoise"],
        noise_mask=latent.get("noise_mask"),
        callback=clock,
        disable_pbar=True,
        seed=settings["seed"],
    )
    synchronize(model.load_device)
    seconds = time.perf_counter() - start
    peak = torch.cuda.max_memory_allocated(model.load_device) if model.load_device.type == "cuda" else None
    override = model.model_options.get("transformer_options", {}).get(OVERRIDE_KEY)
    coverage = str(override.coverage) if isinstance(override, AttentionOverride) else None
    return SampledRun({**latent, "samples": sampled}, seconds, clock.seconds_per_step(), peak, coverage)


def preview_frames(model: Any, samples: Tensor) -> Tensor:
    """A rough picture of latents [B, C, (T,) H, W]: frames [B * T, H, W, 3] in 0..1, of the latent's own size.

    By the factors that ComfyUI's previews use; where the latent format has none, the mean of the channels in grey.
    """
    latents = model.model.process_latent_in(samples).float()
    latent_format = model.get_model_object("latent_format")
    reshape = getattr(latent_format, "latent_rgb_factors_reshape", None)
    latents = reshape(latents) if reshape is not None else latents
    pixels = latents.movedim(1, -1).flatten(0, -4)  # [B * T, H, W, C]
    factors = latent_format.latent_rgb_factors
    if factors is None:
        return pixels.mean(-1, keepdim=True).add(1).div(2).clamp(0, 1).expand(-1, -1, -1, 3)
    rgb = pixels @ torch.tensor(factors, dtype=pixels.dtype)
    bias = getattr(latent_format, "latent_rgb_factors_bias", None)
    rgb = rgb if bias is None else rgb + torch.tensor(bias, dtype=rgb.dtype)
    return rgb.add(1).div(2).clamp(0, 1)


def compose(frames_a: Tensor, frames_b: Tensor, mode: str) -> Tensor:
    """Frames [T, H, W, C] of both runs beside each other, their difference x 4, or all three in a row."""
    difference = (frames_a - frames_b).abs().mul(DIFFERENCE_GAIN).clamp(0, 1)
    columns = {
        "side by side": (frames_a, frames_b),
        "difference x4": (difference,),
        "both": (frames_a, frames_b, difference),
    }
    return torch.cat(columns[mode], dim=2)


MODES = ("side by side", "difference x4", "both")


def write_report(run_a: SampledRun, run_b: SampledRun, frames: tuple[Tensor, Tensor] | None) -> str:
    """What each run took, and how far B is from A; pictures are compared only where there are real ones."""
    lines = [_describe(name, run) for name, run in (("A", run_a), ("B", run_b))]
    if run_a.seconds_per_step and run_b.seconds_per_step:
        lines.append(f"B took {run_b.seconds_per_step / run_a.seconds_per_step:.3f} of A's time per step")
    a, b = (_main_part(run.latent["samples"]) for run in (run_a, run_b))
    lines.append(f"latents, B against A: relative L1 {relative_l1(b, a):.4g}, cosine {cosine(b, a):.6f}")
    if frames is not None:
        similarity = "" if min(frames[0].shape[1:3]) < SSIM_WINDOW else f", SSIM {ssim(frames[1], frames[0]):.4f}"
        lines.append(f"frames, B against A: PSNR {psnr(frames[1], frames[0]):.2f} dB{similarity}")
    return "\n".join(lines)


def _describe(name: str, run: SampledRun) -> str:
    parts = [f"{name}: {run.seconds:.2f} s"]
    if run.seconds_per_step is not None:
        parts.append(f"{run.seconds_per_step:.3f} s per step after the first")
    if run.peak_bytes is not None:
        parts.append(f"at most {run.peak_bytes / 2**20:.0f} MiB on the GPU")
    parts.append(f"attention: {run.coverage}" if run.coverage is not None else "without Sage3 Attention")
    return ", ".join(parts)


def _main_part(samples: Any) -> Tensor:
    """Of latents that carry sound beside the video, the video."""
    return samples.unbind()[0] if getattr(samples, "is_nested", False) else samples


def synchronize(device: torch.device) -> None:
    """Wait until a GPU is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
