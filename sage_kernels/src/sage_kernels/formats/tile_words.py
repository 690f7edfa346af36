"""Words of operand images: bytes as words, and axes in the order in which lanes load them."""

import torch
from torch import Tensor

from sage_kernels.formats.grouping import pad_last_axis

LANES = 32
KEY_AXES = {"h": 2, "n_high": 4, "j": 4, "n_low": 2}  # key 32 h + 8 n_high + 2 j + n_low


def rearrange(x: Tensor, order: str, **sizes: int) -> Tensor:
    """Read what lies behind [B, H, tiles] as axes of these names and sizes, and write it in this order, flat."""
    names = list(sizes)
    axes = x.reshape(*x.shape[:3], *sizes.values())
    return axes.permute(0, 1, 2, *(3 + names.index(name) for name in order.split())).flatten(3)


def pack_fragments(words: Tensor) -> Tensor:
    """Fragment words [f][32 lanes] of each tile -> [f / 4][32 lanes][f % 4]."""
    return rearrange(words, "high lane low", high=words.shape[-1] // (4 * LANES), low=4, lane=LANES)


def unpack_fragments(words: Tensor) -> Tensor:
    """The inverse of `pack_fragments`."""
    return rearrange(words, "high low lane", high=words.shape[-1] // (4 * LANES), lane=LANES, low=4)


def pack_scale_words(words: Tensor) -> Tensor:
    """Scale words [s][8 g] of each tile -> [8 g][s % 4][s / 4]."""
    return rearrange(words, "g low high", high=words.shape[-1] // LANES, low=4, g=8)


def unpack_scale_words(words: Tensor) -> Tensor:
    """The inverse of `pack_scale_words`."""
    return rearrange(words, "high low g", g=8, low=4, high=words.shape[-1] // LANES)


def split_rows(x: Tensor, rows: int) -> Tensor:
    """[B, H, n, words] -> [B, H, n / rows, rows, words]."""
    return x.reshape(*x.shape[:2], x.shape[2] // rows, rows, x.shape[3])


def pad_rows(x: Tensor, multiple: int) -> Tensor:
    """Append zeros until the second last axis is a multiple of `multiple`."""
    return torch.nn.functional.pad(x, (0, 0, 0, -x.shape[-2] % multiple))


def to_words(x: Tensor, multiple: int) -> Tensor:
    """Bytes [..., n] -> int32 [..., n' / 4], n' being n padded to `multiple`."""
    return pad_last_axis(x.view(torch.uint8), multiple).contiguous().view(torch.int32)


def to_bytes(x: Tensor) -> Tensor:
    """int32 [..., n] -> uint8 [..., 4 n]."""
    return x.contiguous().view(torch.uint8)
