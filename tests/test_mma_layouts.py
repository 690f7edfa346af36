"""Where mma.m16n8k64 mxf4nvf4 expects each element, by three independent sources, and whether the images put it there.

The sources: the formulas of the PTX ISA ("Matrix Fragments for mma.m16n8k64", "Block Scaling for mma.sync"), the
traits in CUTLASS's headers, and the registers in the PTX that Triton emits. Only the PTX ISA says what the selector
thread-id does other than 0; CUTLASS and Triton always use 0.
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
from sage_kernels.formats import NVFP4Tensor, nvfp4_tiles

LANES = np.arange(32)


@dataclass(frozen=True)
class MmaLayout:
    """Elements by who holds them, numbered row-major in A [16, 64], B^T [8, 64], C [16, 8] and the scales [., 4].

    a: [32 lanes, 32]; b: [32 lanes, 16]; element 8 r + i is nibble i of register r. c: [32 lanes, 4].
    scale_a: [8, 2, 4], bytes in lanes 4 g + (0, 1). scale_b: [8, 4], bytes in lanes 4 g; both at thread-id 0.
    """

    a: np.ndarray
    b: np.ndarray
    c: np.ndarray
    scale_a: np.ndarray
    scale_b: np.ndarray


def ptx_isa() -> MmaLayout:
    """groupID = lane / 4, threadID_in_group = lane % 4, as the ISA writes its formulas."""
    group, thread = LANES[:, None] // 4, LANES[:, None] % 4
    i = np.arange(32)
    a_row = np.where((i < 8) | ((i >= 16) & (i < 24)), group, group + 8)
    a_column = np.where(i < 16, thread * 8 + (i & 7), thread * 8 + (i & 7) + 32)
    i = np.arange(16)
    b_row = np.where(i < 8, thread * 8 + (i & 7), thread * 8 + (i & 7) + 32)
    i = np.arange(4)
    c_row, c_column = np.where(i < 2, group, group + 8), thread * 2 + (i & 1)
    # thread-id-a 0: lanes 0 and 1 of each quad give the scales of rows groupID and groupID + 8; b: lane 0 gives
    # column groupID's. With scale_vec::4X byte i of the word belongs to chunk i along k.
    g, pair, byte = np.arange(8), np.arange(2), np.arange(4)
    scale_a = (g[:, None, None] + 8 * pair[:, None]) * 4 + byte
    return MmaLayout(a_row * 64 + a_column, group * 64 + b_row, c_row * 8 + c_column, scale_a, g[:, None] * 4 + byte)


def cutlass() -> MmaLayout:
    """cute's layouts map (lane, value) to a column-major index: row + rows * column."""
    package = importlib.util.find_spec("cutlass_library")
    if package is None:
        pytest.skip("the CUTLASS headers are not installed (pip install nvidia-cutlass)")
    atoms = Path(package.submodule_search_locations[0]) / "source" / "include" / "cute" / "atom"
    sm120 = (atoms / "mma_traits_sm120.hpp").read_text(encoding="utf-8")
    traits = sm120[sm120.index("struct MMA_Traits<SM120::BLOCKSCALED::SM120_16x8x64_TN_VS<") :]
    assert "using CLayout   = SM80_16x8_Row;" in traits
    sm80 = (atoms / "mma_traits_sm80.hpp").read_text(encoding="utf-8")

    def row_major(text: str, name: str, rows: int, values: int, columns: int) -> np.ndarray:
        layout = parse_layout(re.search(rf"using {name}\s*=\s*(Layout<.*?>);", text, re.DOTALL).group(1))
        index = np.array([[layout(lane, value) for value in range(values)] for lane in LANES])
        return index % rows * columns + index // rows

    a = row_major(traits, "ALayout", 16, 32, 64)
    b = row_major(traits, "BLayout", 8, 16, 64)
    c = row_major(sm80, "SM80_16x8_Row", 16, 4, 8)
    # A scale stands for 16 values along k in its layout: the value is k, the byte k / 16.
    scale_a = row_major(traits, "SFALayout", 16, 64, 64).reshape(8, 4, 4, 16) // 16
    scale_b = row_major(traits, "SFBLayout", 8, 64, 64).reshape(8, 4, 4, 16) // 16
    assert (scale_a == scale_a[..., :1]).all()
    assert (scale_b == scale_b[..., :1]).all()
    return MmaLayout(a, b, c, scale_a[:, :2, :, 0], scale_b[:, 0, :, 0])


def triton() -> MmaLayout:
    """Every element is given its own number, three bits at a time, and found again in the registers of the mma."""
    pytest.importorskip("triton", reason="Triton is not installed (published for Linux only)")
    ptx = importlib.import_module("triton_tile").nvfp4_tile_ptx(120)
    a, b = np.arange(16 * 64), np.arange(8 * 64)
    found_a, found_b = np.zeros((32, 32), int), np.zeros((32, 16), int)
    for shift in (0, 4, 8):
        output = np.zeros(512, np.uint8)
        scales = [np.arange(64, dtype=np.uint8), np.arange(32, dtype=np.uint8)]
        warp = Warp([pack_nibbles(a >> shift), pack_nibbles(b >> shift), *scales, output])
        warp.run(ptx)
        (mma,) = warp.mmas
        assert mma.name.startswith("mma.sync.aligned.m16n8k64.row.col.kind::mxf4nvf4.block_scale.scale_vec::4X")
        _, registers_a, registers_b, _, (word_a,), selector_a, (word_b,), selector_b = mma.operands
        assert not np.any([*selector_a, *selector_b])
        found_a |= nibbles(np.stack(registers_a, axis=1)) << shift
        found_b |= nibbles(np.stack(registers_b, axis=1)) << shift
    c = np.empty(128, int)
    c[output.view(np.uint32)] = np.arange(128)
    bytes_a, bytes_b = (word.astype("<u4").view(np.uint8).reshape(8, 4, 4).astype(int) for word in (word_a, word_b))
    return MmaLayout(found_a, found_b, c.reshape(32, 4), bytes_a[:, :2], bytes_b[:, 0])


def nibbles(words: np.ndarray) -> np.ndarray:
    """[..., n] words -> [..., 8 n] nibbles, the lowest first."""
    return (words[..., None] >> (4 * np.arange(8)) & 15).reshape(*words.shape[:-1], -1)


def pack_nibbles(values: np.ndarray) -> np.ndarray:
    """The low four bits of each value, two to a byte, the even one low."""
    return ((values[..., 0::2] & 15) | (values[..., 1::2] & 15) << 4).astype(np.uint8)


@pytest.fixture(params=[ptx_isa, cutlass, triton], ids=lambda source: source.__name__)
def layout(request) -> MmaLayout:
    return cached(request.param)


@cache
def cached(source: Callable[[], MmaLayout]) -> MmaLayout:
    return source()


def find_codes(pack: Callable[[NVFP4Tensor], torch.Tensor], rows: int, columns: int) -> np.ndarray:
    """The nibbles of the image of a matrix whose element (row, column) is number row * columns + column."""
    number, found = np.arange(rows * columns).reshape(1, 1, rows, columns), 0
    for shift in (0, 4, 8, 12):
        zero_scales = torch.zeros(1, 1, rows, columns // 16).to(torch.float8_e4m3fn)
        image = pack(NVFP4Tensor(torch.from_numpy(pack_nibbles(number >> shift)), zero_scales))
        found = found | nibbles(image[0, 0, 0].numpy().astype(np.int64)) << shift
    return found


def find_scales(pack: Callable[[NVFP4Tensor], torch.Tensor], rows: int, groups: int) -> np.ndarray:
    """Likewise the bytes of the image, for scales."""
    number, found = np.arange(rows * groups).reshape(1, 1, rows, groups), 0
    for shift in (0, 8):
        scales = torch.from_numpy((number >> shift).astype(np.uint8)).view(torch.float8_e4m3fn)
        image = pack(NVFP4Tensor(torch.zeros(1, 1, rows, groups * 8, dtype=torch.uint8), scales))
        found = found | image[0, 0, 0].numpy().view(np.uint8).astype(int) << shift
    return found


def key_tile(key: NVFP4Tensor) -> torch.Tensor:
    """The image's first digit of K."""
    head_dim = key.codes.shape[-1] * 2
    value = NVFP4Tensor(
        torch.zeros(1, 1, head_dim, 32, dtype=torch.uint8), torch.zeros(1, 1, head_dim, 4).to(torch.float8_e4m3fn)
    )
    return nvfp4_tiles.pack_key_value_tiles(key, key, value)


def value_tile(value: NVFP4Tensor) -> torch.Tensor:
    """The image's V."""
    head_dim = value.codes.shape[2]
    key = NVFP4Tensor(
        torch.zeros(1, 1, 64, head_dim // 2, dtype=torch.uint8),
        torch.zeros(1, 1, 64, head_dim // 16).to(torch.float8_e4m3fn),
    )
    image = nvfp4_tiles.pack_key_value_tiles(key, key, value)
    return image[..., image.shape[-1] * 2 // 3 :]


def fragments(codes: np.ndarray, columns: int, steps: int) -> np.ndarray:
    """Nibbles [f / 4][32 lanes][f % 4][8] of an image -> [column tiles, steps, 32 lanes, 16 elements]."""
    codes = codes[: columns * steps * 32 * 16].reshape(-1, 32, 4, 8).transpose(0, 2, 1, 3)
    return codes.reshape(columns, steps, 2, 32, 8).transpose(0, 1, 3, 2, 4).reshape(columns, steps, 32, 16)


@pytest.fixture(scope="module")
def key_of_column() -> np.ndarray:
    """The key that column n of column tile nt of K's image holds, [8 nt, 8 n], by where its first element lies."""
    return fragments(find_codes(key_tile, 64, 64), 8, 1)[:, 0, ::4, 0] // 64


@pytest.mark.parametrize("steps", [1, 2])
def test_query_image_holds_operand_a(layout, steps):
    codes = find_codes(nvfp4_tiles.pack_query_blocks, 32, 64 * steps)[: 2 * steps * 32 * 32].reshape(2, steps, 32, 32)
    for mt in range(2):
        for ks in range(steps):
            expected = (16 * mt + layout.a // 64) * 64 * steps + 64 * ks + layout.a % 64
            assert np.array_equal(codes[mt, ks], expected)


@pytest.mark.parametrize("steps", [1, 2])
def test_mean_image_holds_the_upper_half_of_operand_a(layout, steps):
    codes = find_codes(nvfp4_tiles.pack_mean_tiles, 8, 64 * steps)[: steps * 32 * 16].reshape(steps, 32, 16)
    upper = layout.a[:, [*range(8), *range(16, 24)]]
    assert (layout.a[:, [*range(8, 16), *range(24, 32)]] // 64 >= 8).all()  # registers 1 and 3 are left zero
    for ks in range(steps):
        assert np.array_equal(codes[ks], upper // 64 * 64 * steps + 64 * ks + upper % 64)


@pytest.mark.parametrize("steps", [1, 2])
def test_key_image_holds_operand_b_of_its_permuted_keys(layout, key_of_column, steps):
    codes = fragments(find_codes(key_tile, 64, 64 * steps), 8, steps)
    for nt in range(8):
        for ks in range(steps):
            expected = key_of_column[nt, layout.b // 64] * 64 * steps + 64 * ks + layout.b % 64
            assert np.array_equal(codes[nt, ks], expected)


@pytest.mark.parametrize("head_dim", [64, 128])
def test_value_image_holds_operand_b(layout, head_dim):
    codes = fragments(find_codes(value_tile, head_dim, 64), head_dim // 8, 1)[:, 0]
    for vt in range(head_dim // 8):
        assert np.array_equal(codes[vt], 8 * 64 * vt + layout.b)


def test_accumulator_of_scores_is_operand_a_of_weights(layout, key_of_column):
    """Scores of column tiles 4 h .. 4 h + 3 become registers 2 h and 2 h + 1 with no exchange between lanes."""
    assert sorted(key_of_column.flatten()) == list(range(64))
    for nt in range(8):
        row, key = layout.c // 8, key_of_column[nt, layout.c % 8]
        half, j = divmod(nt, 4)
        for i in range(4):
            nibble = 8 * (2 * half + i // 2) + 2 * j + i % 2
            assert np.array_equal(layout.a[:, nibble], row[:, i] * 64 + key[:, i])


def test_query_scales_are_where_each_step_selects_them(layout):
    """thread-id-a is the step: it selects lanes 2 ks and 2 ks + 1 of each quad."""
    scales = find_scales(nvfp4_tiles.pack_query_blocks, 32, 8)[-2 * 32 * 4 :].reshape(2, 8, 4, 4)
    for mt in range(2):
        for ks in range(2):
            expected = (16 * mt + layout.scale_a // 4) * 8 + 4 * ks + layout.scale_a % 4
            assert np.array_equal(scales[mt, :, 2 * ks : 2 * ks + 2], expected)


def test_mean_scales_are_where_each_step_selects_them(layout):
    scales = find_scales(nvfp4_tiles.pack_mean_tiles, 8, 8)[-32 * 4 :].reshape(8, 4, 4)
    upper = layout.scale_a[:, 0]
    for ks in range(2):
        assert np.array_equal(scales[:, 2 * ks], upper // 4 * 8 + 4 * ks + upper % 4)
        assert not scales[:, 2 * ks + 1].any()


@pytest.mark.parametrize("steps", [1, 2])
def test_key_scales_are_where_each_column_tile_selects_them(layout, key_of_column, steps):
    """thread-id-b is s & 3: it selects that lane of each quad."""
    digit = (16 * 32 * steps * 4, 18 * 32 * steps * 4)
    scales = find_scales(key_tile, 64, 4 * steps)[slice(*digit)].reshape(8, 4, 2 * steps, 4)
    for nt in range(8):
        for ks in range(steps):
            s = nt * steps + ks
            expected = key_of_column[nt, layout.scale_b // 4] * 4 * steps + 4 * ks + layout.scale_b % 4
            assert np.array_equal(scales[:, s & 3, s >> 2], expected)


@pytest.mark.parametrize("head_dim", [64, 128])
def test_value_scales_are_where_each_column_tile_selects_them(layout, head_dim):
    columns = head_dim // 8
    scales = find_scales(value_tile, head_dim, 4)[columns * 32 * 2 * 4 :].reshape(8, 4, columns // 4, 4)
    for vt in range(columns):
        assert np.array_equal(scales[:, vt & 3, vt >> 2], 32 * vt + layout.scale_b)
