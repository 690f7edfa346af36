"""Where mma.m16n8k32 mxf8f6f4 expects each E4M3 element and scale, by three independent sources, and whether the
images put it there.

The sources are those of test_mma_layouts.py. Only the PTX ISA says what the selectors byte-id and thread-id do other
than 0 ("Block Scaling for mma.sync"): with scale_vec::1X, byte-id picks one byte of the word.
"""

import importlib
import importlib.util
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch

from cute_layout import parse_layout
from ptx_interpreter import Warp
from sage_kernels.formats import mxfp8_tiles
from sage_kernels.formats.grouping import pad_last_axis
from sage_kernels.formats.mxfp8 import MXFP8Tensor, quantize_mxfp8
from sage_kernels.formats.nvfp4 import NVFP4Tensor, quantize_nvfp4

LANES = np.arange(32)
HEAD_DIMS = [16, 33, 64, 72, 96, 128]


@dataclass(frozen=True)
class MmaLayout:
    """Elements by who holds them, numbered row-major in A [16, 32], B^T [8, 32], C [16, 8].

    a: [32 lanes, 16]; b: [32 lanes, 8]; element 4 r + i is byte i of register r. c: [32 lanes, 4].
    scale_a: rows [8, 2], of lanes 4 g + (0, 1). scale_b: columns [8], of lanes 4 g; all selectors 0.
    """

    a: np.ndarray
    b: np.ndarray
    c: np.ndarray
    scale_a: np.ndarray
    scale_b: np.ndarray


def ptx_isa() -> MmaLayout:
    """groupID = lane / 4, threadID_in_group = lane % 4, as the ISA writes its formulas for 8-bit elements."""
    group, thread = LANES[:, None] // 4, LANES[:, None] % 4
    i = np.arange(16)
    a_row = np.where((i < 4) | ((i >= 8) & (i < 12)), group, group + 8)
    a_column = np.where(i < 8, thread * 4 + (i & 3), thread * 4 + (i & 3) + 16)
    i = np.arange(8)
    b_row = np.where(i < 4, thread * 4 + (i & 3), thread * 4 + (i & 3) + 16)
    i = np.arange(4)
    c_row, c_column = np.where(i < 2, group, group + 8), thread * 2 + (i & 1)
    g = np.arange(8)
    return MmaLayout(a_row * 32 + a_column, group * 32 + b_row, c_row * 8 + c_column, g[:, None] + 8 * np.arange(2), g)


def cutlass() -> MmaLayout:
    """cute's layouts map (lane, value) to a column-major index: row + rows * column."""
    package = importlib.util.find_spec("cutlass_library")
    if package is None:
        pytest.skip("the CUTLASS headers are not installed (pip install nvidia-cutlass)")
    atoms = Path(package.submodule_search_locations[0]) / "source" / "include" / "cute" / "atom"
    sm120, sm80 = ((atoms / f"mma_traits_{arch}.hpp").read_text(encoding="utf-8") for arch in ("sm120", "sm80"))
    scaled = sm120[sm120.index("struct MMA_Traits<SM120::BLOCKSCALED::SM120_16x8x32_TN_VS<") :]
    assert "using UnderlyingTraits = MMA_Traits<SM120_16x8x32_TN<a_type, b_type, c_type>>;" in scaled
    plain = sm120[sm120.index("struct MMA_Traits<SM120_16x8x32_TN<") :]
    assert plain.split("{")[0].rstrip().endswith(": MMA_Traits<SM80_16x8x32_S32S8S8S32_TN>")
    eight_bit = sm80[sm80.index("struct MMA_Traits<SM80_16x8x32_S32S8S8S32_TN>") :]

    def row_major(text: str, name: str, rows: int, values: int, columns: int) -> np.ndarray:
        layout = parse_layout(re.search(rf"using {name}\s*=\s*(Layout<.*?>);", text, re.DOTALL).group(1))
        index = np.array([[layout(lane, value) for value in range(values)] for lane in LANES])
        return index % rows * columns + index // rows

    # A scale stands for 32 values along k in its layout: one row (column) of them.
    scale_a = row_major(scaled, "SFALayout", 16, 32, 32).reshape(8, 4, 32) // 32
    scale_b = row_major(scaled, "SFBLayout", 8, 32, 32).reshape(8, 4, 32) // 32
    assert (scale_a == scale_a[..., :1]).all()
    assert (scale_b == scale_b[:, :1, :1]).all()
    return MmaLayout(
        row_major(eight_bit, "ALayout", 16, 16, 32),
        row_major(eight_bit, "BLayout", 8, 8, 32),
        row_major(sm80, "SM80_16x8_Row", 16, 4, 8),
        scale_a[:, :2, 0],
        scale_b[:, 0, 0],
    )


def triton() -> MmaLayout:
    """Every element is given its own number, a byte at a time, and found again in the registers of the mma."""
    pytest.importorskip("triton", reason="Triton is not installed (published for Linux only)")
    ptx = importlib.import_module("triton_tile").mxfp8_tile_ptx(120)
    a, b = np.arange(16 * 32), np.arange(8 * 32)
    found_a, found_b = np.zeros((32, 16), int), np.zeros((32, 8), int)
    for shift in (0, 8):
        output = np.zeros(512, np.uint8)
        codes = [(x >> shift).astype(np.uint8) for x in (a, b)]
        warp = Warp([*codes, np.arange(16, dtype=np.uint8), np.arange(8, dtype=np.uint8), output])
        warp.run(ptx)
        (mma,) = warp.mmas
        assert mma.name.startswith("mma.sync.aligned.m16n8k32.row.col.kind::mxf8f6f4.block_scale.scale_vec::1X")
        _, registers_a, registers_b, _, (word_a,), selector_a, (word_b,), selector_b = mma.operands
        assert not np.any([*selector_a, *selector_b])
        found_a |= word_bytes(np.stack(registers_a, axis=1)) << shift
        found_b |= word_bytes(np.stack(registers_b, axis=1)) << shift
    c = np.empty(128, int)
    c[output.view(np.uint32)] = np.arange(128)
    return MmaLayout(
        found_a, found_b, c.reshape(32, 4), (word_a & 255).reshape(8, 4)[:, :2], (word_b & 255).reshape(8, 4)[:, 0]
    )


def word_bytes(words: np.ndarray) -> np.ndarray:
    """[..., n] words -> [..., 4 n] bytes, the lowest first."""
    return (words[..., None] >> (8 * np.arange(4)) & 255).reshape(*words.shape[:-1], -1)


@pytest.fixture(params=[ptx_isa, cutlass, triton], ids=lambda source: source.__name__)
def layout(request) -> MmaLayout:
    return cached(request.param)


@cache
def cached(source: Callable[[], MmaLayout]) -> MmaLayout:
    return source()


def zero_nvfp4(rows: int, columns: int) -> NVFP4Tensor:
    return NVFP4Tensor(
        torch.zeros(1, 1, rows, columns // 2, dtype=torch.uint8),
        torch.zeros(1, 1, rows, columns // 16).to(torch.float8_e4m3fn),
    )


def key_tile(key: MXFP8Tensor) -> torch.Tensor:
    head_dim = key.codes.shape[-1]
    return mxfp8_tiles.pack_key_value_tiles(key, zero_nvfp4(64, head_dim), zero_nvfp4(head_dim, 64))


def find(pack: Callable[[MXFP8Tensor], torch.Tensor], rows: int, columns: int, *, scales: bool) -> np.ndarray:
    """The bytes of the image of a matrix whose code (or else scale) at (row, column) is number row * width + column."""
    width = columns // 32 if scales else columns
    number, found = np.arange(rows * width).reshape(1, 1, rows, width), 0
    for shift in (0, 8):
        part = torch.from_numpy((number >> shift).astype(np.uint8))
        zeros = torch.zeros(1, 1, rows, columns if scales else columns // 32, dtype=torch.uint8)
        tensor = MXFP8Tensor((zeros if scales else part).view(torch.float8_e4m3fn), part if scales else zeros)
        found = found | pack(tensor)[0, 0, 0].numpy().view(np.uint8).astype(int) << shift
    return found


def key_fragments(head_dim: int) -> np.ndarray:
    """K's codes in the image, [column tiles, steps, 32 lanes, 8 elements]."""
    steps = head_dim // 32
    codes = find(key_tile, 64, head_dim, scales=False)[: 64 * head_dim].reshape(4, steps, 32, 2, 8)
    return codes.transpose(0, 3, 1, 2, 4).reshape(8, steps, 32, 8)


@pytest.fixture(scope="module")
def key_of_column() -> np.ndarray:
    """The key that column n of column tile nt of K's image holds, [8 nt, 8 n], by where its first element lies."""
    return key_fragments(64)[:, 0, ::4, 0] // 64


@pytest.mark.parametrize("head_dim", [64, 128])
def test_query_image_holds_operand_a(layout, head_dim):
    steps = head_dim // 32
    codes = find(mxfp8_tiles.pack_query_blocks, 32, head_dim, scales=False)[: 32 * head_dim]
    codes = codes.reshape(2, steps, 32, 16)
    for mt in range(2):
        for ks in range(steps):
            expected = (16 * mt + layout.a // 32) * head_dim + 32 * ks + layout.a % 32
            assert np.array_equal(codes[mt, ks], expected)


@pytest.mark.parametrize("head_dim", [64, 128])
def test_key_image_holds_operand_b_of_its_permuted_keys(layout, key_of_column, head_dim):
    codes = key_fragments(head_dim)
    for nt in range(8):
        for ks in range(head_dim // 32):
            expected = key_of_column[nt, layout.b // 32] * head_dim + 32 * ks + layout.b % 32
            assert np.array_equal(codes[nt, ks], expected)


def test_accumulator_of_scores_is_operand_a_of_fp4_weights(layout, key_of_column):
    """As in the FP4 variant: of P's operand A, lane 4 g + t holds rows g, g + 8 and keys 8t..8t+7 of each half."""
    assert sorted(key_of_column.flatten()) == list(range(64))
    group, thread = LANES // 4, LANES % 4
    for nt in range(8):
        row, key = layout.c // 8, key_of_column[nt, layout.c % 8]
        half, j = divmod(nt, 4)
        for i in range(4):
            assert np.array_equal(row[:, i], group + 8 * (i // 2))
            assert np.array_equal(key[:, i], 32 * half + 8 * thread + 2 * j + i % 2)


@pytest.mark.parametrize("head_dim", [64, 128])
def test_query_scales_are_where_each_step_selects_them(layout, head_dim):
    """byte-id-a is the step, thread-id-a 0: lanes 0 and 1 of each quad."""
    steps = head_dim // 32
    scales = find(mxfp8_tiles.pack_query_blocks, 32, head_dim, scales=True)[-2 * 32 * 4 :].reshape(2, 8, 4, 4)
    for mt in range(2):
        for ks in range(steps):
            assert np.array_equal(scales[mt, :, :2, ks], (16 * mt + layout.scale_a) * steps + ks)


@pytest.mark.parametrize("head_dim", [64, 128])
def test_key_scales_are_where_each_column_tile_selects_them(layout, key_of_column, head_dim):
    """byte-id-b is the step, thread-id-b is nt & 3: that lane of each quad."""
    steps = head_dim // 32
    scales = find(key_tile, 64, head_dim, scales=True)[64 * head_dim :][: 64 * 4].reshape(8, 4, 2, 4)
    for nt in range(8):
        for ks in range(steps):
            assert np.array_equal(scales[:, nt & 3, nt >> 2, ks], key_of_column[nt, layout.scale_b] * steps + ks)


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("length", [1, 64, 100])
def test_images_give_back_what_they_were_made_of(head_dim, length):
    x = torch.randn(2, 3, length, head_dim, generator=torch.Generator().manual_seed(0))
    key, residual = quantize_mxfp8(pad_last_axis(x, 32)), quantize_nvfp4(pad_last_axis(x, 16))
    value = quantize_nvfp4(pad_last_axis(x.transpose(-1, -2), 16))
    queries = mxfp8_tiles.pack_query_blocks(key)
    tiles = mxfp8_tiles.pack_key_value_tiles(key, residual, value)
    assert queries.shape == (2, 3, -(-length // 32), mxfp8_tiles.query_block_words(head_dim))
    assert tiles.shape == (2, 3, -(-length // 64), mxfp8_tiles.key_value_tile_words(head_dim))
    found = (
        mxfp8_tiles.unpack_query_blocks(queries, length, head_dim),
        *mxfp8_tiles.unpack_key_value_tiles(tiles, length, head_dim),
    )
    for actual, expected in zip(found, (key, key, residual, value), strict=True):
        for name in ("codes", "scales"):
            assert torch.equal(getattr(actual, name).view(torch.uint8), getattr(expected, name).view(torch.uint8))


def test_operands_that_do_not_belong_together_are_named():
    key = quantize_mxfp8(torch.zeros(1, 1, 64, 64))
    with pytest.raises(ValueError, match="head_dim 64 and 64 keys"):
        mxfp8_tiles.pack_key_value_tiles(key, zero_nvfp4(64, 128), zero_nvfp4(64, 64))
    with pytest.raises(TypeError, match="float8_e4m3fn and scales uint8"):
        mxfp8_tiles.pack_query_blocks(zero_nvfp4(64, 64))
    with pytest.raises(ValueError, match="m / 32"):
        mxfp8_tiles.pack_query_blocks(MXFP8Tensor(key.codes, key.scales[..., :1]))
    with pytest.raises(ValueError, match="head_dim 1 to 128"):
        mxfp8_tiles.pack_query_blocks(quantize_mxfp8(torch.zeros(1, 1, 32, 160)))
