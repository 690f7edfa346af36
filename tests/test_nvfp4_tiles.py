"""The operand images of the NVFP4 kernel, word by word from the layout's formulas, and their round trip."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sage_kernels.formats import NVFP4Tensor, nvfp4_tiles, unpack_e2m1

HEAD_DIMS = [16, 33, 64, 72, 96, 100, 128]


def random_operand(*shape: int, seed: int = 0) -> NVFP4Tensor:
    """Random bytes as codes [*shape] and scales of the last axis, which is padded to a multiple of 16."""
    generator = torch.Generator().manual_seed(seed)
    groups = -(-shape[-1] // 16)
    codes = torch.randint(256, (*shape[:-1], groups * 8), dtype=torch.uint8, generator=generator)
    scales = torch.randint(256, (*shape[:-1], groups), dtype=torch.uint8, generator=generator)
    return NVFP4Tensor(codes, scales.view(torch.float8_e4m3fn))


def key_value_operands(batch: int, heads: int, length: int, head_dim: int) -> list[NVFP4Tensor]:
    shapes = [(length, head_dim), (length, head_dim), (head_dim, length)]
    return [random_operand(batch, heads, *shape, seed=seed) for seed, shape in enumerate(shapes)]


def assert_same(actual: NVFP4Tensor, expected: NVFP4Tensor) -> None:
    assert torch.equal(actual.codes, expected.codes)
    assert torch.equal(actual.scales.view(torch.uint8), expected.scales.view(torch.uint8))


def code_word(operand: NVFP4Tensor, row: int, first: int) -> int:
    """Codes first..first+7 of a row of the first head as one word, nibble i for element i; 0 in the padding."""
    codes = operand.codes[0, 0]
    nibbles = torch.stack((codes & 15, codes >> 4), dim=-1).flatten(-2)
    if row >= nibbles.shape[0]:
        return 0
    return sum(int(code) << (4 * i) for i, code in enumerate(nibbles[row, first : first + 8]))


def scale_word(operand: NVFP4Tensor, row: int, step: int) -> int:
    """The scales of groups 4 * step .. 4 * step + 3 of a row of the first head; 0 in the padding."""
    scales = operand.scales.view(torch.uint8)[0, 0]
    if row >= scales.shape[0]:
        return 0
    return sum(int(scale) << (8 * i) for i, scale in enumerate(scales[row, 4 * step : 4 * step + 4]))


def words(image: torch.Tensor, tile: int) -> list[int]:
    return (image[0, 0, tile].long() & 0xFFFFFFFF).tolist()


def lanes():
    return itertools.product(range(8), range(4))


def expected_query_block(operand: NVFP4Tensor, block: int, steps: int) -> list[int]:
    codes = [
        code_word(operand, 32 * block + 16 * mt + g + 8 * (r & 1), 64 * ks + 8 * t + 32 * (r >> 1))
        for mt, ks, (g, t), r in itertools.product(range(2), range(steps), list(lanes()), range(4))
    ]
    scales = [
        scale_word(operand, 32 * block + 16 * mt + g + 8 * (t & 1), t >> 1 if steps == 2 else 0)
        for mt, (g, t) in itertools.product(range(2), list(lanes()))
    ]
    return codes + scales


def expected_mean_tile(operand: NVFP4Tensor, tile: int, steps: int) -> list[int]:
    codes = [
        code_word(operand, 8 * tile + g, 64 * ks + 8 * t + 32 * r)
        for ks, (g, t), r in itertools.product(range(steps), list(lanes()), range(2))
    ]
    scales = [0 if t & 1 else scale_word(operand, 8 * tile + g, t >> 1 if steps == 2 else 0) for g, t in lanes()]
    return codes + scales


def key_of_column(nt: int, n: int) -> int:
    return 32 * (nt // 4) + 8 * (n >> 1) + 2 * (nt % 4) + (n & 1)


def expected_key_digit(operand: NVFP4Tensor, tile: int, steps: int) -> list[int]:
    image = [0] * (32 * 18 * steps)
    for nt, ks, (g, t) in itertools.product(range(8), range(steps), list(lanes())):
        row, lane = 64 * tile + key_of_column(nt, g), 4 * g + t
        for r in range(2):
            f = (nt * steps + ks) * 2 + r
            image[(f // 4 * 32 + lane) * 4 + f % 4] = code_word(operand, row, 64 * ks + 8 * t + 32 * r)
        s = nt * steps + ks
        image[32 * 16 * steps + (4 * g + (s & 3)) * 2 * steps + (s >> 2)] = scale_word(operand, row, ks)
    return image


def expected_value(operand: NVFP4Tensor, tile: int, columns: int) -> list[int]:
    scale_words = 4 if columns > 8 else 2
    image = [0] * (32 * (2 * columns + scale_words))
    for vt, (g, t) in itertools.product(range(columns), list(lanes())):
        dim, lane = 8 * vt + g, 4 * g + t
        for r in range(2):
            f = vt * 2 + r
            image[(f // 4 * 32 + lane) * 4 + f % 4] = code_word(operand, dim, 64 * tile + 8 * t + 32 * r)
        image[32 * 2 * columns + (4 * g + (vt & 3)) * scale_words + (vt >> 2)] = scale_word(operand, dim, tile)
    return image


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_query_blocks_follow_the_layout(head_dim):
    query = random_operand(1, 1, 45, head_dim)
    image = nvfp4_tiles.pack_query_blocks(query)
    assert image.shape == (1, 1, 2, nvfp4_tiles.query_block_words(head_dim))
    for block in range(2):
        assert words(image, block) == expected_query_block(query, block, nvfp4_tiles.key_steps(head_dim))


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_mean_tiles_follow_the_layout(head_dim):
    means = random_operand(1, 1, 11, head_dim)
    image = nvfp4_tiles.pack_mean_tiles(means)
    assert image.shape == (1, 1, 2, nvfp4_tiles.mean_tile_words(head_dim))
    for tile in range(2):
        assert words(image, tile) == expected_mean_tile(means, tile, nvfp4_tiles.key_steps(head_dim))


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_key_value_tiles_follow_the_layout(head_dim):
    key, residual, value = key_value_operands(1, 1, 90, head_dim)
    image = nvfp4_tiles.pack_key_value_tiles(key, residual, value)
    assert image.shape == (1, 1, 2, nvfp4_tiles.key_value_tile_words(head_dim))
    steps, columns = nvfp4_tiles.key_steps(head_dim), nvfp4_tiles.value_dim(head_dim) // 8
    for tile in range(2):
        digits = expected_key_digit(key, tile, steps) + expected_key_digit(residual, tile, steps)
        assert words(image, tile) == digits + expected_value(value, tile, columns)


@settings(max_examples=60, deadline=None)
@given(batch=st.integers(0, 2), heads=st.integers(1, 3), length=st.integers(1, 200), head_dim=st.integers(1, 128))
def test_what_was_packed_comes_out_again(batch, heads, length, head_dim):
    rows = random_operand(batch, heads, length, head_dim)
    query_image, mean_image = nvfp4_tiles.pack_query_blocks(rows), nvfp4_tiles.pack_mean_tiles(rows)
    assert_same(nvfp4_tiles.unpack_query_blocks(query_image, length, head_dim), rows)
    assert_same(nvfp4_tiles.unpack_mean_tiles(mean_image, length, head_dim), rows)
    operands = key_value_operands(batch, heads, length, head_dim)
    image = nvfp4_tiles.pack_key_value_tiles(*operands)
    for actual, expected in zip(nvfp4_tiles.unpack_key_value_tiles(image, length, head_dim), operands, strict=True):
        assert_same(actual, expected)


def test_accumulator_of_scores_is_the_operand_of_weights():
    """Lane (g, t) gets the scores of columns 2t and 2t + 1; of P's A operand it must hold keys 8t..8t+7 and + 32."""
    for half, t in itertools.product(range(2), range(4)):
        held = [key_of_column(4 * half + j, 2 * t + i) for j in range(4) for i in range(2)]
        assert held == [32 * half + 8 * t + i for i in range(8)]


@pytest.mark.parametrize(("head_dim", "padded"), [(1, 64), (64, 64), (65, 96), (96, 96), (97, 128), (128, 128)])
def test_value_dims_are_padded_to_the_sizes_of_the_kernel(head_dim, padded):
    assert nvfp4_tiles.value_dim(head_dim) == padded


def test_native_head_dims_carry_no_padding():
    """4.5 bits an element: a code and a sixteenth of a scale."""
    assert 32 * nvfp4_tiles.query_block_words(128) == 4.5 * 32 * 128
    assert 32 * nvfp4_tiles.key_value_tile_words(128) == 3 * 4.5 * 64 * 128
    assert 32 * nvfp4_tiles.key_value_tile_words(64) == 3 * 4.5 * 64 * 64


def test_bad_operands_are_named():
    good = random_operand(1, 1, 40, 64)
    with pytest.raises(TypeError, match="uint8"):
        nvfp4_tiles.pack_query_blocks(NVFP4Tensor(unpack_e2m1(good.codes), good.scales))
    with pytest.raises(ValueError, match="quantize_nvfp4"):
        nvfp4_tiles.pack_mean_tiles(NVFP4Tensor(good.codes, good.scales[..., :2]))
    with pytest.raises(ValueError, match="1 to 128"):
        nvfp4_tiles.pack_query_blocks(random_operand(1, 1, 4, 144))
    key, residual, value = key_value_operands(1, 1, 40, 64)
    with pytest.raises(ValueError, match="both digits"):
        nvfp4_tiles.pack_key_value_tiles(key, random_operand(1, 1, 41, 64), value)
    with pytest.raises(ValueError, match="along the tokens"):
        nvfp4_tiles.pack_key_value_tiles(key, residual, key)
