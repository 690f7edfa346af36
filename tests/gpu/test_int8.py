"""The Triton INT8 kernels on a GPU, against the quantised reference; the one for sm_90a has tests of its own."""

import pytest
import torch

import sage_kernels
from int8_cases import call_of, compare, make_options, make_qkv, make_view, relative_l1, run
from int8_workers import call_once
from sage_kernels.architectures import device_architecture
from sage_kernels.kernels.int8_triton import KERNELS
from sage_kernels.reference import quantized_attention
from steady_calls import LARGEST_GROWTH, growth, time_windows

pytest.importorskip("triton", reason="Triton is not installed")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.evidence("int8"),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA GPU"),
]

CUDA = torch.device("cuda")
# Relative L1 to the quantised reference: the output's rounding to bfloat16 is 1.4e-3, to float16 1.8e-4. Beyond it,
# sums in another order and the special-function unit's last bits carry one weight in hundreds across a rounding
# boundary, and FP8 tensor cores add up with 14 bits.
BOUND = {torch.bfloat16: 4e-3, torch.float16: 3.5e-3, torch.float32: 3.5e-3}
LSE_BOUND = 3e-3
QUALITY = {"int8": 0.05, "int8_fp16": 0.02}  # relative L1 to exact attention, as INT8 and E4M3 have it on such data
LENGTHS = [(1, 1), (129, 129), (1000, 1000), (1, 1000), (257, 512), (300, 1)]
# Few, because each is compiled: test_int8_fuzz.py has the other kinds.
GRID = [("plain", 64), ("bool", 64), *((kind, 128) for kind in ("plain", "causal", "additive", "lengths_causal"))]
DIMS = [40, 256]
DTYPES = [("causal", torch.float16), ("plain", torch.float32)]
VIEWS = ["transposed", "sliced", "head_dim_strided", "expanded", "BNHD"]
CALLS = [(*call, torch.bfloat16, "contiguous", *size) for call in GRID for size in LENGTHS]
CALLS += [(kind, 128, dtype, "contiguous", 500, 500) for kind, dtype in DTYPES]
CALLS += [("plain", head_dim, torch.bfloat16, "contiguous", 200, 333) for head_dim in DIMS]
CALLS += [(kind, 64, torch.bfloat16, "contiguous", 300, 300) for kind in ("causal", "additive")]
CALLS += [("plain", 64, torch.bfloat16, view, 150, 150) for view in VIEWS[:3]]


@pytest.fixture(scope="module", autouse=True)
def compiled_ahead(workers):
    """Compile on all cores what the tests would compile one after another."""
    workers.starmap(call_once, [(index, CUDA, *call) for call in CALLS for index in range(len(KERNELS))], chunksize=1)


@pytest.fixture(params=KERNELS, ids=lambda kernel: kernel.precision)
def kernel(request):
    reason = request.param.refuse(
        call_of(*make_qkv(1, 1, 1, 1, 1, 64, torch.bfloat16, CUDA), request.param.precision), device_architecture(CUDA)
    )
    if reason is not None:
        pytest.skip(reason)
    return request.param


@pytest.fixture(autouse=True)
def full_float32_products():
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


@pytest.fixture
def check(kernel, within):
    def check(q, k, v, **options):
        output, error, exact_error, lse_error = compare(kernel, q, k, v, **options)
        within(error, BOUND[q.dtype])
        within(lse_error, LSE_BOUND)
        within(exact_error, QUALITY[kernel.precision])
        return output

    return check


@pytest.mark.parametrize(("rows", "keys"), LENGTHS)
@pytest.mark.parametrize(("kind", "head_dim"), GRID)
def test_every_kind_of_call_agrees_with_the_reference(check, kind, head_dim, rows, keys):
    batch, heads, kv_heads = (4, 2, 1) if kind.startswith("lengths") else (2, 4, 2)
    q, k, v = make_qkv(batch, heads, kv_heads, rows, keys, head_dim, torch.bfloat16, CUDA)
    check(q, k, v, **make_options(kind, batch, heads, rows, keys, CUDA))


@pytest.mark.parametrize(("kind", "dtype"), DTYPES)
def test_other_dtypes_agree_with_the_reference(check, kind, dtype):
    check(*make_qkv(1, 3, 3, 500, 500, 128, dtype, CUDA), is_causal=kind == "causal")


@pytest.mark.parametrize("head_dim", DIMS)
def test_other_head_dims_agree_with_the_reference(check, head_dim):
    check(*make_qkv(1, 3, 3, 200, 333, head_dim, torch.bfloat16, CUDA))


@pytest.mark.parametrize("is_causal", [False, True])
def test_image_sized_sequences_agree(check, is_causal):
    check(*make_qkv(1, 3, 3, 4608, 4608, 128, torch.bfloat16, CUDA), is_causal=is_causal)


@pytest.mark.parametrize("size", [1e-4, 1e-2, 100.0, 1e4])
def test_tensors_of_any_size_are_as_accurate(check, size):
    check(*make_qkv(1, 2, 2, 300, 300, 128, torch.bfloat16, CUDA, size=size), scale=128**-0.5 / size**2)


@pytest.mark.parametrize("scale", [-0.1, 0.0, 0.2])
def test_softmax_scale_is_honoured(check, scale):
    check(*make_qkv(1, 2, 2, 300, 300, 64, torch.bfloat16, CUDA), scale=scale)


@pytest.mark.parametrize("size", [1e2, 1e4, 1e5])
@pytest.mark.parametrize("kind", ["plain", "causal", "bool", "additive"])
def test_attention_to_one_key_agrees(kernel, within, kind, size):
    """Scores so large that a product of them is off by whole powers of two."""
    q, k, v = make_qkv(1, 2, 2, 300, 300, 64, torch.bfloat16, CUDA)
    q, k = q * size, k * size
    options = make_options(kind, 1, 2, 300, 300, CUDA)
    call = call_of(q, k, v, kernel.precision, **options)
    output, lse = run(kernel, call)
    expected, expected_lse = quantized_attention(q, k, v, kernel.recipe(call), **options)
    assert torch.isfinite(output).all()
    assert torch.equal(lse == -torch.inf, expected_lse == -torch.inf)
    # Scores of two tiles that are nearly one: either may win the row where scores are rounded.
    agree = ((output.float() - expected).abs().amax(-1) < 0.1).float().mean().item()
    within(1 - agree, 0.01)
    finite = torch.isfinite(expected_lse)
    within(((lse - expected_lse).abs() / expected_lse.abs())[finite].max().item(), 1e-5)


@pytest.mark.parametrize("view", VIEWS)
def test_any_strides_give_the_same_result(kernel, check, view):
    q, k, v = make_qkv(2, 4, 4, 150, 150, 64, torch.bfloat16, CUDA)
    q, k, v = make_view(view, q, k, v)
    expected = check(q.contiguous(), k.contiguous(), v.contiguous())
    layout = "BHND"
    if view == "BNHD":
        layout, (q, k, v) = "BNHD", (x.transpose(1, 2) for x in (q, k, v))
    output, _ = run(kernel, call_of(q, k, v, kernel.precision, layout=layout))
    assert torch.equal(output, expected)


@pytest.mark.parametrize("which", range(3))
@pytest.mark.parametrize("place", [torch.nan, torch.inf])
def test_non_finite_inputs_are_not_hidden(kernel, which, place):
    tensors = make_qkv(1, 1, 1, 200, 200, 64, torch.bfloat16, CUDA)
    tensors[which][0, 0, 70, 5] = place
    output, _ = run(kernel, call_of(*tensors, kernel.precision))
    assert not torch.isfinite(output).all()


def test_graph_replay_follows_new_data(kernel):
    tensors = make_qkv(1, 2, 2, 500, 700, 128, torch.bfloat16, CUDA)
    run(kernel, call_of(*tensors, kernel.precision))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output, lse = kernel.run(kernel.prepare(call_of(*tensors, kernel.precision)))
    for seed in (5, 6):
        fresh = make_qkv(1, 2, 2, 500, 700, 128, torch.bfloat16, CUDA, seed=seed)
        for old, new in zip(tensors, fresh, strict=True):
            old.copy_(new)
        graph.replay()
        torch.cuda.synchronize()
        expected, expected_lse = run(kernel, call_of(*fresh, kernel.precision))
        assert torch.equal(output, expected)
        assert torch.equal(lse, expected_lse)


@pytest.mark.parametrize("precision", ["int8", "int8_fp16"])
def test_compiled_models_give_the_same_result(precision):
    q, k, v = make_qkv(1, 4, 2, 300, 400, 128, torch.bfloat16, CUDA)

    def layer(q, k, v):
        return sage_kernels.attention(q * 2, k, v, precision=precision, enable_gqa=True) + 1

    output = torch.compile(layer, fullgraph=True, backend="aot_eager")(q, k, v)
    assert relative_l1(output, layer(q, k, v).float()) < 1e-3


@pytest.fixture(params=["int8", "int8_fp16", "int8_triton"])
def steady_call(request):
    """attention() of a rung, and the kernel that a GPU without one of its own gets for it."""
    q, k, v = make_qkv(1, 2, 2, 256, 256, 64, torch.bfloat16, CUDA)
    if request.param == "int8_triton":
        kernel, call = KERNELS[0], call_of(q, k, v, "int8", return_lse=False)
        return lambda: kernel.run(kernel.prepare(call))[0]
    return lambda: sage_kernels.attention(q, k, v, precision=request.param)


def test_ten_thousand_calls_neither_fail_nor_slow_down_nor_keep_memory(steady_call, within):
    _, expected = time_windows(steady_call, 400)  # warms up
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    seconds, late = time_windows(steady_call, 10_000)
    assert torch.equal(late, expected)
    assert torch.cuda.memory_allocated() <= before + late.nbytes
    within(growth(seconds), LARGEST_GROWTH)


def test_a_slowdown_of_the_calls_would_be_seen(steady_call):
    """The check above on calls that search through all that came before them."""
    seen = []

    def call():
        seen.append(None)
        return steady_call(), [seen.count(0) for _ in range(5)]

    time_windows(steady_call, 400)
    assert growth(time_windows(call, 4_000)[0]) > LARGEST_GROWTH


@pytest.mark.parametrize("precision", ["int8", "int8_fp16"])
def test_launches_on_the_device_of_the_tensors(precision):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    q, k, v = make_qkv(1, 2, 2, 256, 256, 64, torch.bfloat16, CUDA)
    expected = sage_kernels.attention(q, k, v, precision=precision)
    output = sage_kernels.attention(*(x.to("cuda:1") for x in (q, k, v)), precision=precision)
    assert torch.equal(output.cpu(), expected.cpu())


def test_operands_take_little_memory(kernel):
    """Codes are 1 byte in place of 2 (FP16 values 2); there is nothing else of the size of the inputs."""
    q, k, v = make_qkv(1, 4, 4, 16384, 16384, 128, torch.bfloat16, CUDA)
    call = call_of(q, k, v, kernel.precision, return_lse=False)
    kernel.run(kernel.prepare(call))
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    output, _ = kernel.run(kernel.prepare(call))
    extra = torch.cuda.max_memory_allocated() - before - output.nbytes
    inputs = 3 * q.nbytes
    assert extra < (0.56 if kernel.precision == "int8" else 0.72) * inputs
