"""What a calibration measured of one model: errors by block, head and step, and what they do to the result."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sage_kernels.block_overrides import BlockId, BlockLayout
from sage_kernels.precision import PRECISIONS

from .model_families import block_layout, find_blocks, find_family
from .model_fingerprint import model_fingerprint

MAX_BLOCKS = 1024
MAX_HEADS = 1024
MAX_STEPS = 10_000
MAX_TEXT = 200
MAX_SETTINGS = 64
LARGEST = 1e6  # of sigmas and relative errors: far above anything that means something
TENSORS = ("errors", "sensitivity", "final_errors", "full_error", "attention_share")
MEASURABLE = tuple(precision for precision in PRECISIONS if precision not in {"auto", "fp16"})
_BLOCK_TYPE = re.compile(r"[A-Za-z_]\w*", re.ASCII)
_FINGERPRINT = re.compile(r"[0-9a-f]{64}")


class ProfileError(ValueError):
    """A profile that can't be read, or doesn't fit a model; the message is one line."""


@dataclass(frozen=True, eq=False)
class CalibrationProfile:
    """The measurements of one calibration, B blocks in the layout's order, P precisions, S steps looked at.

    All errors are relative L1, sum|a - b| / sum|b|, against the model's own 16-bit attention.

    Attributes:
        family: name of the row of model_families.
        fingerprint: model_fingerprint() of the model.
        pack_version: of the pack that measured.
        layout: the model's blocks.
        schedule: sigmas of the whole sampling, one more than it has steps.
        steps: the S steps that were looked at, rising indices into the schedule. Each stands for the part of the
            schedule that is nearer to it than to the others.
        precisions: the P precisions that were measured.
        heads: attention heads of each block; 0 where no attention was measured.
        errors: float32 [P, B, H, S], of the attention output on sampled query rows; 0 beyond a block's heads.
        sensitivity: float32 [P, B, S], of the model's denoised output with one block in low precision.
        final_errors: float32 [P, S], of the final latents with all blocks in low precision in the part of the schedule
            that a step stands for.
        full_error: float32 [P], of the final latents with all blocks in low precision in all steps.
        attention_share: float32 [B], each block's part of the model's attention arithmetic; sums to 1.
        method: how it was measured, for people.
        settings: what it was measured with.

    Raises:
        ProfileError: fields that don't fit together or hold impossible values.
    """

    family: str
    fingerprint: str
    pack_version: str
    layout: BlockLayout
    schedule: tuple[float, ...]
    steps: tuple[int, ...]
    precisions: tuple[str, ...]
    heads: tuple[int, ...]
    errors: Tensor
    sensitivity: Tensor
    final_errors: Tensor
    full_error: Tensor
    attention_share: Tensor
    method: str = ""
    settings: Mapping[str, str | int | float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._check_texts()
        self._check_lists()
        precisions, blocks, steps = len(self.precisions), len(self.layout), len(self.steps)
        _check_tensor("errors", self.errors, (precisions, blocks, max(self.heads), steps))
        _check_tensor("sensitivity", self.sensitivity, (precisions, blocks, steps))
        _check_tensor("final_errors", self.final_errors, (precisions, steps))
        _check_tensor("full_error", self.full_error, (precisions,))
        _check_tensor("attention_share", self.attention_share, (blocks,))
        present = torch.arange(self.errors.shape[2])[:, None] < torch.tensor(self.heads)[:, None, None]
        if bool((self.errors * ~present).any()):
            raise ProfileError("errors has values for heads that the block hasn't")
        total = float(self.attention_share.double().sum())
        if abs(total - 1) > 1e-3:
            raise ProfileError(f"attention_share must sum to 1, got {total:g}")

    @property
    def sigmas(self) -> tuple[float, ...]:
        """Noise levels of the steps that were looked at."""
        return tuple(self.schedule[step] for step in self.steps)

    def precision_index(self, precision: str) -> int:
        """Where a precision is in the first axis of the tensors.

        Raises:
            ProfileError: it wasn't measured.
        """
        if precision not in self.precisions:
            raise ProfileError(
                f"this profile has {', '.join(self.precisions)}, not {precision}; calibrate with {precision}"
            )
        return self.precisions.index(precision)

    def sensitivity_by_block(self, precision: str) -> dict[BlockId, float]:
        """How far the final latents move, as predicted, with this block alone in low precision in all steps.

        0 is harmless; the values of the blocks can be compared.

        Raises:
            ProfileError: the precision wasn't measured.
        """
        from .fp16_choice import cell_errors  # noqa: PLC0415  (the choice is made from profiles)

        squares = cell_errors(self, precision).square().sum(dim=1)
        return dict(zip(self.layout, squares.sqrt().tolist(), strict=True))

    def mismatches(self, model: Any) -> list[str]:
        """What of a ComfyUI MODEL is not as it was in the calibrated one; empty where the profile fits."""
        diffusion_model = model.get_model_object("diffusion_model")
        family, layout = find_family(diffusion_model).name, block_layout(find_blocks(diffusion_model))
        problems = []
        if family != self.family:
            problems.append(f"it was measured on {self.family}, this is {family}")
        if dict(layout.counts) != dict(self.layout.counts):
            problems.append(f"its model has the blocks {self.layout}, this one {layout}")
        if not problems and model_fingerprint(model) != self.fingerprint:
            problems.append("the weights are those of another model of this family and size")
        return problems

    def check(self, model: Any) -> None:
        """Raise unless the profile was measured on this ComfyUI MODEL.

        Raises:
            ProfileError: says what differs.
        """
        problems = self.mismatches(model)
        if problems:
            raise ProfileError(f"this profile doesn't fit the model: {'; '.join(problems)}; calibrate this model")

    def save(self, path: str | Path) -> None:
        """Write the profile to a safetensors file, at once or not at all."""
        from .profile_file import write_profile  # noqa: PLC0415  (reads and writes this class)

        write_profile(self, Path(path))

    @staticmethod
    def load(path: str | Path) -> "CalibrationProfile":
        """Read a profile.

        Raises:
            ProfileError: the file is missing, damaged, no profile, or of another version.
        """
        from .profile_file import read_profile  # noqa: PLC0415  (reads and writes this class)

        return read_profile(Path(path))

    def _check_texts(self) -> None:
        for name in ("family", "pack_version", "method"):
            check_text(name, getattr(self, name))
        if not isinstance(self.fingerprint, str) or not _FINGERPRINT.fullmatch(self.fingerprint):
            raise ProfileError("fingerprint must be 64 hexadecimal digits")
        if len(self.settings) > MAX_SETTINGS:
            raise ProfileError(f"settings has {len(self.settings)} entries; at most {MAX_SETTINGS} are allowed")
        for name, value in self.settings.items():
            check_text("a name in settings", name)
            if isinstance(value, str):
                check_text(f"settings.{name}", value)
            else:
                check_number(f"settings.{name}", value, -1e20, 1e20)

    def _check_lists(self) -> None:
        for type_, count in self.layout.counts.items():
            if not _BLOCK_TYPE.fullmatch(type_) or len(type_) > MAX_TEXT:
                raise ProfileError(f"{type_[:MAX_TEXT]!r} is no block type")
            check_integer(f"the number of {type_} blocks", count, 1, MAX_BLOCKS)
        check_integer("the number of blocks", len(self.layout), 1, MAX_BLOCKS)
        check_integer("the number of sigmas", len(self.schedule), 2, MAX_STEPS + 1)
        for sigma in self.schedule:
            check_number("a sigma", sigma, 0.0, LARGEST)
        check_integer("the number of steps looked at", len(self.steps), 1, len(self.schedule) - 1)
        for step in self.steps:
            check_integer("a step", step, 0, len(self.schedule) - 2)
        if sorted(set(self.steps)) != list(self.steps):
            raise ProfileError("steps must rise")
        if not self.precisions or len(set(self.precisions)) < len(self.precisions):
            raise ProfileError("precisions must name each precision once")
        if not set(self.precisions) <= set(MEASURABLE):
            raise ProfileError(f"precisions must be of {', '.join(MEASURABLE)}")
        if len(self.heads) != len(self.layout):
            raise ProfileError(f"heads must have one number per block ({len(self.layout)}), got {len(self.heads)}")
        for heads in self.heads:
            check_integer("the heads of a block", heads, 0, MAX_HEADS)


def check_integer(name: str, value: object, lowest: int, highest: int) -> None:
    """Raise ProfileError unless value is an int in the range."""
    if not isinstance(value, int) or isinstance(value, bool) or not lowest <= value <= highest:
        raise ProfileError(f"{name} must be an integer from {lowest} to {highest}, got {_short(value)}")


def check_number(name: str, value: object, lowest: float, highest: float) -> None:
    """Raise ProfileError unless value is an int or a float in the range."""
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not lowest <= value <= highest:
        raise ProfileError(f"{name} must be a number from {lowest:g} to {highest:g}, got {_short(value)}")


def check_text(name: str, value: object) -> None:
    """Raise ProfileError unless value is one printable line of moderate length."""
    if not isinstance(value, str) or len(value) > MAX_TEXT or not value.isprintable():
        raise ProfileError(f"{name} must be one line of at most {MAX_TEXT} printable characters, got {_short(value)}")


def _check_tensor(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    if tensor.dtype != torch.float32 or tuple(tensor.shape) != shape:
        raise ProfileError(f"{name} must be float32 {list(shape)}, got {tensor.dtype} {list(tensor.shape)}")
    if not bool(((tensor >= 0) & (tensor <= LARGEST)).all()):
        raise ProfileError(f"{name} must hold numbers from 0 to {LARGEST:g}")


def _short(value: object) -> str:
    # repr of a foreign value: never longer than a line, and never of something deep or huge.
    if isinstance(value, (str, float)) or (isinstance(value, int) and value.bit_length() < 64):
        return repr(value[:40] if isinstance(value, str) else value)
    return type(value).__name__
