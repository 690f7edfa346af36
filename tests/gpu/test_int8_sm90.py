"""The INT8 kernel for sm_90a against the quantised reference with the kernel's own recipe.

Bounds follow from what the two do differently.
- The output's own rounding is off by 1.4e-3 on average in bf16 and by an eighth of that in fp16.
- Scores are added to 1.5 * 2^23, whose product with their scale is rounded once, so that all scores of a row and key
  block are shifted by up to one unit of the integer score. That carries a share of unit / 0.09 of the weights across a
  rounding boundary of E4M3, each by 0.09 on average: 0.3 * sqrt(unit) in all, and LSE by up to the unit.
- FP8 wgmma adds up with 14 bits, so each step of 32 keys may lose 2^-14, over the key blocks before promotion.
"""

import math
from dataclasses import replace

import pytest
import torch

from sage_kernels import attention
from sage_kernels.attention_call import make_call
from sage_kernels.int8_sm90_forms import FORMS
from sage_kernels.kernels.int8_sm90 import KERNEL, Int8Sm90Kernel
from sage_kernels.reference import attention_fp32, quantized_attention

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0),
        reason="needs a GPU of compute capability 9.0 (H100)",
    ),
]

SENTINEL = 777.0
ROUNDING = {torch.bfloat16: 1.6e-3, torch.float16: 2e-4, torch.float32: 1.6e-3}
# Against exact attention on such data: E4M3 P and V cost 0.025 each, INT8 Q and K the rest.
QUALITY = 0.05


@pytest.fixture(autouse=True)
def full_float32_products():
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


def relative_l1(output, expected):
    return ((output.float() - expected).abs().sum() / expected.abs().sum().clamp_min(1e-30)).item()


def make_qkv(batch, heads, kv_heads, rows, keys, head_dim, dtype=torch.bfloat16, seed=0, size=1.0):
    """Q, K and V, K and V with a bias that all tokens share, as diffusion models have them."""
    generator = torch.Generator(device="cuda").manual_seed(seed)

    def tensor(count, length, bias):
        x = torch.randn(batch, count, length, head_dim, generator=generator, device="cuda")
        shared = torch.randn(batch, count, 1, head_dim, generator=generator, device="cuda")
        return ((x + bias * shared) * size).to(dtype)

    return tensor(heads, rows, 0), tensor(kv_heads, keys, 2), tensor(kv_heads, keys, 0.3)


def make_options(kind, batch, keys):
    if kind == "causal":
        return {"is_causal": True}
    lengths = torch.tensor([max(1, keys // 3), keys, 0, keys + 5][:batch], dtype=torch.int32, device="cuda")
    if kind == "lengths":
        return {"key_lengths": lengths}
    if kind == "causal lengths":
        return {"key_lengths": lengths, "is_causal": True}
    return {}


def call_of(q, k, v, *, is_causal=False, scale=None, key_lengths=None, layout="BHND", return_lse=True):
    return make_call(q, k, v, None, is_causal, scale, True, key_lengths, layout, "int8", return_lse, False)


def form_of(head_dim, kernel):
    return next(form for form in kernel.forms if head_dim <= form.head_dim)


def largest_score_unit(call):
    """What the integer score 1 is worth, where it is worth most."""
    key = call.key.float()
    spread = (key - key.mean(2, keepdim=True)).abs().amax() * 2  # as much as a mean over fewer keys can add
    return (call.query.float().abs().amax() * spread / 127**2).item() * abs(call.scale)


def check(q, k, v, quality=QUALITY, kernel=KERNEL, **options):
    before = [x.clone() for x in (q, k, v)]
    call = call_of(q, k, v, **options)
    state = kernel.prepare(call)
    poison = torch.full((q.numel(),), SENTINEL, device="cuda", dtype=q.dtype)
    del poison  # the caching allocator hands this memory to the output: what isn't written shows
    output, lse = kernel.run(state)
    assert all(torch.equal(x, y) for x, y in zip((q, k, v), before, strict=True)), "an input was changed"
    assert output.dtype == q.dtype
    assert torch.isfinite(output).all()
    assert not (output == SENTINEL).any()
    arguments = {"is_causal": call.is_causal, "scale": call.scale, "key_lengths": call.key_lengths}
    rounded = [x.bfloat16() if x.dtype == torch.float32 else x for x in (call.query, call.key, call.value)]
    expected, expected_lse = quantized_attention(*rounded, kernel.recipe(call), **arguments)
    form = form_of(call.head_dim, kernel)
    steps = min(call.key_length, form.promote * form.keys or call.key_length) / 32
    unit = largest_score_unit(call)
    error = relative_l1(output, expected)
    assert error < ROUNDING[q.dtype] + 0.3 * math.sqrt(unit) + unit + steps * 2**-14, error
    finite = torch.isfinite(expected_lse)
    assert torch.equal(finite, torch.isfinite(lse))
    if finite.any():
        lse_error = (lse - expected_lse)[finite].abs()
        # A sum of rounded weights follows them across their boundaries, one of 448 by a sixteenth.
        assert lse_error.max() < (0.0625 if form.ones else 5e-4 + unit)
        assert lse_error.mean() < 5e-4 + unit + steps * 2**-14
    exact, _ = attention_fp32(*rounded, **arguments)
    assert relative_l1(output, exact) < quality
    return output


LENGTHS = [(1, 1), (63, 64), (64, 65), (127, 127), (128, 128), (129, 255), (193, 257), (1000, 1000)]
CROSS = [(1, 1000), (100, 77), (257, 512), (1000, 64), (300, 1), (64, 900)]


@pytest.mark.parametrize(("rows", "keys"), LENGTHS + CROSS)
@pytest.mark.parametrize("kind", ["plain", "causal", "lengths", "causal lengths"])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_attention_agrees_with_the_quantised_reference(head_dim, kind, rows, keys):
    batch = 3 if "lengths" in kind else 2
    q, k, v = make_qkv(batch, 4, 2, rows, keys, head_dim)
    check(q, k, v, quality=math.inf, **make_options(kind, batch, keys))


@pytest.mark.parametrize("head_dim", [8, 40, 64, 72, 80, 96, 104, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("kind", ["plain", "causal"])
def test_head_dims_are_padded_and_dtypes_kept(kind, dtype, head_dim):
    check(*make_qkv(1, 3, 3, 200, 333, head_dim, dtype), **make_options(kind, 1, 333))


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("turns", [0, 100], ids=["in turns", "even shares"])
def test_sequences_of_several_turns_agree(turns, is_causal, head_dim):
    check(*make_qkv(1, 9, 3, 4608, 4500, head_dim), is_causal=is_causal, kernel=Int8Sm90Kernel(FORMS, turns))


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize(
    "form",
    [
        replace(FORMS[0], promote=0, ones=True, line=4),
        replace(FORMS[0], warpgroups=2, ones=True, line=4),
        replace(FORMS[1], promote=1, headroom=0, ones=False),
        replace(FORMS[1], line=3),
        replace(FORMS[1], pingpong=False),
    ],
)
def test_other_forms_agree(form, is_causal):
    check(*make_qkv(1, 4, 4, 1000, 2000, form.head_dim), is_causal=is_causal, kernel=Int8Sm90Kernel((form,)))


@pytest.mark.parametrize("heads", [1, 7, 150])
def test_few_and_many_heads_share_the_processors(heads):
    check(*make_qkv(1, heads, heads, 257, 260, 128))


@pytest.mark.parametrize("size", [1e-3, 1e-2, 1.0, 30.0, 1e3])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_tensors_of_any_size_are_as_accurate(dtype, size):
    q, k, v = make_qkv(1, 2, 2, 300, 300, 128, dtype, size=size)
    check(q, k, v, scale=128**-0.5 / size**2)


@pytest.mark.parametrize("scale", [-0.1, 0.0, 1.0])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_softmax_scale_is_honoured(head_dim, scale):
    check(*make_qkv(1, 2, 2, 300, 300, head_dim), scale=scale, quality=0.3)


@pytest.mark.parametrize("layout", ["BHND", "BNHD"])
@pytest.mark.parametrize("view", ["transposed", "sliced", "head_dim_strided", "misaligned", "expanded"])
def test_any_strides_give_the_same_result(view, layout):
    q, k, v = make_qkv(2, 4, 4, 150, 150, 64)
    if view == "expanded":
        k, v = k[:, :1].expand_as(k), v[:, :1].expand_as(v)
    expected = check(q, k.contiguous(), v.contiguous())
    if view == "transposed":
        q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v))
    elif view == "sliced":
        q, k, v = (torch.nn.functional.pad(x, (3, 2, 1, 1))[:, :, 1:-1, 3:-2] for x in (q, k, v))
    elif view == "head_dim_strided":
        q, k, v = (x.transpose(2, 3).contiguous().transpose(2, 3) for x in (q, k, v))
    elif view == "misaligned":
        q, k, v = (torch.cat([x.flatten()[:1], x.flatten()])[1:].view(x.shape) for x in (q, k, v))
    if layout == "BNHD":
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    output, _ = KERNEL.run(KERNEL.prepare(call_of(q, k, v, layout=layout)))
    assert torch.equal(output, expected)
    assert output.transpose(1, 2).is_contiguous() if layout == "BNHD" else output.is_contiguous()


def test_attention_takes_it_with_and_without_lse():
    q, k, v = make_qkv(1, 2, 2, 500, 500, 128)
    output, lse = attention(q, k, v, precision="int8", return_lse=True)
    assert torch.equal(attention(q, k, v, precision="int8"), output)
    assert lse.shape == (1, 2, 500)


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("return_lse", [False, True])
def test_result_is_the_same_every_time(return_lse, head_dim):
    q, k, v = make_qkv(2, 30, 10, 1000, 1000, head_dim)
    first = check(q, k, v)
    for _ in range(20):
        output, _ = KERNEL.run(KERNEL.prepare(call_of(q, k, v, return_lse=return_lse)))
        assert torch.equal(output, first)


def test_empty_queries_give_an_empty_output():
    q, k, v = make_qkv(2, 2, 2, 0, 5, 64)
    output, lse = KERNEL.run(KERNEL.prepare(call_of(q, k, v)))
    assert output.shape == q.shape
    assert lse.shape == (2, 2, 0)


@pytest.mark.parametrize("place", [math.nan, math.inf])
@pytest.mark.parametrize("which", range(3))
def test_non_finite_inputs_are_not_hidden(which, place):
    tensors = make_qkv(1, 1, 1, 200, 200, 64)
    tensors[which][0, 0, 70, 5] = place
    output, _ = KERNEL.run(KERNEL.prepare(call_of(*tensors)))
    assert not torch.isfinite(output).all()


@pytest.mark.parametrize("head_dim", [64, 128])
def test_graph_replay_follows_new_data(head_dim):
    tensors = make_qkv(1, 2, 2, 500, 700, head_dim)
    KERNEL.run(KERNEL.prepare(call_of(*tensors)))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output, _ = KERNEL.run(KERNEL.prepare(call_of(*tensors)))
    fresh = make_qkv(1, 2, 2, 500, 700, head_dim, seed=5)
    for old, new in zip(tensors, fresh, strict=True):
        old.copy_(new)
    graph.replay()
    torch.cuda.synchronize()
    expected, _ = KERNEL.run(KERNEL.prepare(call_of(*fresh)))
    assert torch.equal(output, expected)


def test_operands_take_little_memory():
    q, k, v = make_qkv(1, 4, 4, 16384, 16384, 128)
    KERNEL.run(KERNEL.prepare(call_of(q, k, v, return_lse=False)))
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    output, _ = KERNEL.run(KERNEL.prepare(call_of(q, k, v, return_lse=False)))
    extra = torch.cuda.max_memory_allocated() - before - output.numel() * 2
    assert extra <= 0.52 * 3 * q.numel() * 2
