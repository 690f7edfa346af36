"""Flow matching sampler: the one ComfyUI runs for `euler`, scheduler `simple`, ModelSamplingSD3 and no CFG."""

from __future__ import annotations

from collections.abc import Callable

import torch
from diffusers import WanTransformer3DModel

from .latents import LATENT_CHANNELS, PIXELS_PER_LATENT
from .moving_digits import FRAME_PX, FRAMES

LATENT_SHAPE = (LATENT_CHANNELS, FRAMES, FRAME_PX // PIXELS_PER_LATENT, FRAME_PX // PIXELS_PER_LATENT)
DEFAULT_STEPS = 20
DEFAULT_SHIFT = 8.0  # ComfyUI's own for Wan 2.1
TIMESTEPS = 1000


def shift_sigma(sigma: torch.Tensor, shift: float) -> torch.Tensor:
    """Move noise levels in [0, 1] towards 1 by the resolution shift of SD3."""
    return shift * sigma / (1 + (shift - 1) * sigma)


def simple_sigmas(steps: int = DEFAULT_STEPS, shift: float = DEFAULT_SHIFT) -> torch.Tensor:
    """Noise levels of the `simple` scheduler: [steps + 1] float32 from 1 down to 0.

    Raises:
        ValueError: steps not in 1..1000, or shift not above 0.
    """
    if not 1 <= steps <= TIMESTEPS:
        raise ValueError(f"steps must be 1..{TIMESTEPS}, got {steps}")
    if not shift > 0:
        raise ValueError(f"shift must be above 0, got {shift}")
    # Multiplied and divided by 1000 as ComfyUI does, so that the float32 values agree to the last bit.
    timesteps = torch.arange(1, TIMESTEPS + 1) / TIMESTEPS * TIMESTEPS
    table = shift_sigma(timesteps / TIMESTEPS, shift)
    stride = TIMESTEPS / steps
    levels = [table[-(1 + int(step * stride))] for step in range(steps)]
    return torch.stack([*levels, torch.tensor(0.0)])


@torch.inference_mode()
def sample(
    transformer: WanTransformer3DModel,
    context: torch.Tensor,
    *,
    seed: int,
    steps: int = DEFAULT_STEPS,
    shift: float = DEFAULT_SHIFT,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    on_step: Callable[[int, torch.Tensor], None] | None = None,
) -> torch.Tensor:
    """Draw clips by Euler steps from noise that depends on the seed and the batch size only, not on the device.

    Args:
        transformer: the model, on `device` with weights of `dtype`.
        context: [L, 4096] for one clip or [B, L, 4096] for B.
        seed: of the float32 noise, drawn on the CPU.
        steps: number of model evaluations.
        shift: of the noise levels, see `simple_sigmas`.
        device: where the model is.
        dtype: of the model's inputs; the latents stay float32.
        on_step: called after each step with the number of steps done and the latents so far.

    Returns:
        Normalised latents [B, 16, 8, 32, 32] float32 on `device`.

    Raises:
        ValueError: context of another shape, bad steps or shift.
    """
    if context.ndim == 2:
        context = context.unsqueeze(0)
    if context.ndim != 3 or context.shape[-1] != transformer.config.text_dim:
        raise ValueError(f"context must be [L, {transformer.config.text_dim}] or batched, got {list(context.shape)}")
    sigmas = simple_sigmas(steps, shift)
    context = context.to(device, dtype)
    batch = context.shape[0]
    x = torch.randn(batch, *LATENT_SHAPE, generator=torch.manual_seed(seed)).to(device)
    for step, (sigma, next_sigma) in enumerate(zip(sigmas[:-1].to(device), sigmas[1:].to(device), strict=True)):
        timestep = (sigma * TIMESTEPS).expand(batch)
        velocity = transformer(x.to(dtype), timestep, context, return_dict=False)[0].float()
        denoised = x - velocity * sigma
        x = x + (x - denoised) / sigma * (next_sigma - sigma)
        if on_step is not None:
            on_step(step + 1, x)
    return x
