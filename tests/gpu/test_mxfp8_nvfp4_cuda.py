"""The FP4 kernel's variant with Q and K in MXFP8 on a GPU, its instructions emulated where the GPU has none.

Preparation is compared bit for bit with formats/, attention with the quantised reference on the very operands that the
kernel packed. The bounds are those of the FP4 variant (test_nvfp4_cuda.py): P and V are the same, and what QK leaves is
accumulation in another order.
"""

import functools
import itertools
import math
from dataclasses import replace

import pytest
import torch
from test_nvfp4_cuda import BOUND, KINDS, make_options, make_qkv, means_in_order, native, relative_l1

from sage_kernels.attention_call import make_call
from sage_kernels.formats.grouping import pad_last_axis
from sage_kernels.formats.mxfp8 import dequantize_mxfp8, quantize_mxfp8
from sage_kernels.formats.mxfp8_tiles import (
    pack_key_value_tiles,
    pack_query_blocks,
    unpack_key_value_tiles,
    unpack_query_blocks,
)
from sage_kernels.formats.nvfp4 import dequantize_nvfp4, quantize_nvfp4
from sage_kernels.formats.nvfp4_tiles import QUERY_BLOCK, pack_mean_tiles, unpack_mean_tiles
from sage_kernels.kernels.nvfp4_cuda import NVFP4CudaKernel, packed_tensors
from sage_kernels.recipes import RECIPES
from sage_kernels.reference import QuantizedOperands, attend, attention_fp32, power_of_two_scale, quantized_attention
from sage_kernels.score_mask import ScoreMask

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.evidence("nvfp4"),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA GPU"),
]

RECIPE = RECIPES["fp8_fp4"]
# Against exact attention, on data of normal distribution: less than FP4's 0.25.
QUALITY = 0.18
LENGTHS = [(1, 1), (64, 64), (100, 100), (129, 129), (257, 512), (1, 1000), (1000, 1000)]


@pytest.fixture(scope="module")
def kernel():
    return NVFP4CudaKernel(not native(), "fp8_fp4")


@pytest.fixture
def check(kernel, within):
    """Function (q, k, v, quality, **options): attention against the quantised and the exact reference."""
    return functools.partial(check_attention, kernel, within)


@pytest.fixture(autouse=True)
def full_float32_products():
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


def call_of(q, k, v, *, attn_mask=None, is_causal=False, scale=None, key_lengths=None, layout="BHND"):
    return make_call(q, k, v, attn_mask, is_causal, scale, True, key_lengths, layout, "fp8_fp4", True, False)


def unpacked(state, call):
    """The kernel's own operands, as the reference takes them."""
    packed, dim = packed_tensors(state), call.head_dim
    rows, keys = call.query_length, call.key_length
    query = dequantize_mxfp8(unpack_query_blocks(packed.queries.flatten(2, 3), rows, dim))[..., :dim]
    means = dequantize_nvfp4(unpack_mean_tiles(packed.means, -(-rows // QUERY_BLOCK), dim))[..., :dim]
    key, residual, value = unpack_key_value_tiles(packed.keys_values, keys, dim)
    key, residual = dequantize_mxfp8(key)[..., :dim], dequantize_nvfp4(residual)[..., :dim]
    query_factors = packed.query_factors.flatten(2)[:, :, : means.shape[2], None] * (-1 if call.scale < 0 else 1)
    row_factors = query_factors.repeat_interleave(QUERY_BLOCK, dim=2)[:, :, :rows]
    key, residual = (torch.nn.functional.pad(x, (0, 0, 0, -keys % 16)) for x in (key, residual))
    key_factors = packed.key_factors[..., None, None]
    return QuantizedOperands(
        query * row_factors,
        key * key_factors,
        dequantize_nvfp4(value).transpose(-1, -2) * packed.value_factors[..., None, None],
        means * query_factors,
        residual * key_factors,
        packed.lse_shifts,
        packed.value_means[:, :, None, :dim],
    )


def check_attention(kernel, within, q, k, v, quality=QUALITY, **options):
    before = [x.clone() for x in (q, k, v)]
    call = call_of(q, k, v, **options)
    state = kernel.prepare(call)
    poison = torch.full((q.numel() + 64,), torch.nan, device="cuda", dtype=q.dtype)
    del poison  # the caching allocator hands this memory to the output: what isn't written shows
    output, lse = kernel.run(state)
    assert all(torch.equal(x, y) for x, y in zip((q, k, v), before, strict=True)), "an input was changed"
    assert output.dtype == q.dtype
    assert torch.isfinite(output).all()
    mask = ScoreMask(call.attn_mask, call.is_causal, call.key_lengths, call.key_length)
    expected, expected_lse = attend(unpacked(state, call), mask, RECIPE, call.scale)
    within(relative_l1(output, expected), BOUND[q.dtype])
    finite = torch.isfinite(expected_lse)
    assert torch.equal(finite, torch.isfinite(lse))
    if finite.any():
        lse_error = (lse - expected_lse)[finite].abs()
        assert lse_error.mean() < 1e-3
        assert lse_error.max() < 0.1
    exact, _ = attention_fp32(
        q, k, v, attn_mask=call.attn_mask, is_causal=call.is_causal, scale=call.scale, key_lengths=call.key_lengths
    )
    assert relative_l1(output, exact) < quality
    return output


@pytest.mark.parametrize(("rows", "keys"), LENGTHS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("head_dim", [64, 96, 128])
def test_attention_agrees_with_the_quantised_reference(check, head_dim, dtype, kind, rows, keys):
    batch, heads, kv_heads = (3, 2, 1) if kind == "lengths" else (2, 4, 2)
    q, k, v = make_qkv(batch, heads, kv_heads, rows, keys, head_dim, dtype)
    check(q, k, v, quality=math.inf, **make_options(kind, batch, heads, rows, keys))


@pytest.mark.parametrize("head_dim", [8, 33, 40, 72, 100])
@pytest.mark.parametrize("kind", ["plain", "causal"])
def test_other_head_dims_are_padded(check, head_dim, kind):
    q, k, v = make_qkv(1, 3, 3, 200, 333, head_dim, torch.bfloat16)
    check(q, k, v, **make_options(kind, 1, 3, 200, 333))


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("is_causal", [False, True])
def test_image_sized_sequences_agree(check, head_dim, is_causal):
    q, k, v = make_qkv(1, 3, 3, 4608, 4608, head_dim, torch.bfloat16)
    check(q, k, v, is_causal=is_causal)


@pytest.mark.parametrize("size", [1e-4, 1e-2, 100.0, 1e4])
def test_tensors_of_any_size_are_as_accurate(check, size):
    q, k, v = make_qkv(1, 2, 2, 300, 300, 128, torch.bfloat16, size=size)
    check(q, k, v, scale=128**-0.5 / size**2)


@pytest.mark.parametrize("scale", [-0.1, 0.0, 1.0])
def test_softmax_scale_is_honoured(check, scale):
    q, k, v = make_qkv(1, 2, 2, 300, 300, 64, torch.bfloat16)
    check(q, k, v, scale=scale, quality=0.5)


@pytest.mark.parametrize("layout", ["BHND", "BNHD"])
@pytest.mark.parametrize("view", ["sliced", "head_dim_strided"])
def test_any_strides_give_the_same_result(kernel, check, layout, view):
    q, k, v = make_qkv(2, 4, 4, 150, 150, 64, torch.bfloat16)
    expected = check(q, k, v)
    if view == "sliced":
        q, k, v = (torch.nn.functional.pad(x, (3, 2, 1, 1))[:, :, 1:-1, 3:-2] for x in (q, k, v))
    else:
        q, k, v = (x.transpose(2, 3).contiguous().transpose(2, 3) for x in (q, k, v))
    if layout == "BNHD":
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    output, _ = kernel.run(kernel.prepare(call_of(q, k, v, layout=layout)))
    assert torch.equal(output, expected)


def test_result_is_the_same_every_time(kernel, check):
    q, k, v = make_qkv(2, 3, 3, 1000, 1000, 128, torch.bfloat16)
    first = check(q, k, v)
    for _ in range(5):
        output, _ = kernel.run(kernel.prepare(call_of(q, k, v)))
        assert torch.equal(output, first)


def test_non_finite_inputs_are_not_hidden(kernel):
    q, k, v = make_qkv(1, 1, 1, 200, 200, 64, torch.bfloat16)
    for which, place in itertools.product(range(3), (torch.nan, torch.inf)):
        broken = [x.clone() for x in (q, k, v)]
        broken[which][0, 0, 70, 5] = place
        output, _ = kernel.run(kernel.prepare(call_of(*broken)))
        assert not torch.isfinite(output).all()


def test_graph_replay_follows_new_data(kernel):
    tensors = make_qkv(1, 2, 2, 500, 700, 128, torch.bfloat16)
    kernel.run(kernel.prepare(call_of(*tensors)))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output, _ = kernel.run(kernel.prepare(call_of(*tensors)))
    fresh = make_qkv(1, 2, 2, 500, 700, 128, torch.bfloat16, seed=5)
    for old, new in zip(tensors, fresh, strict=True):
        old.copy_(new)
    graph.replay()
    torch.cuda.synchronize()
    expected, _ = kernel.run(kernel.prepare(call_of(*fresh)))
    assert torch.equal(output, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("head_dim", [64, 72, 96, 128, 33])
@pytest.mark.parametrize(("rows", "keys"), [(1, 1), (100, 333), (1000, 1000)])
def test_packed_operands_are_bit_for_bit_those_of_the_formats(kernel, rows, keys, head_dim, dtype):
    q, k, v = make_qkv(2, 4, 2, rows, keys, head_dim, dtype)
    lengths = torch.tensor([keys, max(1, keys // 2)], dtype=torch.int32, device="cuda")
    packed = packed_tensors(kernel.prepare(call_of(q, k, v, key_lengths=lengths)))
    q, k, v = q.float(), k.float(), v.float()
    valid = (torch.arange(keys, device="cuda") < lengths[:, None])[:, None, :, None]

    scale = power_of_two_scale(q, QUERY_BLOCK)
    means = quantize_nvfp4(pad_last_axis(means_in_order(q, QUERY_BLOCK) * scale[:, :, ::QUERY_BLOCK], 16))
    images = pack_query_blocks(quantize_mxfp8(pad_last_axis(q * scale, 32)))
    assert torch.equal(packed.means, pack_mean_tiles(means))
    assert torch.equal(packed.queries.flatten(2, 3)[:, :, : images.shape[2]], images)
    assert torch.equal(packed.query_factors.flatten(2)[:, :, : images.shape[2]], 1 / scale[:, :, ::QUERY_BLOCK, 0])

    key_scale, value_scale = (power_of_two_scale(x * valid) for x in (k, v))
    key = ((k - packed.key_means[:, :, None, :head_dim]) * key_scale).where(valid, 0.0)
    value = ((v - packed.value_means[:, :, None, :head_dim]) * value_scale).where(valid, 0.0)
    first = quantize_mxfp8(pad_last_axis(key, 32))
    second = quantize_nvfp4(pad_last_axis(key - dequantize_mxfp8(first)[..., :head_dim], 16))
    transposed = quantize_nvfp4(pad_last_axis(value.transpose(-1, -2), 16), four_over_six=True)
    assert torch.equal(packed.keys_values, pack_key_value_tiles(first, second, transposed))


def test_correcting_the_rounding_of_keys_counts(kernel, within):
    """Where neighbours are alike and weights concentrated, without the correction the error would be twice as large."""
    generator = torch.Generator(device="cuda").manual_seed(0)
    waves = torch.linspace(0, 1, 1024, device="cuda")[:, None] * torch.arange(1, 13, device="cuda") * 2 * torch.pi
    waves = torch.cat((waves.sin(), waves.cos()), 1)
    mixing = torch.randn(1, 2, 24, 128, generator=generator, device="cuda") / 24**0.5

    def normal():
        return torch.randn(1, 2, 1024, 128, generator=generator, device="cuda")

    q, k, v = (
        x.bfloat16() for x in (waves @ mixing * 3.4 + 0.5 * normal(), waves @ mixing * 3.4 + 0.5 * normal(), normal())
    )
    output, _ = kernel.run(kernel.prepare(call_of(q, k, v)))
    exact, _ = attention_fp32(q, k, v)
    without, _ = quantized_attention(q, k, v, replace(RECIPE, key_correction_rows=0))
    within(relative_l1(output, exact), 0.7 * relative_l1(without, exact))
