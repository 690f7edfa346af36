"""Operand images of the NVFP4 attention kernel: codes and scales in the order in which its threads load them.

A tile is one contiguous piece of memory that a single bulk copy brings into shared memory, and each thread finds its
MMA registers there with wide, conflict-free loads. Images are int32 words, little endian.

The MMA is m16n8k64 with one E4M3 scale per 16 elements. Lane 4 g + t (g 0..7, t 0..3) holds words of 8 E2M1 codes,
nibble i being element i:

    A (16 rows)      register 0: row g, k = 8t..8t+7;  1: row g + 8;  2: row g, k + 32;  3: row g + 8, k + 32
    B (8 columns)    register 0: column g, k = 8t..8t+7;  1: k + 32
    scale word       the four groups of 16 along k, the lowest k in the lowest byte; one a row of A, one a column of B

QK contracts in `key_steps` (KSTEPS) steps of 64 along head_dim, padded with zeros. PV contracts over the 64 keys of a
tile and has VT = `value_dim` / 8 column tiles. All words of an image, in order:

    query block      codes [2 mt][KSTEPS][32 lanes][4 registers]
    32 rows          scales [2 mt][32 lanes]: row 16 mt + g + 8 (t & 1), step t >> 1 (0 where KSTEPS is 1)
    mean tile        codes [KSTEPS][32 lanes][2]: registers 0 and 2; row g is the mean of query block g of the tile
    8 query blocks   scales [32 lanes]: row g, step t >> 1 (0 where KSTEPS is 1); 0 where t is odd
    key/value tile   first digit of K, second digit of K, V
    64 keys          K codes: fragment word f = (nt KSTEPS + ks) 2 + register as [f / 4][32 lanes][f % 4]
                     K scales: word s = nt KSTEPS + ks in lane t = s & 3 as [32 lanes][s >> 2]
                     V codes: fragment word f = vt 2 + register as [f / 4][32 lanes][f % 4], column g = dim 8 vt + g
                     V scales: word s = vt in lane t = s & 3 as [32 lanes][s >> 2], s >> 2 < 4 where VT > 8, else 2

Column n of K's tile nt = 4 h + j is key 32 h + 8 (n >> 1) + 2 j + (n & 1): the accumulator of S then lies in the
registers of P's A operand (SageAttention3, section 3.3). Rows, keys and dims of padding are zero codes, zero scales.
"""

import torch
from torch import Tensor

from sage_kernels.formats.nvfp4 import NVFP4_GROUP, NVFP4Tensor
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

QUERY_BLOCK = 32
MEANS_PER_TILE = 8
KEY_TILE = 64
MAX_HEAD_DIM = 128
_STEP = 64  # contraction of one MMA


def key_steps(head_dim: int) -> int:
    """MMA steps of QK along head_dim: 1 or 2.

    Raises:
        ValueError: head_dim is not in 1..128.
    """
    if not 1 <= head_dim <= MAX_HEAD_DIM:
        raise ValueError(f"NVFP4 tiles hold head_dim 1 to {MAX_HEAD_DIM}, got {head_dim}")
    return 1 if head_dim <= _STEP else 2


def value_dim(head_dim: int) -> int:
    """head_dim of V padded to the sizes that the kernel has: 64, 96 or 128.

    Raises:
        ValueError: head_dim is not in 1..128.
    """
    return _STEP if key_steps(head_dim) == 1 else -(-head_dim // 32) * 32


def query_block_words(head_dim: int) -> int:
    """Words of the image of one query block."""
    return 2 * LANES * (4 * key_steps(head_dim) + 1)


def mean_tile_words(head_dim: int) -> int:
    """Words of the image of one tile of query means."""
    return LANES * (2 * key_steps(head_dim) + 1)


def key_value_tile_words(head_dim: int) -> int:
    """Words of the image of one key/value tile."""
    return sum(_key_value_parts(head_dim))


def pack_query_blocks(query: NVFP4Tensor) -> Tensor:
    """Images of the query blocks.

    Args:
        query: quantised along head_dim: codes uint8 [B, H, Nq, D' / 2], scales float8_e4m3fn [B, H, Nq, D' / 16],
            D' being head_dim padded to a multiple of 16.

    Returns:
        int32 [B, H, ceil(Nq / 32), query_block_words].

    Raises:
        TypeError, ValueError: codes and scales of other dtypes or shapes, or D' > 128.
    """
    codes, scales = _row_words(query, QUERY_BLOCK)
    steps = scales.shape[-1]
    codes = rearrange(codes, "mt ks g t k_half row_half", mt=2, row_half=2, g=8, ks=steps, k_half=2, t=4)
    scales = rearrange(scales.expand(*scales.shape[:-1], 2), "mt g ks row_half", mt=2, row_half=2, g=8, ks=2)
    return torch.cat((codes, scales), dim=-1)


def unpack_query_blocks(image: Tensor, length: int, head_dim: int) -> NVFP4Tensor:
    """The first `length` query rows of images made by `pack_query_blocks`."""
    steps = key_steps(head_dim)
    codes, scales = torch.split(image, [8 * LANES * steps, 2 * LANES], dim=-1)
    codes = rearrange(codes, "mt row_half g ks k_half t", mt=2, ks=steps, g=8, t=4, k_half=2, row_half=2)
    scales = rearrange(scales, "ks mt row_half g", mt=2, g=8, ks=2, row_half=2)
    return _nvfp4_rows(codes, _first_steps(scales, steps, QUERY_BLOCK), QUERY_BLOCK, length, head_dim)


def pack_mean_tiles(means: NVFP4Tensor) -> Tensor:
    """Images of the means of the query blocks.

    Args:
        means: one row a query block, quantised along head_dim; shapes as in `pack_query_blocks`.

    Returns:
        int32 [B, H, ceil(blocks / 8), mean_tile_words].

    Raises:
        TypeError, ValueError: as `pack_query_blocks`.
    """
    codes, scales = _row_words(means, MEANS_PER_TILE)
    steps = scales.shape[-1]
    codes = rearrange(codes, "ks g t k_half", g=8, ks=steps, k_half=2, t=4)
    scales = scales.expand(*scales.shape[:-1], 2)
    scales = torch.stack((scales, torch.zeros_like(scales)), dim=-1)
    return torch.cat((codes, scales.flatten(3)), dim=-1)


def unpack_mean_tiles(image: Tensor, blocks: int, head_dim: int) -> NVFP4Tensor:
    """The first `blocks` means of images made by `pack_mean_tiles`."""
    steps = key_steps(head_dim)
    codes, scales = torch.split(image, [2 * LANES * steps, LANES], dim=-1)
    codes = rearrange(codes, "g ks k_half t", ks=steps, g=8, t=4, k_half=2)
    scales = rearrange(scales[..., 0::2], "ks g", g=8, ks=2)
    return _nvfp4_rows(codes, _first_steps(scales, steps, MEANS_PER_TILE), MEANS_PER_TILE, blocks, head_dim)


def pack_key_value_tiles(key: NVFP4Tensor, key_residual: NVFP4Tensor, value: NVFP4Tensor) -> Tensor:
    """Images of the key/value tiles.

    Args:
        key: first digit of K, quantised along head_dim; shapes as in `pack_query_blocks`.
        key_residual: second digit: what the first one missed, quantised likewise.
        value: quantised along the tokens: codes uint8 [B, Hkv, D, N' / 2], scales float8_e4m3fn [B, Hkv, D, N' / 16],
            N' being the number of keys padded to a multiple of 16.

    Returns:
        int32 [B, Hkv, ceil(Nk / 64), key_value_tile_words].

    Raises:
        TypeError, ValueError: as `pack_query_blocks`, or operands whose shapes don't belong together.
    """
    _check_operand(value)
    batch, heads, length, packed_dim = key.codes.shape
    head_dim = value.codes.shape[2]
    padded_length = -(-length // NVFP4_GROUP) * NVFP4_GROUP
    padded_dim = -(-head_dim // NVFP4_GROUP) * NVFP4_GROUP
    if key_residual.codes.shape != key.codes.shape:
        raise ValueError(
            f"both digits of K must have one shape, got codes {tuple(key.codes.shape)} "
            f"and {tuple(key_residual.codes.shape)}"
        )
    if value.codes.shape != (batch, heads, head_dim, padded_length // 2) or padded_dim != 2 * packed_dim:
        raise ValueError(
            f"V's codes must be [B, Hkv, D, {padded_length // 2}] for K's codes {tuple(key.codes.shape)}, "
            f"quantised along the tokens; got {tuple(value.codes.shape)}"
        )
    return torch.cat((pack_key_digit(key), pack_key_digit(key_residual), pack_value(value)), dim=-1)


def unpack_key_value_tiles(image: Tensor, length: int, head_dim: int) -> tuple[NVFP4Tensor, NVFP4Tensor, NVFP4Tensor]:
    """Both digits of K and V, `length` keys of each, from images made by `pack_key_value_tiles`."""
    parts = torch.split(image, _key_value_parts(head_dim), dim=-1)
    return (
        unpack_key_digit(parts[0], parts[1], length, head_dim),
        unpack_key_digit(parts[2], parts[3], length, head_dim),
        unpack_value(parts[4], parts[5], length, head_dim),
    )


def key_digit_words(head_dim: int) -> tuple[int, int]:
    """Words of codes and scales of one digit of K in a key/value tile."""
    return 16 * LANES * key_steps(head_dim), 2 * LANES * key_steps(head_dim)


def value_words(head_dim: int) -> tuple[int, int]:
    """Words of codes and scales of V in a key/value tile."""
    columns = value_dim(head_dim) // 8
    return 2 * LANES * columns, LANES * _value_scale_words(columns)


def _key_value_parts(head_dim: int) -> list[int]:
    """Words of codes and scales of K's first digit, K's second digit and V in one key/value tile."""
    return [*key_digit_words(head_dim), *key_digit_words(head_dim), *value_words(head_dim)]


def _value_scale_words(columns: int) -> int:
    return 4 if columns > 8 else 2


def pack_key_digit(key: NVFP4Tensor) -> Tensor:
    """One digit of K of each key/value tile."""
    codes, scales = _row_words(key, KEY_TILE)
    steps = scales.shape[-1]
    codes = rearrange(codes, "h j ks register n_high n_low t", **KEY_AXES, ks=steps, register=2, t=4)
    scales = rearrange(scales, "h j ks n_high n_low", **KEY_AXES, ks=steps)
    return torch.cat((pack_fragments(codes), pack_scale_words(scales)), dim=-1)


def unpack_key_digit(codes: Tensor, scales: Tensor, length: int, head_dim: int) -> NVFP4Tensor:
    """`length` keys of what `pack_key_digit` made, split in codes and scales."""
    steps = key_steps(head_dim)
    codes = rearrange(
        unpack_fragments(codes),
        "h n_high j n_low ks register t",
        h=2,
        j=4,
        ks=steps,
        register=2,
        n_high=4,
        n_low=2,
        t=4,
    )
    scales = rearrange(unpack_scale_words(scales), "h n_high j n_low ks", h=2, j=4, ks=steps, n_high=4, n_low=2)
    return _nvfp4_rows(codes, scales, KEY_TILE, length, head_dim)


def pack_value(value: NVFP4Tensor) -> Tensor:
    """V of each key/value tile."""
    columns = value_dim(value.codes.shape[2]) // 8
    codes, scales = _token_words(value.codes, KEY_TILE // 2), _token_words(value.scales, KEY_TILE // NVFP4_GROUP)
    codes = rearrange(pad_rows(codes, 8 * columns), "vt register g t", vt=columns, g=8, register=2, t=4)
    scales = pad_rows(scales, 32 * _value_scale_words(columns)).flatten(3)
    return torch.cat((pack_fragments(codes), pack_scale_words(scales)), dim=-1)


def unpack_value(codes: Tensor, scales: Tensor, length: int, head_dim: int) -> NVFP4Tensor:
    """`length` keys of what `pack_value` made, split in codes and scales."""
    columns = value_dim(head_dim) // 8
    codes = rearrange(unpack_fragments(codes), "vt g register t", vt=columns, register=2, g=8, t=4)
    codes = codes.reshape(*codes.shape[:3], 8 * columns, 8)[:, :, :, :head_dim]
    scales = unpack_scale_words(scales)[..., :head_dim, None]
    groups = -(-length // NVFP4_GROUP)
    return NVFP4Tensor(
        to_bytes(codes.transpose(2, 3).flatten(3))[..., : groups * NVFP4_GROUP // 2],
        to_bytes(scales.transpose(2, 3).flatten(3))[..., :groups].view(torch.float8_e4m3fn),
    )


def _row_words(tensor: NVFP4Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """Code words [B, H, tiles, rows, 8 KSTEPS] and scale words [B, H, tiles, rows, KSTEPS], padded with zeros."""
    _check_operand(tensor)
    steps = key_steps(2 * tensor.codes.shape[-1])
    codes, scales = to_words(tensor.codes, 32 * steps), to_words(tensor.scales, 4 * steps)
    return split_rows(pad_rows(codes, rows), rows), split_rows(pad_rows(scales, rows), rows)


def _nvfp4_rows(codes: Tensor, scales: Tensor, rows: int, length: int, head_dim: int) -> NVFP4Tensor:
    """The inverse of `_row_words` for words that are flat behind [B, H, tiles], without the padding."""
    groups = -(-head_dim // NVFP4_GROUP)
    codes, scales = (x.reshape(*x.shape[:2], x.shape[2] * rows, x.shape[3] // rows) for x in (codes, scales))
    return NVFP4Tensor(
        to_bytes(codes[:, :, :length])[..., : groups * NVFP4_GROUP // 2],
        to_bytes(scales[:, :, :length])[..., :groups].view(torch.float8_e4m3fn),
    )


def _first_steps(scales: Tensor, steps: int, rows: int) -> Tensor:
    """Scale words [2 ks][rows] of each tile, the second a copy where there is one step -> [rows][KSTEPS]."""
    return scales[..., : steps * rows].reshape(*scales.shape[:3], steps, rows).transpose(-1, -2).flatten(3)


def _token_words(x: Tensor, tile_bytes: int) -> Tensor:
    """Bytes [B, Hkv, D, n] of V -> words [B, Hkv, tiles, D, words of a tile], padded with zeros."""
    words = to_words(x, tile_bytes)
    per_tile = tile_bytes // 4
    return words.reshape(*words.shape[:3], words.shape[3] // per_tile, per_tile).transpose(2, 3)


def _check_operand(tensor: NVFP4Tensor) -> None:
    codes, scales = tensor.codes, tensor.scales
    if codes.dtype != torch.uint8 or scales.dtype != torch.float8_e4m3fn:
        raise TypeError(f"codes must be uint8 and scales float8_e4m3fn, got {codes.dtype} and {scales.dtype}")
    if codes.dim() != 4 or scales.shape != (*codes.shape[:3], codes.shape[3] * 2 // NVFP4_GROUP) or codes.shape[3] % 8:
        raise ValueError(
            f"codes must be [B, H, n, m / 2] and scales [B, H, n, m / {NVFP4_GROUP}] with m a multiple of "
            f"{NVFP4_GROUP}, got {tuple(codes.shape)} and {tuple(scales.shape)}; see quantize_nvfp4"
        )
