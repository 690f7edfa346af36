"""The demo's pictures: animated videos, contact sheet, heat map."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from .atomic_file import replacing

FRAME_MILLISECONDS = 125


def write_animation(frames: np.ndarray, path: Path) -> None:
    """uint8 grey frames [T, H, W] as an animated WebP, doubled in size, that loops."""
    images = [Image.fromarray(np.kron(frame, np.ones((2, 2), dtype=np.uint8))) for frame in frames]
    with replacing(path) as partial:
        images[0].save(
            partial, "WEBP", save_all=True, append_images=images[1:], duration=FRAME_MILLISECONDS, loop=0, lossless=True
        )


def write_contact_sheet(videos: Mapping[str, np.ndarray], path: Path) -> None:
    """One row a video, one column a frame; differences from the first video beside each of the others."""
    names = list(videos)
    first = videos[names[0]].astype(np.int16)
    rows = [(name, videos[name]) for name in names]
    for name in names[1:]:
        rows.append((f"|{name} - {names[0]}| x 4", np.clip(np.abs(videos[name] - first) * 4, 0, 255).astype(np.uint8)))
    figure = Figure(figsize=(1.3 * len(first), 1.45 * len(rows)), layout="constrained")
    axes = figure.subplots(len(rows), len(first), squeeze=False)
    for line, (name, frames) in zip(axes, rows, strict=True):
        line[0].set_title(name, loc="left", fontsize=9)
        for cell, frame in zip(line, frames, strict=True):
            cell.imshow(frame, cmap="gray", vmin=0, vmax=255)
            cell.axis("off")
    with replacing(path) as partial:
        figure.savefig(partial, format="png", dpi=110)


def write_heat_map(errors: np.ndarray, blocks: Sequence[str], path: Path) -> None:
    """Errors [blocks, steps] as a heat map, high noise at the left."""
    figure = Figure(figsize=(9, 0.5 * len(blocks) + 1.6), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(errors, aspect="auto", cmap="magma", vmin=0)
    axes.set(
        xlabel="sampling step (high noise at the left)",
        ylabel="block",
        title="Relative L1 error of self-attention in FP4, on the 16-bit run's own tensors",
    )
    axes.set_yticks(range(len(blocks)), blocks)
    axes.set_xticks(range(errors.shape[1]))
    figure.colorbar(image, ax=axes, label="relative L1")
    with replacing(path) as partial:
        figure.savefig(partial, format="png", dpi=110)
