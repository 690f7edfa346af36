"""Draws a calibration: blocks by steps, FP16 cells outlined. With Pillow: ComfyUI doesn't ship matplotlib."""

import math

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

BACKGROUND, INK, OUTLINE = (24, 24, 28), (225, 225, 225), (80, 200, 255)
_DECADES = 3.0  # errors further below the largest share its last colour
# Dark to bright, readable for colour-blind people and in grey.
_COLOURS = np.array([(20, 12, 40), (90, 22, 110), (170, 50, 90), (235, 105, 50), (252, 190, 60), (252, 250, 190)])
_FONT_SIZE, _MARGIN, _BAR_WIDTH = 16, 14, 18


def draw_heat_map(cells: Tensor, fp16: Tensor, blocks: list[str], title: str) -> Tensor:
    """Draw what each block at each step does to the result.

    Args:
        cells: relative L1 of the final latents, [B, N], 0 or more.
        fp16: bool [B, N], cells to outline.
        blocks: names of the rows.
        title: one or more lines.

    Returns:
        ComfyUI IMAGE float32 [1, height, width, 3] in 0..1.
    """
    rows, columns = cells.shape
    cell_width, cell_height = max(10, min(40, 900 // columns)), max(8, min(30, 1200 // rows))
    font = _font()
    line = _FONT_SIZE + 6
    left = _MARGIN + 10 + max(int(font.getlength(name)) for name in ["block", *blocks])
    top = _MARGIN + line * (title.count("\n") + 2)
    width_of_title = max(int(font.getlength(text)) for text in title.split("\n"))
    right = left + columns * cell_width
    width = max(right + 150, _MARGIN * 2 + width_of_title)
    height = max(top + rows * cell_height, top + 160) + 2 * line + _MARGIN
    image = Image.new("RGB", (width, height), BACKGROUND)
    draw = ImageDraw.Draw(image)
    draw.multiline_text((_MARGIN, _MARGIN), title, INK, font=font, spacing=6)
    largest = float(cells.max()) or 1.0

    levels = _levels(cells.double().numpy(), largest)
    for row in range(rows):
        for column in range(columns):
            x, y = left + column * cell_width, top + row * cell_height
            draw.rectangle((x, y, x + cell_width - 2, y + cell_height - 2), _colour(levels[row, column]))
            if fp16[row, column]:
                draw.rectangle((x, y, x + cell_width - 2, y + cell_height - 2), outline=OUTLINE, width=2)
    for row in _labelled(rows, cell_height):
        draw.text((left - 8, top + (row + 0.5) * cell_height), blocks[row], INK, font=font, anchor="rm")
    bottom = top + rows * cell_height + 4
    for column in _labelled(columns, cell_width - 6):
        draw.text((left + (column + 0.5) * cell_width, bottom), str(column + 1), INK, font=font, anchor="mt")
    draw.text((left, bottom + line), "step (first: most noise)", INK, font=font)
    _draw_scale(draw, font, right + 24, top, largest)
    return torch.from_numpy(np.array(image, dtype=np.float32) / 255)[None]


def _draw_scale(draw: ImageDraw.ImageDraw, font: ImageFont.ImageFont, x: int, top: int, largest: float) -> None:
    length = 120
    for y in range(length):
        draw.line((x, top + y, x + _BAR_WIDTH, top + y), _colour(1 - y / (length - 1)))
    for place, value in ((0.0, largest), (0.5, largest * 10 ** (-_DECADES / 2)), (1.0, largest * 10**-_DECADES)):
        draw.text((x + _BAR_WIDTH + 6, top + place * length), f"{value:.2g}", INK, font=font, anchor="lm")
    y = top + length + 20
    draw.rectangle((x, y, x + _BAR_WIDTH, y + 14), outline=OUTLINE, width=2)
    draw.text((x + _BAR_WIDTH + 6, y + 7), "FP16", INK, font=font, anchor="lm")


def _levels(cells: "np.ndarray", largest: float) -> "np.ndarray":
    """Logarithmic, 0 to 1."""
    floor = largest * 10**-_DECADES
    return 1 + np.log10(np.maximum(cells, floor) / largest) / _DECADES


def _colour(level: float) -> tuple[int, int, int]:
    places = np.linspace(0, 1, len(_COLOURS))
    return tuple(round(float(np.interp(level, places, channel))) for channel in _COLOURS.T)


def _labelled(count: int, size: int) -> range:
    """Which of `count` rows or columns of `size` pixels have room for a label."""
    return range(0, count, max(1, math.ceil((_FONT_SIZE + 2) / max(1, size))))


def _font() -> ImageFont.ImageFont | ImageFont.FreeTypeFont:
    try:
        return ImageFont.load_default(_FONT_SIZE)
    except TypeError:  # Pillow before 10.1 has one size
        return ImageFont.load_default()
