"""The Triton INT8 kernels in Triton's interpreter, against formats/ bit by bit and against the quantised reference.

Run by tests/test_int8_triton.py, with TRITON_INTERPRET=1.
"""

from importlib import import_module

import pytest
import torch

from int8_cases import KINDS, call_of, compare, make_options, make_qkv, relative_l1, run
from sage_kernels.formats.fp8_e4m3 import quantize_fp8
from sage_kernels.formats.int8 import quantize_int8
from sage_kernels.kernels.int8_configs import AttentionConfig
from sage_kernels.kernels.int8_operands import TOKEN_TILE
from sage_kernels.kernels.int8_triton import KERNELS
from sage_kernels.reference import power_of_two_scale, quantized_attention
from triton_interpreter import round_as_gpus_do

CPU = torch.device("cpu")
# Relative L1 to the quantised reference: the output's rounding to bfloat16 is 1.4e-3, to float16 1.8e-4. Beyond it, a
# sum in another order carries a weight of P across a rounding boundary now and then.
BOUND = {torch.bfloat16: 2e-3, torch.float16: 6e-4, torch.float32: 5e-4}
LSE_BOUND = 1.5e-3  # one such weight of about a hundred, by the 1/16 that E4M3 values are apart
# Against exact attention; worst of the cases below 0.024 and 0.0098.
QUALITY = {"int8": 0.03, "int8_fp16": 0.0125}


@pytest.fixture(autouse=True)
def gpu_rounding(monkeypatch):
    round_as_gpus_do(monkeypatch)


@pytest.fixture(params=KERNELS, ids=lambda kernel: kernel.precision)
def kernel(request):
    return request.param


def check(kernel, q, k, v, **options):
    output, error, exact_error, lse_error = compare(kernel, q, k, v, **options)
    assert error < BOUND[q.dtype]
    assert exact_error < QUALITY[kernel.precision]
    assert lse_error < LSE_BOUND
    return output


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_call_agrees_with_the_reference(kernel, kind):
    batch = 4 if kind.startswith("lengths") else 2
    q, k, v = make_qkv(batch, 2, 1, 70, 200, 64, torch.bfloat16, CPU)
    check(kernel, q, k, v, **make_options(kind, batch, 2, 70, 200, CPU))


@pytest.mark.parametrize(("rows", "keys"), [(1, 1), (1, 300), (127, 128), (129, 129), (300, 2)])
@pytest.mark.parametrize("is_causal", [False, True])
def test_every_length_agrees_with_the_reference(kernel, rows, keys, is_causal):
    q, k, v = make_qkv(1, 2, 2, rows, keys, 32, torch.float16, CPU)
    check(kernel, q, k, v, is_causal=is_causal)


@pytest.mark.parametrize("head_dim", [1, 33, 40, 72, 80, 96, 128, 160, 256])
def test_every_head_dim_agrees_with_the_reference(kernel, head_dim):
    q, k, v = make_qkv(1, 1, 1, 40, 60, head_dim, torch.bfloat16, CPU)
    check(kernel, q, k, v)


@pytest.mark.parametrize("scale", [-0.1, 0.0, 0.2])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_scale_and_dtype_agree_with_the_reference(kernel, scale, dtype):
    q, k, v = make_qkv(1, 1, 1, 60, 90, 64, dtype, CPU)
    check(kernel, q, k, v, scale=scale)


@pytest.mark.parametrize("size", [1e-4, 1e4])
def test_tensors_of_any_size_are_as_accurate(kernel, size):
    q, k, v = make_qkv(1, 1, 1, 60, 90, 64, torch.bfloat16, CPU, size=size)
    check(kernel, q, k, v, scale=0.125 / size**2)


@pytest.mark.parametrize("view", ["transposed", "sliced", "head_dim_strided", "expanded", "BNHD"])
def test_any_strides_give_the_same_result(kernel, view):
    q, k, v = make_qkv(2, 2, 2, 50, 60, 64, torch.bfloat16, CPU)
    if view == "expanded":
        k, v = k[:, :1].expand_as(k), v[:, :1].expand_as(v)
    expected = check(kernel, q.contiguous(), k.contiguous(), v.contiguous())
    if view == "transposed":
        q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v))
    elif view == "sliced":
        q, k, v = (torch.nn.functional.pad(x, (3, 2, 1, 1))[:, :, 1:-1, 3:-2] for x in (q, k, v))
    elif view == "head_dim_strided":
        q, k, v = (x.transpose(2, 3).contiguous().transpose(2, 3) for x in (q, k, v))
    layout = "BHND"
    if view == "BNHD":
        layout, (q, k, v) = "BNHD", (x.transpose(1, 2) for x in (q, k, v))
    output, _ = run(kernel, call_of(q, k, v, kernel.precision, layout=layout))
    assert torch.equal(output, expected)
    assert output.transpose(1, 2).is_contiguous() == (layout == "BNHD")


@pytest.mark.parametrize("which", range(3))
@pytest.mark.parametrize("place", [torch.nan, torch.inf])
def test_non_finite_inputs_are_not_hidden(kernel, which, place):
    tensors = make_qkv(1, 1, 1, 40, 60, 64, torch.bfloat16, CPU)
    tensors[which][0, 0, 7, 5] = place
    output, _ = run(kernel, call_of(*tensors, kernel.precision))
    expected, _ = quantized_attention(*tensors, kernel.recipe(call_of(*tensors, kernel.precision)))
    assert not torch.isfinite(output).all()
    assert torch.equal(torch.isfinite(output), torch.isfinite(expected))


def test_no_query_rows_give_an_empty_result(kernel):
    q, k, v = make_qkv(1, 2, 1, 0, 60, 64, torch.bfloat16, CPU)
    output, lse = run(kernel, call_of(q, k, v, kernel.precision))
    assert output.shape == (1, 2, 0, 64)
    assert lse.shape == (1, 2, 0)


def test_weights_sum_to_one_as_quantised(kernel):
    q, k, v = make_qkv(1, 1, 1, 40, 60, 64, torch.bfloat16, CPU)
    output, _ = run(kernel, call_of(q, k, torch.ones_like(v), kernel.precision))
    assert torch.equal(output, torch.ones_like(q))


def test_rounding_of_v_leaves_no_bias_in_the_mean():
    """Uniform attention gives the mean of V, which no rounding of V may shift (recipe: recenter_v)."""
    q, k, v = make_qkv(1, 1, 1, 40, 200, 64, torch.float32, CPU)
    output, _ = run(KERNELS[0], call_of(q, k, v, "int8", scale=0.0))
    mean = v.bfloat16().float().mean(2, keepdim=True)
    assert relative_l1(output, mean.expand_as(output)) < 1e-5


@pytest.mark.parametrize("lengths", [None, [130, 37]])
def test_operands_are_bit_by_bit_those_of_the_formats(kernel, lengths):
    q, k, v = make_qkv(2, 2, 1, 140, 150, 40, torch.bfloat16, CPU)
    lengths = None if lengths is None else torch.tensor(lengths, dtype=torch.int32)
    packed = kernel.prepare(call_of(q, k, v, kernel.precision, key_lengths=lengths)).operands
    counts = torch.tensor([150, 150]) if lengths is None else lengths
    q, k, v = (x.float() for x in (q, k, v))
    valid = (torch.arange(150) < counts[:, None])[:, None, :, None]

    def padded(x):
        return torch.nn.functional.pad(x, (0, 64 - 40, 0, -x.shape[2] % TOKEN_TILE)).flatten(0, 1)

    def mean(x):
        return ((x.double() * valid).sum(2, keepdim=True) / counts[:, None, None, None]).float()

    query = quantize_int8(padded(q), block=1)
    assert torch.equal(packed.query, query.codes)
    assert torch.equal(packed.query_scales, query.scales.flatten(1))
    key = quantize_int8(padded((k - mean(k)) * valid), block=TOKEN_TILE)
    assert packed.key_scales.flatten().allclose(key.scales.flatten(), rtol=1e-6)
    assert (packed.key - key.codes).abs().max() <= 1  # the mean in float32 depends on the order of its sum
    assert (packed.key != key.codes).float().mean() < 1e-3
    if kernel.precision == "int8_fp16":
        scaled = padded(v * valid * power_of_two_scale(v * valid))
        assert torch.equal(packed.value, scaled.half())
        return
    assert packed.value_mean[:, :40].allclose(mean(v).flatten(0, 2), atol=1e-7)
    value = quantize_fp8(padded((v - packed.value_mean.view(2, 1, 1, 64)[..., :40]) * valid), dim=-2)
    tokens = torch.arange(16)
    permuted = tokens // 2 % 2 * 8 + tokens // 4 * 2 + tokens % 2  # position -> token within 16
    codes = value.codes.view(torch.uint8).unflatten(1, (-1, 16))[:, :, permuted].flatten(1, 2).transpose(1, 2)
    assert torch.equal(packed.value.view(torch.uint8) & 0x7F, codes & 0x7F)  # zeros may differ in sign
    assert torch.equal(packed.value.float(), codes.view(torch.float8_e4m3fn).float())
    assert torch.equal(packed.value_scales, value.scales.flatten(1))
    assert torch.equal(packed.code_sums, (packed.value.float() * 512).sum(-1).long())


def test_a_call_takes_two_launches_to_prepare_and_one_to_run(kernel, monkeypatch):
    interpreter = import_module("triton.runtime.interpreter")
    launches = []
    launch = interpreter.GridExecutor.__call__

    def counted(self, *arguments, **options):
        launches.append(self.fn.__name__)
        return launch(self, *arguments, **options)

    monkeypatch.setattr(interpreter.GridExecutor, "__call__", counted)
    run(kernel, call_of(*make_qkv(1, 1, 1, 20, 20, 32, torch.bfloat16, CPU), kernel.precision))
    assert launches == ["gather_statistics", "quantize", "attend"]


@pytest.mark.parametrize("row_sum", ["unrounded", "ones"])
def test_other_row_sums_agree_with_the_reference(kernel, row_sum, monkeypatch):
    """As GPUs other than the interpreter's are given them (int8_configs.py)."""
    config = AttentionConfig(64, 64, 4, 1, row_sum=row_sum)
    monkeypatch.setattr("sage_kernels.kernels.int8_triton.find_config", lambda *_: config)
    q, k, v = make_qkv(1, 2, 1, 70, 100, 64, torch.bfloat16, CPU)
    check(kernel, q, k, v, is_causal=True)


def test_gradients_are_refused(kernel):
    q, k, v = make_qkv(1, 1, 1, 20, 20, 32, torch.bfloat16, CPU)
    assert kernel.refuse(call_of(q, k, v, kernel.precision), None) is None
    q.requires_grad_()
    assert "require gradients" in kernel.refuse(call_of(q, k, v, kernel.precision), None)
    with torch.no_grad():
        assert kernel.refuse(call_of(q, k, v, kernel.precision), None) is None
