"""The Triton training kernels on a GPU, against the reference of trainable attention and against exact gradients."""

import multiprocessing
import os

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from sage_kernels.architectures import device_architecture
from sage_kernels.training import sm90_backend, trainable_attention, triton_backend
from sage_kernels.training.configs import find_config
from sage_kernels.training.refusals import refusal
from training_cases import exact, expected, make_tensors, relative_l1, run
from training_workers import call_once

pytest.importorskip("triton", reason="Triton is not installed")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.evidence("training"),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA GPU"),
]

CUDA = torch.device("cuda")
BF16, FP16 = torch.bfloat16, torch.float16
# Relative L1 to the reference: rounding to bfloat16 is 1.4e-3. Beyond it, codes at the edge of rounding fall to either
# side; FP8's steps are larger, and its tensor cores add up with 14 bits.
BOUND = {"int8": 5e-3, "fp8": 1.5e-2}
QUALITY = {"int8": 0.035, "fp8": 0.09}  # relative L1 to exact attention, for output and gradients
# Mean error. A code of K that fell to the other side moves the LSE of a row of few keys by 0.01; FP8 tensor cores add
# up scores, whose terms are ten times as large in all, with 14 bits.
LSE_BOUND = {"int8": 2e-4, "fp8": 3e-3}
KINDS = [  # few, because each takes compiling; Triton's interpreter runs more
    ("int8", False, 64, BF16),
    ("int8", True, 64, BF16),
    ("int8", False, 128, FP16),
    ("int8", True, 128, BF16),
    ("int8", True, 40, BF16),
    ("fp8", True, 128, BF16),
]
# Query heads, heads of K and V, queries, keys.
SHAPES = [(2, 2, 512, 512), (4, 2, 1000, 1000), (2, 1, 333, 777), (3, 3, 777, 333), (1, 1, 1, 300), (2, 2, 300, 1)]


@pytest.fixture(scope="module", autouse=True)
def compiled_ahead():
    """Compile on all cores what the tests would compile one after another."""
    if torch.cuda.is_available():
        calls = [(*kind, CUDA) for kind in KINDS]
        calls += [("int8", True, dim, BF16, CUDA, find_config(device_architecture(CUDA), dim)) for dim in (64, 128)]
        with multiprocessing.get_context("spawn").Pool(min(len(calls), os.cpu_count() or 1)) as pool:
            pool.starmap(call_once, calls, chunksize=1)


@pytest.fixture(autouse=True)
def full_float32_products():
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


def recipe_of(q, precision):
    block_d = triton_backend.padded_head_dim(q.shape[3])
    if triton_backend.in_cuda(q, precision):
        return sm90_backend.recipe()
    return find_config(device_architecture(CUDA), block_d).recipe(precision)


def check(within, tensors, precision, **options):
    head_dim = tensors[0].shape[3]
    reason = refusal(CUDA, head_dim, precision)
    if reason is not None:
        pytest.skip(reason)
    before = [x.clone() for x in tensors]
    results, lse = run(*tensors, precision=precision, **options)
    assert all(torch.equal(x, y) for x, y in zip(tensors, before, strict=True)), "an input was changed"
    recipe = recipe_of(tensors[0], precision)
    wanted, wanted_lse = expected(*tensors, recipe, **options)
    for x, y, z in zip(results, wanted, exact(*tensors, **options), strict=True):
        assert torch.isfinite(x).all(), "not finite, or never written"
        if float(z.abs().max()) > 1e-6:  # one key: dQ and dK are zero
            within(relative_l1(x, y), BOUND[precision])
            within(relative_l1(x, z), QUALITY[precision])
    within(float((lse - wanted_lse).abs().mean()), LSE_BOUND[precision])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_output_and_gradients_agree_with_the_reference(within, kind, shape):
    precision, is_causal, head_dim, dtype = kind
    heads, kv_heads, rows, keys = shape
    tensors = make_tensors(2, heads, kv_heads, rows, keys, head_dim, dtype, CUDA)
    check(within, tensors, precision, is_causal=is_causal)


@pytest.mark.parametrize("scale", [-0.1, 0.0, 0.3])
def test_scales_agree_with_the_reference(within, scale):
    check(within, make_tensors(1, 2, 2, 300, 300, 64, BF16, CUDA), "int8", is_causal=True, scale=scale)


@pytest.mark.parametrize("head_dim", [64, 128])
def test_tritons_gradients_agree_with_the_reference_too(within, head_dim):
    config = find_config(device_architecture(CUDA), head_dim)  # given, it means Triton
    tensors = make_tensors(2, 4, 2, 333, 500, head_dim, BF16, CUDA)
    found, _ = run(*tensors, is_causal=True, config=config)
    wanted, _ = expected(*tensors, config.recipe("int8"), is_causal=True)
    for x, y in zip(found, wanted, strict=True):
        within(relative_l1(x, y), BOUND["int8"])


@pytest.mark.parametrize("head_dim", [64, 128])
def test_long_sequences_agree_with_the_reference(head_dim, within):
    check(within, make_tensors(1, 1, 1, 8192, 8192, head_dim, BF16, CUDA), "int8", is_causal=True)


@pytest.mark.parametrize("head_dim", [64, 128])
def test_many_thread_blocks_agree_with_the_reference(head_dim, within):
    check(within, make_tensors(3, 6, 2, 1500, 1700, head_dim, BF16, CUDA), "int8", is_causal=True)


def test_outliers_leave_enough_integer_steps_for_query_gradients(within):
    """dQ is added up in steps that the largest V and K of the head determine."""
    q, k, v, d_output = make_tensors(1, 2, 2, 1000, 1000, 64, BF16, CUDA)
    v[:, :, 500] *= 30
    k[..., 7] *= 20
    d_output[:, :, 100] *= 1e4
    check(within, (q * 0.05, k, v, d_output * 1e-6), "int8", is_causal=True)


def test_overflow_in_float16_is_not_hidden(within):
    q, k, v, d_output = make_tensors(1, 1, 1, 200, 200, 64, FP16, CUDA)
    v[0, 0, 100] = 3e4
    d_output[0, 0, 50] = 3e4
    gradients = run(q, k, v, d_output)[0][1:]
    wanted = exact(q, k, v, d_output)[1:]
    hidden = [x.isfinite() & (y.abs() > 1e6) for x, y in zip(gradients, wanted, strict=True)]
    assert any(bool((y.abs() > 1e6).any()) for y in wanted), "nothing is too large for float16"
    within(sum(int(x.sum()) for x in hidden), 0.5)


@pytest.mark.parametrize("head_dim", [64, 128])
def test_results_are_bit_identical_from_run_to_run(head_dim, within):
    tensors = make_tensors(2, 4, 2, 3000, 3000, head_dim, BF16, CUDA)
    first, _ = run(*tensors, is_causal=True)
    again = [run(*tensors, is_causal=True)[0] for _ in range(20)]
    different = sum(not torch.equal(x, y) for results in again for x, y in zip(first, results, strict=True))
    within(different, 0.5)


@pytest.mark.parametrize("which", range(4))
def test_faults_of_the_inputs_are_not_hidden(which, within):
    tensors = make_tensors(1, 1, 1, 300, 300, 64, BF16, CUDA)
    tensors[which][0, 0, 70, 5] = torch.nan
    results, _ = run(*tensors)
    wanted = exact(*tensors)
    hidden = sum(int((x.isfinite() & ~y.isfinite()).sum()) for x, y in zip(results, wanted, strict=True))
    within(hidden, 0.5)


def test_the_public_function_differentiates_in_graphs_checkpoints_and_autocast(within):
    q, k, v, d_output = (x.requires_grad_() for x in make_tensors(1, 4, 2, 500, 500, 64, torch.float32, CUDA))

    def model(q, k, v):
        with torch.autocast("cuda", dtype=BF16):
            return trainable_attention(q, k, v, is_causal=True, enable_gqa=True)

    wanted = torch.autograd.grad(model(q, k, v), (q, k, v), d_output.detach().bfloat16())
    functions = [
        torch.compile(model, fullgraph=True, backend="aot_eager"),
        lambda *x: checkpoint(model, *x, use_reentrant=False),
    ]
    for function in functions:
        found = torch.autograd.grad(function(q, k, v), (q, k, v), d_output.detach().bfloat16())
        assert all(torch.equal(x, y) for x, y in zip(found, wanted, strict=True))
    exact_ones = exact(q.detach(), k.detach(), v.detach(), d_output.detach(), is_causal=True)[1:]
    for x, y in zip(wanted, exact_ones, strict=True):
        within(relative_l1(x, y), QUALITY["int8"])


def test_other_strides_give_the_same_bits(within):
    tensors = make_tensors(2, 2, 2, 200, 200, 64, BF16, CUDA)
    wanted, _ = run(*tensors)
    views = [
        [x.transpose(1, 2).contiguous().transpose(1, 2) for x in tensors],
        [torch.nn.functional.pad(x, (8, 8, 1, 1))[:, :, 1:-1, 8:-8] for x in tensors],
        [torch.nn.functional.pad(x, (4, 4))[..., 4:-4] for x in tensors],  # not as bulk copies need it
    ]
    different = sum(not torch.equal(x, y) for view in views for x, y in zip(run(*view)[0], wanted, strict=True))
    gradient = tensors[3][:, :, :1].expand_as(tensors[3])
    expanded, copied = (run(*tensors[:3], x)[0] for x in (gradient, gradient.contiguous()))
    different += sum(not torch.equal(x, y) for x, y in zip(expanded, copied, strict=True))
    within(different, 0.5)
