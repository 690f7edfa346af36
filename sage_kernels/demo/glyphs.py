"""Real handwritten digits: the 1797 images of scikit-learn's bundled `load_digits`, upscaled.

They are 8x8 with 17 grey levels, from the handwriting of 43 people (UCI, Optical Recognition of Handwritten Digits).
"""

from __future__ import annotations

import torch
from sklearn.datasets import load_digits

from .moving_digits import GLYPH_BOX_PX, GLYPH_PX

_SOURCE_PX = 8
_GREY_LEVELS = 16.0


def load_glyphs(device: torch.device | str = "cpu") -> tuple[torch.Tensor, torch.Tensor]:
    """Real digits, upscaled.

    Returns glyphs [1797, 1, 80, 80] float32 in [0, 1] (64 px of digit inside a margin of 8 px) and labels [1797] int64.
    """
    bunch = load_digits()
    images = torch.from_numpy(bunch.images).float().div(_GREY_LEVELS).unsqueeze(1)
    upscale = GLYPH_BOX_PX // _SOURCE_PX
    margin = (GLYPH_PX // upscale - _SOURCE_PX) // 2
    images = torch.nn.functional.pad(images, [margin] * 4)
    smooth = torch.nn.functional.interpolate(images, scale_factor=upscale, mode="bicubic", align_corners=False)
    # The contrast curve turns the soft 8x8 coverage values into strokes with an edge about two pixels wide.
    glyphs = torch.sigmoid((smooth - 0.45) * 14.0)
    return glyphs.to(device), torch.from_numpy(bunch.target).long().to(device)
