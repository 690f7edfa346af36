"""Operand images of the FP4 kernel's variant with Q and K in MXFP8; V and the query means stay as in nvfp4_tiles.py.

Its QK is m16n8k32 with one E8M0 scale per 32 elements. Lane 4 g + t holds words of 4 E4M3 codes, byte i being
element i:

    A (16 rows)      register 0: row g, k = 4t..4t+3;  1: row g + 8;  2: row g, k + 16;  3: row g + 8, k + 16
    B (8 columns)    register 0: column g, k = 4t..4t+3;  1: k + 16
    scale byte       of 32 along k; its place in the word is the step, the word that of a row of A or a column of B

QK contracts in `query_key_steps` (KSTEPS) steps of 32 along head_dim, padded with zeros to 64 or 128, as V is. All
words of an image, in order:

    query block      codes [2 mt][KSTEPS][32 lanes][4 registers]
    32 rows          scales [2 mt][32 lanes]: row 16 mt + g + 8 (t & 1)
    key/value tile   K, what MXFP8 misses of K in NVFP4 (as a digit of nvfp4_tiles.py), V
    64 keys          K codes: fragment word f = ((nt >> 1) KSTEPS + ks) 4 + (nt & 1) 2 + register
                     as [f / 4][32 lanes][f % 4]
                     K scales: word s = nt in lane t = s & 3 as [32 lanes][s >> 2]

Byte ks of a scale word belongs to step ks; where KSTEPS is 2, bytes 2 and 3 repeat bytes 0 and 1. Columns of K's tiles
are keys in the order of nvfp4_tiles.py.
"""

import torch
from torch import Tensor

from sage_kernels.formats.mxfp8 import MXFP8_GROUP, MXFP8Tensor
from sage_kernels.formats.nvfp4 import NVFP4_GROUP, NVFP4Tensor
from sage_kernels.formats.nvfp4_tiles import (
    KEY_TILE,
    QUERY_BLOCK,
    key_digit_words,
    key_steps,
    pack_key_digit,
    pack_value,
    unpack_key_digit,
    unpack_value,
    value_words,
)
from sage_kernels.formats.tile_words import (
    KEY_AXES,
    LANES,
    pack_fragments,
    pack_scale_words,
    pad_rows,
    rearrange,
    split_rows,
    to_bytes,
    to_words,
    unpack_fragments,
    unpack_scale_words,
)

_WORD = 4  # codes, or steps of a scale word


def query_key_steps(head_dim: int) -> int:
    """MMA steps of QK along head_dim: 2 or 4.

    Raises:
        ValueError: head_dim is not in 1..128.
    """
    return 2 * key_steps(head_dim)


def padded_dim(head_dim: int) -> int:
    """head_dim padded to the sizes that the kernel has: 64 or 128.

    Raises:
        ValueError: head_dim is not in 1..128.
    """
    return MXFP8_GROUP * query_key_steps(head_dim)


def query_block_words(head_dim: int) -> int:
    """Words of the image of one query block."""
    return 2 * LANES * (4 * query_key_steps(head_dim) + 1)


def key_value_tile_words(head_dim: int) -> int:
    """Words of the image of one key/value tile."""
    return sum(_key_value_parts(head_dim))


def pack_query_blocks(query: MXFP8Tensor) -> Tensor:
    """Images of the query blocks.

    Args:
        query: quantised along head_dim: codes float8_e4m3fn [B, H, Nq, D'], scales uint8 [B, H, Nq, D' / 32], D' being
            head_dim padded to a multiple of 32.

    Returns:
        int32 [B, H, ceil(Nq / 32), query_block_words].

    Raises:
        TypeError, ValueError: codes and scales of other dtypes or shapes, or D' > 128.
    """
    codes, scales, steps = _row_words(query, QUERY_BLOCK)
    codes = rearrange(codes, "mt ks g t k_half row_half", mt=2, row_half=2, g=8, ks=steps, k_half=2, t=4)
    scales = rearrange(scales.expand(*scales.shape[:-1], 2), "mt g copy row_half", mt=2, row_half=2, g=8, copy=2)
    return torch.cat((codes, scales), dim=-1)


def unpack_query_blocks(image: Tensor, length: int, head_dim: int) -> MXFP8Tensor:
    """The first `length` query rows of images made by `pack_query_blocks`."""
    steps = query_key_steps(head_dim)
    codes, scales = torch.split(image, [8 * LANES * steps, 2 * LANES], dim=-1)
    codes = rearrange(codes, "mt row_half g ks k_half t", mt=2, ks=steps, g=8, t=4, k_half=2, row_half=2)
    scales = rearrange(scales, "copy mt row_half g", mt=2, g=8, copy=2, row_half=2)[..., :QUERY_BLOCK]
    return _mxfp8_rows(codes, scales, QUERY_BLOCK, length, head_dim)


def pack_key_value_tiles(key: MXFP8Tensor, key_residual: NVFP4Tensor, value: NVFP4Tensor) -> Tensor:
    """Images of the key/value tiles.

    Args:
        key: quantised along head_dim; shapes as in `pack_query_blocks`.
        key_residual: what that misses, quantised along head_dim; shapes as in `nvfp4_tiles.pack_query_blocks`.
        value: quantised along the tokens: codes uint8 [B, Hkv, D, N' / 2], scales float8_e4m3fn [B, Hkv, D, N' / 16],
            N' being the number of keys padded to a multiple of 16.

    Returns:
        int32 [B, Hkv, ceil(Nk / 64), key_value_tile_words].

    Raises:
        TypeError, ValueError: as `pack_query_blocks`, or operands whose shapes don't belong together.
    """
    batch, heads, length, _ = key.codes.shape
    head_dim, groups = value.codes.shape[2], -(-length // NVFP4_GROUP)
    dims = [-(-head_dim // group) * group for group in (MXFP8_GROUP, NVFP4_GROUP)]
    shapes = [x.codes.shape for x in (key, key_residual, value)]
    rows = (batch, heads, length)
    wanted = [(*rows, dims[0]), (*rows, dims[1] // 2), (batch, heads, head_dim, groups * NVFP4_GROUP // 2)]
    if [tuple(shape) for shape in shapes] != wanted:
        raise ValueError(
            f"codes of K, of its residual and of V must be {wanted} for head_dim {head_dim} and {length} keys, "
            f"got {[tuple(shape) for shape in shapes]}"
        )
    codes, scales, steps = _row_words(key, KEY_TILE)
    axes = {"h": 2, "n_high": 4, "j_high": 2, "j_low": 2, "n_low": 2}
    codes = rearrange(codes, "h j_high ks j_low register n_high n_low t", **axes, ks=steps, register=2, t=4)
    scales = rearrange(scales, "h j n_high n_low", **KEY_AXES)
    columns = padded_dim(head_dim)
    wide = NVFP4Tensor(
        pad_rows(value.codes, columns), pad_rows(value.scales.view(torch.uint8), columns).view(torch.float8_e4m3fn)
    )
    parts = (pack_fragments(codes), pack_scale_words(scales), pack_key_digit(key_residual), pack_value(wide))
    return torch.cat(parts, dim=-1)


def unpack_key_value_tiles(image: Tensor, length: int, head_dim: int) -> tuple[MXFP8Tensor, NVFP4Tensor, NVFP4Tensor]:
    """K, its residual and V, `length` keys of each, from images made by `pack_key_value_tiles`."""
    steps = query_key_steps(head_dim)
    codes, scales, residual_codes, residual_scales, *value = torch.split(image, _key_value_parts(head_dim), dim=-1)
    axes = {"h": 2, "j_high": 2, "ks": steps, "j_low": 2, "register": 2, "n_high": 4, "n_low": 2, "t": 4}
    codes = rearrange(unpack_fragments(codes), "h n_high j_high j_low n_low ks register t", **axes)
    scales = rearrange(unpack_scale_words(scales), "h n_high j n_low", h=2, j=4, n_high=4, n_low=2)
    wide = unpack_value(value[0], value[1], length, padded_dim(head_dim))
    return (
        _mxfp8_rows(codes, scales, KEY_TILE, length, head_dim),
        unpack_key_digit(residual_codes, residual_scales, length, head_dim),
        NVFP4Tensor(wide.codes[:, :, :head_dim], wide.scales[:, :, :head_dim]),
    )


def _key_value_parts(head_dim: int) -> list[int]:
    """Words of codes and scales of K, of its residual and of V in one key/value tile."""
    dim = padded_dim(head_dim)
    return [KEY_TILE * dim // _WORD, 2 * LANES, *key_digit_words(dim), *value_words(dim)]


def _row_words(tensor: MXFP8Tensor, rows: int) -> tuple[Tensor, Tensor, int]:
    """Code words [B, H, tiles, rows, 8 KSTEPS] and scale words [B, H, tiles, rows, 1], padded with zeros; KSTEPS."""
    codes, scales = tensor.codes, tensor.scales
    if codes.dtype != torch.float8_e4m3fn or scales.dtype != torch.uint8:
        raise TypeError(f"codes must be float8_e4m3fn and scales uint8, got {codes.dtype} and {scales.dtype}")
    if codes.dim() != 4 or codes.shape[3] % MXFP8_GROUP or scales.shape != (*codes.shape[:3], codes.shape[3] // 32):
        raise ValueError(
            f"codes must be [B, H, n, m] and scales [B, H, n, m / {MXFP8_GROUP}] with m a multiple of {MXFP8_GROUP}, "
            f"got {tuple(codes.shape)} and {tuple(scales.shape)}; see quantize_mxfp8"
        )
    dim, steps = padded_dim(codes.shape[3]), query_key_steps(codes.shape[3])
    scale_bytes = torch.nn.functional.pad(scales, (0, steps - scales.shape[-1]))
    scale_bytes = scale_bytes.repeat(1, 1, 1, _WORD // steps)
    words = (to_words(codes, dim), to_words(scale_bytes, _WORD))
    code_words, scale_words = (split_rows(pad_rows(x, rows), rows) for x in words)
    return code_words, scale_words, steps


def _mxfp8_rows(codes: Tensor, scales: Tensor, rows: int, length: int, head_dim: int) -> MXFP8Tensor:
    """The inverse of `_row_words` for words that are flat behind [B, H, tiles], without the padding."""
    groups = -(-head_dim // MXFP8_GROUP)
    codes, scales = (x.reshape(*x.shape[:2], x.shape[2] * rows, x.shape[3] // rows) for x in (codes, scales))
    return MXFP8Tensor(
        to_bytes(codes[:, :, :length])[..., : groups * MXFP8_GROUP].view(torch.float8_e4m3fn),
        to_bytes(scales[:, :, :length])[..., :groups],
    )
