"""Clips of one real handwritten digit that crosses the middle of the frame at constant speed, over faint stripes.

Plain PyTorch on any device, so that training draws fresh clips on the GPU. The digits come from `glyphs`.
"""

from __future__ import annotations

import math

import torch

FRAMES = 8
FRAME_PX = 128
NUM_DIGITS = 10
# Unit steps (x to the right, y down) in the order of the direction index.
DIRECTION_NAMES = ("right", "down-right", "down", "down-left", "left", "up-left", "up", "up-right")
NUM_DIRECTIONS = len(DIRECTION_NAMES)
SPEED_PX_PER_FRAME = 6.0
MIN_DIGIT_PX, MAX_DIGIT_PX = 64.0, 70.0
_JITTER_PX = 6.0  # how far the path may be off the middle, along x and along y
BACKGROUND_LEVEL, BACKGROUND_SWING = -0.8, 0.12
_STRIPE_PERIOD_PX = 48  # along x and along y
DIGIT_LEVEL = 1.0
# A glyph is 80 px: 64 px of digit inside a margin of 8 px.
GLYPH_PX, GLYPH_BOX_PX = 80, 64


def direction_vectors(directions: torch.Tensor) -> torch.Tensor:
    """Unit vectors [B, 2] float32, columns x (right) and y (down), of direction indices [B] in 0..7."""
    angle = directions * (2 * math.pi / NUM_DIRECTIONS)
    return torch.stack((angle.cos(), angle.sin()), dim=1)


def render_clips(
    glyphs: torch.Tensor, directions: torch.Tensor, generator: torch.Generator | None = None
) -> torch.Tensor:
    """Render one clip per glyph with random size and place of the path.

    Args:
        glyphs: [B, 1, 80, 80] float32 in [0, 1], as from `glyphs.load_glyphs`.
        directions: [B] int64 in 0..7, index into `DIRECTION_NAMES`.
        generator: source of randomness on the glyphs' device.

    Returns:
        [B, 1, 8, 128, 128] float32 pixels in [-1, 1]; the digit is inside the frame in all frames.
    """
    device, batch = glyphs.device, glyphs.shape[0]

    def uniform(*shape: int) -> torch.Tensor:
        return torch.rand(*shape, device=device, generator=generator)

    size = MIN_DIGIT_PX + (MAX_DIGIT_PX - MIN_DIGIT_PX) * uniform(batch, 1)
    travel = direction_vectors(directions) * (SPEED_PX_PER_FRAME * (FRAMES - 1))
    middle = FRAME_PX / 2 + _JITTER_PX * (2 * uniform(batch, 2) - 1)
    progress = torch.linspace(-0.5, 0.5, FRAMES, device=device).view(1, FRAMES, 1)
    centre = middle.unsqueeze(1) + progress * travel.unsqueeze(1)

    coverage = _place(glyphs, centre, size)
    background = _background(device)
    return (background + coverage * (DIGIT_LEVEL - background)).unsqueeze(1)


def random_batch(
    glyphs: torch.Tensor, labels: torch.Tensor, batch: int, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Draw clips [batch, 1, 8, 128, 128], digits [batch] and directions [batch], all on the glyphs' device."""
    device = glyphs.device
    chosen = torch.randint(glyphs.shape[0], (batch,), device=device, generator=generator)
    directions = torch.randint(NUM_DIRECTIONS, (batch,), device=device, generator=generator)
    return render_clips(glyphs[chosen], directions, generator), labels[chosen], directions


def _place(glyphs: torch.Tensor, centre: torch.Tensor, size: torch.Tensor) -> torch.Tensor:
    """Coverage [B, 8, 128, 128] of glyphs whose 64 px box becomes `size` [B, 1] px about `centre` [B, 8, 2] (x, y)."""
    batch, device = glyphs.shape[0], glyphs.device
    pixel = torch.arange(FRAME_PX, device=device) + 0.5
    # Separable coordinates: -1..1 spans the padded glyph, as grid_sample wants it.
    x, y = (
        (pixel - centre[..., axis : axis + 1]) / (size.unsqueeze(1) / 2) * (GLYPH_BOX_PX / GLYPH_PX) for axis in (0, 1)
    )
    grid = torch.stack(
        (
            x.unsqueeze(2).expand(batch, FRAMES, FRAME_PX, FRAME_PX),
            y.unsqueeze(3).expand(batch, FRAMES, FRAME_PX, FRAME_PX),
        ),
        dim=-1,
    )
    frames_as_rows = grid.reshape(batch, FRAMES * FRAME_PX, FRAME_PX, 2)
    coverage = torch.nn.functional.grid_sample(glyphs, frames_as_rows, mode="bilinear", align_corners=False)
    return coverage.view(batch, FRAMES, FRAME_PX, FRAME_PX)


def _background(device: torch.device) -> torch.Tensor:
    """Diagonal stripes, [128, 128]."""
    position = torch.arange(FRAME_PX, device=device) / _STRIPE_PERIOD_PX
    return BACKGROUND_LEVEL + BACKGROUND_SWING * torch.cos(2 * math.pi * (position + position.unsqueeze(1)))
