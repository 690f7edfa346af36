"""What stands in for a text encoder: a fixed code of the digit and the direction, in the shape of UMT5's output."""

from __future__ import annotations

import torch

from .moving_digits import DIRECTION_NAMES, NUM_DIGITS, NUM_DIRECTIONS

TEXT_DIM = 4096
CONTEXT_TOKENS = 8
# Each word and each position owns a band of channels, so all tokens differ and no two codes overlap. Bands wide enough
# that the first text layer, initialised for dense input, starts at activations near 1.
_BAND_CHANNELS = 128
_WORD_VALUE, _POSITION_VALUE = 2.0, 1.0


def conditioning(digit: int, direction: int) -> torch.Tensor:
    """Context [8, 4096] float32 on the CPU: even tokens carry the digit, odd tokens the direction.

    Args:
        digit: 0..9.
        direction: 0..7, index into `moving_digits.DIRECTION_NAMES`.

    Raises:
        ValueError: digit or direction out of range.
    """
    if digit not in range(NUM_DIGITS):
        raise ValueError(f"digit must be 0..{NUM_DIGITS - 1}, got {digit}")
    if direction not in range(NUM_DIRECTIONS):
        raise ValueError(f"direction must be 0..{NUM_DIRECTIONS - 1} ({', '.join(DIRECTION_NAMES)}), got {direction}")
    words = (digit, NUM_DIGITS + direction)
    bands = torch.zeros(CONTEXT_TOKENS, TEXT_DIM // _BAND_CHANNELS, _BAND_CHANNELS)
    for token in range(CONTEXT_TOKENS):
        bands[token, words[token % 2]] = _WORD_VALUE
        bands[token, NUM_DIGITS + NUM_DIRECTIONS + token] = _POSITION_VALUE
    return bands.flatten(1)


def conditioning_table(device: torch.device | str = "cpu") -> torch.Tensor:
    """All contexts, [10, 8, 8, 4096] float32: indexed by digit and direction."""
    rows = [
        torch.stack([conditioning(digit, direction) for direction in range(NUM_DIRECTIONS)])
        for digit in range(NUM_DIGITS)
    ]
    return torch.stack(rows).to(device)
