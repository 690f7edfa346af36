"""The number formats against their specifications and against ml_dtypes' independent rounding."""

import math
from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest
import torch

from sage_kernels import formats
from sage_kernels.formats.nvfp4 import encode_e2m1


def e4m3_midpoints_and_neighbours() -> torch.Tensor:
    """Every finite E4M3 value, every midpoint of two, and the float32 values just beside them."""
    values = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    values = values[values.isfinite()].unique()
    points = torch.cat((values, (values[1:] + values[:-1]) / 2))
    step = torch.tensor(torch.inf)
    return torch.cat((points, torch.nextafter(points, step), torch.nextafter(points, -step)))


def test_e2m1_rounding_agrees_with_ml_dtypes_at_values_midpoints_and_between():
    values = torch.tensor(formats.E2M1_VALUES)
    points = torch.cat((values, (values[1:] + values[:-1]) / 2, torch.linspace(-8, 8, 4001)))
    points = torch.cat((points, -points))
    points = torch.cat((points, torch.nextafter(points, torch.tensor(torch.inf)), torch.tensor([1e30, -1e30])))
    expected = points.numpy().astype(ml_dtypes.float4_e2m1fn)
    assert np.array_equal(formats.round_to_e2m1(points).numpy(), expected.astype(np.float32))
    assert np.array_equal(encode_e2m1(formats.round_to_e2m1(points)).numpy(), expected.view(np.uint8) & 15)


def test_e4m3_rounding_agrees_with_ml_dtypes_below_saturation():
    points = e4m3_midpoints_and_neighbours()
    points = points[points.abs() <= 448]
    expected = points.numpy().astype(ml_dtypes.float8_e4m3fn).astype(np.float32)
    assert np.array_equal(formats.round_to_e4m3(points).numpy(), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_agrees_with_ml_dtypes_for_every_16_bit_number(dtype):
    points = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(dtype).float()
    points = points[~points.isnan()]
    expected = points.numpy().astype(ml_dtypes.float4_e2m1fn)
    assert np.array_equal(encode_e2m1(formats.round_to_e2m1(points)).numpy(), expected.view(np.uint8) & 15)
    expected = points.clamp(-448, 448).numpy().astype(ml_dtypes.float8_e4m3fn)
    rounded = formats.round_to_e4m3(points).to(torch.float8_e4m3fn)
    assert np.array_equal(rounded.view(torch.uint8).numpy(), expected.view(np.uint8))


def test_e4m3_rounding_saturates_and_keeps_nan():
    rounded = formats.round_to_e4m3(torch.tensor([449.0, 1e30, -1e30, torch.inf, torch.nan]))
    assert rounded[:4].tolist() == [448, 448, -448, 448]
    assert rounded[4].isnan()


def test_every_e2m1_code_survives_packing():
    codes = torch.arange(256, dtype=torch.uint8)
    packed = formats.pack_e2m1(torch.stack((codes & 15, codes >> 4), dim=-1).flatten())
    assert torch.equal(packed, codes)
    assert torch.equal(formats.pack_e2m1(encode_e2m1(formats.unpack_e2m1(packed))), codes)


def test_the_even_element_is_in_the_low_nibble():
    assert formats.pack_e2m1(torch.tensor([1, 2], dtype=torch.uint8)).tolist() == [0x21]


def test_all_codes_with_all_scales_round_trip():
    """Each group holds all 16 codes, so its maximum is 6 * scale and the scale is found again exactly."""
    scales = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    usable = scales.float() > 0
    scales = scales[usable]
    groups = formats.unpack_e2m1(formats.pack_e2m1(torch.arange(16, dtype=torch.uint8)).repeat(len(scales), 1))
    quantized = formats.quantize_nvfp4(groups * scales.float()[:, None])
    assert len(scales) == 126
    assert torch.equal(quantized.scales.view(torch.uint8).flatten(), scales.view(torch.uint8))
    assert torch.equal(formats.dequantize_nvfp4(quantized), groups * scales.float()[:, None])
    assert torch.equal(quantized.codes, formats.pack_e2m1(torch.arange(16, dtype=torch.uint8)).expand(len(scales), 8))


def test_negative_and_nan_scales_are_decoded_as_e4m3():
    """The other half of the 256 scale bytes never comes out of the quantiser, but must not be misread."""
    scales = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    codes = formats.pack_e2m1(torch.arange(16, dtype=torch.uint8)).expand(256, 8)
    values = formats.dequantize_nvfp4(formats.NVFP4Tensor(codes, scales[:, None]))
    table = np.arange(16, dtype=np.uint8).view(ml_dtypes.float4_e2m1fn).astype(np.float32)
    expected = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)[:, None] * table
    assert np.array_equal(values.numpy(), expected, equal_nan=True)


def test_nvfp4_divides_by_the_rounded_scale():
    # max / 6 = 17 / 6 = 2.833, which E4M3 rounds to 2.75; 17 / 2.75 = 6.18 saturates, 1.4 / 2.75 = 0.509 becomes 0.5.
    quantized = formats.quantize_nvfp4(torch.tensor([17.0, 1.4] + [0.0] * 14))
    assert quantized.scales.float().item() == 2.75
    assert formats.dequantize_nvfp4(quantized)[:2].tolist() == [16.5, 1.375]


def rounded_to_float32(x: Fraction) -> Fraction:
    """To nearest, ties to even; of a normal number."""
    spacing = Fraction(2) ** (math.frexp(x)[1] - 24)
    return round(x / spacing) * spacing


@pytest.mark.parametrize("eighths", range(8, 16))
def test_two_products_find_the_side_of_a_threshold_that_division_finds(eighths):
    """The preparation kernel divides by fma(x, 1 / scale, x * rest). Mantissas of E4M3 are eighths."""
    scale = Fraction(eighths, 8)
    reciprocal = rounded_to_float32(1 / scale)
    rest = rounded_to_float32(rounded_to_float32(1 - reciprocal * scale) * reciprocal)
    for threshold in map(Fraction, (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)):
        middle = threshold * scale
        spacing = Fraction(2) ** (math.frexp(middle)[1] - 24)
        for steps in (*range(-20, 21), -1000, 1000):
            x = middle + steps * spacing
            quotient = rounded_to_float32(x * reciprocal + rounded_to_float32(x * rest))
            assert (quotient > threshold, quotient < threshold) == (x > middle, x < middle)
            divided = rounded_to_float32(x / scale)
            assert (divided > threshold, divided < threshold) == (x > middle, x < middle)


@pytest.mark.parametrize("tiny", [0.0, 1e-5])
def test_nvfp4_group_that_is_zero_or_too_small_becomes_zero_without_nan(tiny):
    quantized = formats.quantize_nvfp4(torch.full((2, 16), tiny))
    assert not quantized.codes.any()
    assert not formats.dequantize_nvfp4(quantized).any()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("fmt", ["nvfp4", "mxfp8", "fp8", "int8"])
def test_non_finite_values_stay_visible_in_their_group_only(fmt, bad):
    x = torch.randn(4, 64)
    x[1, 3] = bad
    quantize, dequantize = getattr(formats, f"quantize_{fmt}"), getattr(formats, f"dequantize_{fmt}")
    values = dequantize(quantize(x))
    assert values[1, :16].isnan().all()
    assert values[[0, 2, 3]].isfinite().all()


@pytest.mark.parametrize("exponent", [-127, -126, -60, 0, 60, 119])
def test_mxfp8_scale_is_the_smallest_power_of_two_that_does_not_saturate(exponent):
    x = torch.zeros(32, dtype=torch.float64)
    x[0], x[1] = 448 * 2.0**exponent, 2.0**exponent
    quantized = formats.quantize_mxfp8(x.float())
    assert quantized.scales.item() == exponent + 127
    assert torch.equal(formats.dequantize_mxfp8(quantized), x.float())
    above = torch.nextafter(x.float(), torch.tensor(torch.inf))
    assert formats.quantize_mxfp8(above).scales.item() == exponent + 128


def test_mxfp8_group_of_zeros_gets_the_smallest_scale():
    quantized = formats.quantize_mxfp8(torch.tensor([0.0, -0.0] * 16))
    assert quantized.scales.item() == 0
    assert not formats.dequantize_mxfp8(quantized).any()


def test_mxfp8_codes_agree_with_ml_dtypes():
    x = torch.randn(64, 32) * torch.logspace(-6, 6, 64)[:, None]
    quantized = formats.quantize_mxfp8(x)
    scales = quantized.scales.numpy().view(ml_dtypes.float8_e8m0fnu).astype(np.float32)
    codes = (x.numpy() / scales).astype(ml_dtypes.float8_e4m3fn)
    assert np.array_equal(codes.view(np.uint8), quantized.codes.view(torch.uint8).numpy())


@pytest.mark.parametrize(("rows", "block"), [(1, 1), (5, 1), (64, 32), (100, 64), (7, 128)])
def test_int8_error_is_at_most_half_a_step_of_its_own_block(rows, block):
    x = torch.randn(2, rows, 24) * torch.logspace(-4, 4, rows)[:, None]
    quantized = formats.quantize_int8(x, block=block)
    error = (formats.dequantize_int8(quantized) - x).abs()
    for start in range(0, rows, block):
        part = slice(start, start + block)
        step = x[:, part].abs().amax(dim=(1, 2)) / 127
        assert (error[:, part].amax(dim=(1, 2)) <= step * 0.5001).all()
        assert torch.allclose(quantized.scales[:, start // block, 0], step)
    assert quantized.codes.abs().max() == 127


@pytest.mark.parametrize("dim", [0, 1, -1, None])
def test_fp8_uses_the_whole_range_along_its_axis(dim):
    x = torch.randn(8, 12) * 1e-3
    quantized = formats.quantize_fp8(x, dim=dim)
    codes = quantized.codes.float().abs()
    assert (codes.max() if dim is None else codes.amax(dim)).eq(448).all()
    assert (formats.dequantize_fp8(quantized) - x).abs().max() <= x.abs().max() / 16


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_inputs_of_other_dtypes_are_taken_and_not_changed(dtype):
    x = torch.randn(3, 64).to(dtype)
    before = x.clone()
    for fmt in ("nvfp4", "mxfp8", "fp8", "int8"):
        getattr(formats, f"quantize_{fmt}")(x)
    assert torch.equal(x, before)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: formats.quantize_nvfp4(torch.ones(15)), ValueError, "multiple of 16"),
        (lambda: formats.quantize_mxfp8(torch.ones(16)), ValueError, "multiple of 32"),
        (lambda: formats.quantize_nvfp4(torch.ones(16, dtype=torch.int32)), TypeError, "floating-point"),
        (lambda: formats.quantize_fp8(torch.ones(16, dtype=torch.int32)), TypeError, "floating-point"),
        (lambda: formats.quantize_fp8(torch.ones(16), maximum=500), ValueError, "448"),
        (lambda: formats.quantize_int8(torch.ones(16)), ValueError, "n, d"),
        (lambda: formats.quantize_int8(torch.ones(2, 2, dtype=torch.bool)), TypeError, "floating-point"),
    ],
)
def test_bad_input_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call()
