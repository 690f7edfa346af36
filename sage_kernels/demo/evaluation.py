"""How right generated clips are: digit read by a classifier of real digits, motion by the digit's centre of mass."""

from __future__ import annotations

import torch
from sklearn.svm import SVC

from .moving_digits import (
    BACKGROUND_LEVEL,
    BACKGROUND_SWING,
    DIGIT_LEVEL,
    FRAME_PX,
    FRAMES,
    NUM_DIRECTIONS,
    SPEED_PX_PER_FRAME,
    direction_vectors,
    render_clips,
)

_WINDOW_PX = 80
_FEATURE_PX = 12


class ClipJudge:
    """Judges clips [B, 1, 8, 128, 128] by a support vector classifier trained on rendered real digits.

    A fifth of the real digits is held out of the classifier; its accuracy on them is the ceiling for generated clips.
    """

    def __init__(self, glyphs: torch.Tensor, labels: torch.Tensor, seed: int = 0) -> None:
        """Render every glyph once (random place and direction) and fit."""
        generator = torch.Generator(glyphs.device).manual_seed(seed)
        count = len(glyphs)
        directions = torch.randint(NUM_DIRECTIONS, (count,), generator=generator, device=glyphs.device)
        features = torch.cat(
            [
                frame_features(render_clips(*chunk, generator))[:, FRAMES // 2]
                for chunk in zip(glyphs.split(128), directions.split(128), strict=True)
            ]
        ).cpu()
        targets = labels.cpu()
        order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
        train, held_out = order[count // 5 :], order[: count // 5]
        self._classifier = SVC(C=10.0).fit(features[train].numpy(), targets[train].numpy())
        self.real_digit_accuracy = float(self._classifier.score(features[held_out].numpy(), targets[held_out].numpy()))

    def metrics(self, clips: torch.Tensor, digits: torch.Tensor, directions: torch.Tensor) -> dict[str, float]:
        """Shares in 0..1 and pixel numbers of clips against the digits [B] and directions [B] they were asked for."""
        features = frame_features(clips).cpu()
        read = torch.from_numpy(self._classifier.predict(features.flatten(0, 1).numpy())).view(-1, FRAMES)
        right = read == digits.cpu().unsqueeze(1)
        centres = centres_of_mass(clips).cpu()
        steps = centres.diff(dim=1)
        velocity = (centres[:, -1] - centres[:, 0]) / (FRAMES - 1)
        seen_direction = (velocity @ direction_vectors(torch.arange(NUM_DIRECTIONS)).T).argmax(dim=1)
        wanted = direction_vectors(directions.cpu()).unsqueeze(1) * SPEED_PX_PER_FRAME
        return {
            "clips": float(len(clips)),
            "digit_accuracy_clip": float((right.sum(1) > FRAMES // 2).float().mean()),
            "digit_accuracy_frame": float(right.float().mean()),
            "digit_accuracy_real_held_out": self.real_digit_accuracy,
            "direction_accuracy": float((seen_direction == directions.cpu()).float().mean()),
            "speed_error_px_per_frame": float((steps - wanted).norm(dim=-1).mean()),
        }


def digit_coverage(clips: torch.Tensor) -> torch.Tensor:
    """Clips [B, 1, 8, 128, 128] to the digit's coverage in 0..1 without the background, [B, 8, 128, 128]."""
    floor = BACKGROUND_LEVEL + 2 * BACKGROUND_SWING
    return ((clips.squeeze(1).float() - floor) / (DIGIT_LEVEL - floor)).clamp(0, 1)


def centres_of_mass(clips: torch.Tensor) -> torch.Tensor:
    """Centre of the digit in each frame, in px from the upper left corner: [B, 8, 2], columns x and y."""
    coverage = digit_coverage(clips)
    mass = coverage.sum((2, 3)).clamp(min=1e-6)
    x = (coverage.sum(2) * (torch.arange(FRAME_PX, device=clips.device) + 0.5)).sum(-1) / mass
    y = (coverage.sum(3) * (torch.arange(FRAME_PX, device=clips.device) + 0.5)).sum(-1) / mass
    return torch.stack((x, y), dim=-1)


def frame_features(clips: torch.Tensor) -> torch.Tensor:
    """An 80 px window about the digit's centre, averaged to 12x12: [B, 8, 144] float32."""
    coverage = digit_coverage(clips).flatten(0, 1).unsqueeze(1)
    centre = centres_of_mass(clips).flatten(0, 1)
    reach = _WINDOW_PX / FRAME_PX
    theta = torch.zeros(len(centre), 2, 3, device=clips.device)
    theta[:, 0, 0] = theta[:, 1, 1] = reach
    theta[:, :, 2] = centre / (FRAME_PX / 2) - 1
    grid = torch.nn.functional.affine_grid(theta, [len(centre), 1, _WINDOW_PX, _WINDOW_PX], align_corners=False)
    window = torch.nn.functional.grid_sample(coverage, grid, align_corners=False)
    return torch.nn.functional.adaptive_avg_pool2d(window, _FEATURE_PX).view(-1, FRAMES, _FEATURE_PX**2)
