"""Formats, references and the 16-bit rung on a CUDA GPU: same bits as on the CPU, bounded memory, no surprises."""

import pytest
import torch

import sage_kernels
from sage_kernels import formats
from sage_kernels.recipes import RECIPES
from sage_kernels.reference import attention_fp32, quantized_attention

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA GPU"),
]


@pytest.fixture(autouse=True)
def full_float32_products():
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


def relative_l1(output, expected):
    output, expected = output.float().cpu(), expected.float().cpu()
    return ((output - expected).abs().sum() / expected.abs().sum()).item()


def qkv(rows=300, keys=500, heads=4, kv_heads=4, head_dim=128, dtype=torch.bfloat16):
    generator = torch.Generator().manual_seed(0)
    shapes = [(heads, rows), (kv_heads, keys), (kv_heads, keys)]
    return [torch.randn(2, h, n, head_dim, generator=generator).to(dtype) for h, n in shapes]


@pytest.mark.parametrize("fmt", ["nvfp4", "mxfp8", "fp8", "int8"])
def test_quantisers_give_the_same_bits_as_on_the_cpu(fmt):
    quantize, dequantize = getattr(formats, f"quantize_{fmt}"), getattr(formats, f"dequantize_{fmt}")
    x = torch.randn(64, 4096, generator=torch.Generator().manual_seed(0)) * torch.logspace(-6, 6, 64)[:, None]
    x[3, 5], x[4, 7], x[5] = torch.nan, torch.inf, 0
    cpu, gpu = quantize(x), quantize(x.cuda())
    assert torch.equal(cpu.codes.view(torch.uint8), gpu.codes.cpu().view(torch.uint8))
    assert torch.equal(dequantize(cpu).nan_to_num(), dequantize(gpu).cpu().nan_to_num())


@pytest.mark.parametrize("precision", RECIPES)
@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"attn_mask": True}], ids=["plain", "causal", "mask"])
def test_references_agree_with_the_cpu(precision, options):
    q, k, v = qkv()
    options = dict(options)
    if "attn_mask" in options:
        options["attn_mask"] = torch.rand(300, 500, generator=torch.Generator().manual_seed(1)) > 0.3
    cpu, cpu_lse = quantized_attention(q, k, v, RECIPES[precision], **options)
    moved = {name: x.cuda() if isinstance(x, torch.Tensor) else x for name, x in options.items()}
    gpu, gpu_lse = quantized_attention(q.cuda(), k.cuda(), v.cuda(), RECIPES[precision], **moved)
    # Sums in another order move a few values across a rounding boundary.
    assert relative_l1(gpu, cpu) < 2e-3
    assert (gpu_lse.cpu() - cpu_lse).abs().max() < 0.02


@pytest.mark.parametrize("precision", ["auto", "fp16"])
@pytest.mark.parametrize("case", ["plain", "causal", "bool", "additive", "lengths", "lengths_causal", "gqa", "odd_dim"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_sixteen_bit_rung_is_right_with_every_argument(precision, case, dtype):
    q, k, v = qkv(kv_heads=2 if case == "gqa" else 4, head_dim=72 if case == "odd_dim" else 128, dtype=dtype)
    options = {"is_causal": case.endswith("causal"), "enable_gqa": case == "gqa"}
    random = torch.rand(2, 1, 300, 500, generator=torch.Generator().manual_seed(1))
    if case in ("bool", "additive"):
        options["attn_mask"] = random > 0.4 if case == "bool" else random * 4
    if case.startswith("lengths"):
        options["key_lengths"] = torch.tensor([500, 33], dtype=torch.int32)
    expected, expected_lse = attention_fp32(
        q, k, v, **{name: value for name, value in options.items() if name != "enable_gqa"}
    )
    moved = {name: x.cuda() if isinstance(x, torch.Tensor) else x for name, x in options.items()}
    inputs = [x.cuda() for x in (q, k, v)]
    before = [x.clone() for x in inputs]
    output, lse = sage_kernels.attention(*inputs, precision=precision, return_lse=True, **moved)
    assert output.dtype == dtype
    assert relative_l1(output, expected) < (5e-3 if dtype != torch.float32 else 1e-3)
    assert (lse.cpu() - expected_lse).abs().max() < 1e-3
    assert all(torch.equal(x, y) for x, y in zip(inputs, before, strict=True))


def test_rows_without_any_key_give_zeros():
    q, k, v = (x.cuda() for x in qkv())
    mask = torch.ones(300, 500, dtype=torch.bool, device="cuda")
    mask[7] = False
    for precision in ("fp16", *RECIPES):
        output, lse = sage_kernels.attention(
            q, k, v, attn_mask=mask, precision=precision, return_lse=True, allow_emulation=True
        )
        assert not output[:, :, 7].any(), precision
        assert lse[:, :, 7].eq(-torch.inf).all()


@pytest.mark.parametrize("precision", RECIPES)
def test_32k_tokens_run_in_bounded_memory(precision):
    q, k, v = (torch.randn(1, 2, 32768, 128, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    output, _ = quantized_attention(q, k, v, RECIPES[precision])
    extra = torch.cuda.max_memory_allocated() - before
    assert output.isfinite().all()
    scores = 2 * 32768 * 32768 * 4
    print(f"{precision}: {extra / 2**20:.0f} MiB extra; the scores alone would be {scores / 2**20:.0f} MiB")
    assert extra < scores / 16


def test_compiles_with_the_default_backend():
    q, k, v = (x.cuda() for x in qkv())

    def layer(q, k, v, precision):
        return sage_kernels.attention(q * 2, k, v, precision=precision, allow_emulation=True) + 1

    compiled = torch.compile(layer, fullgraph=True)
    for precision in ("auto", "fp4"):
        assert relative_l1(compiled(q, k, v, precision), layer(q, k, v, precision)) < 5e-3


def test_this_gpu_says_what_it_runs_and_why_not_more():
    first = sage_kernels.capabilities()[0]
    assert first.device == "cuda:0"
    assert first.architecture is not None
    assert {*first.precisions, *(refusal.kernel for refusal in first.refusals)} == {*RECIPES, "fp16"}
