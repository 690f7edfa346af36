"""The Triton FP4 kernel on any CUDA GPU that Triton knows, as the second implementation: its products run in 16 bit.

In 16 bit the quantised operands are exact, so that the kernel must give what the quantised reference gives.
"""

import itertools
from dataclasses import replace

import pytest
import torch

from sage_kernels.attention_call import make_call
from sage_kernels.recipes import RECIPES
from sage_kernels.reference import attention_fp32, quantized_attention

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.evidence("nvfp4"),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA GPU"),
]
triton = pytest.importorskip("triton", reason="Triton is not installed")
from sage_kernels.kernels.nvfp4_triton import RECIPE, NVFP4TritonKernel  # noqa: E402 after the skip
from warm_nvfp4_triton import warm  # noqa: E402

# Relative L1 against the quantised reference: the output's own rounding, 2^-10.5 on average for bf16 and 2^-13.5 for
# fp16, and weights that the last bits of a score or an exponential carry across a rounding boundary.
BOUND = {torch.bfloat16: 2.5e-3, torch.float16: 1.5e-3}
LSE_BOUND = 1e-3
QUALITY = 0.25  # against exact attention on normally distributed data
LENGTHS = [(1, 1), (63, 64), (100, 77), (128, 128), (129, 1000), (1000, 129), (1000, 1000)]
FORMS = [(64, False, "bfloat16"), (64, True, "bfloat16"), (128, False, "bfloat16"), (128, True, "bfloat16")]
FORMS += [(64, False, "float16")]
CHANGES = [{"key_block": 64}, {"smooth_q_rows": 128}, {"smooth_q_rows": 16}, {"rescale_threshold": 0.0}]
DOT_SCALED_ON_HOPPER = (3, 8)  # older Tritons can't lower products with E4M3 scales for sm_90


@pytest.fixture(scope="module", autouse=True)
def compiled():
    """Every form that the tests launch, compiled beforehand: one after the other they would take minutes."""
    forms = [{"head_dim": dim, "is_causal": causal, "dtype": dtype} for dim, causal, dtype in FORMS]
    warm(forms + [{**forms[0], "recipe": change} for change in CHANGES])


@pytest.fixture(autouse=True)
def full_float32_products():
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


def relative_l1(output, expected):
    return ((output.float() - expected.float()).abs().sum() / expected.float().abs().sum()).item()


def make(rows, keys, head_dim, dtype, heads=4, kv_heads=2, is_causal=False, size=1.0, scale=None):
    """A call on tokens that share a bias, as diffusion models have them."""
    generator = torch.Generator(device="cuda").manual_seed(rows + keys)

    def tensor(count, length):
        x = torch.randn(2, count, length, head_dim, generator=generator, device="cuda")
        bias = torch.randn(2, count, 1, head_dim, generator=generator, device="cuda")
        return ((x + 0.7 * bias) * size).to(dtype)

    q, k, v = tensor(heads, rows), tensor(kv_heads, keys), tensor(kv_heads, keys)
    return make_call(q, k, v, None, is_causal, scale, True, None, "BHND", "fp4", True, False)


def reference(call, recipe=RECIPE):
    return quantized_attention(call.query, call.key, call.value, recipe, is_causal=call.is_causal, scale=call.scale)


def check(within, call, recipe=RECIPE, dot_scaled=False):
    kernel = NVFP4TritonKernel(recipe, dot_scaled)
    before = [x.clone() for x in (call.query, call.key, call.value)]
    output, lse = kernel.run(kernel.prepare(call))
    assert all(map(torch.equal, (call.query, call.key, call.value), before))
    expected, expected_lse = reference(call, recipe)
    assert output.dtype == call.query.dtype
    within((lse - expected_lse).abs().mean().item(), LSE_BOUND)
    within(relative_l1(output, expected), BOUND[call.query.dtype])
    return output


@pytest.mark.parametrize(("rows", "keys"), LENGTHS)
@pytest.mark.parametrize(("head_dim", "is_causal", "dtype"), FORMS)
def test_kernel_is_the_quantised_reference(within, rows, keys, head_dim, is_causal, dtype):
    call = make(rows, keys, head_dim, getattr(torch, dtype), is_causal=is_causal)
    output = check(within, call)
    exact, _ = attention_fp32(call.query, call.key, call.value, is_causal=is_causal)
    within(relative_l1(output, exact), QUALITY)


@pytest.mark.parametrize("change", CHANGES, ids=str)
def test_every_recipe_it_takes_is_that_of_the_reference(within, change):
    check(within, make(300, 500, 64, torch.bfloat16), replace(RECIPE, **change))


@pytest.mark.parametrize(("heads", "kv_heads"), [(6, 6), (6, 2), (6, 1)])
def test_grouped_heads(within, heads, kv_heads):
    check(within, make(200, 300, 64, torch.float16, heads=heads, kv_heads=kv_heads))


@pytest.mark.parametrize("size", [1e-3, 100.0])
def test_tensors_of_any_size(within, size):
    check(within, make(200, 300, 64, torch.bfloat16, size=size, scale=0.1 / size**2))


def test_a_negative_scale(within):
    check(within, make(200, 300, 64, torch.bfloat16, scale=-0.2))


def test_dot_scaled_is_the_quantised_reference(within):
    found = tuple(int(part) for part in triton.__version__.split(".")[:2])
    if torch.cuda.get_device_capability()[0] < 10 and found < DOT_SCALED_ON_HOPPER:
        pytest.skip(f"Triton {triton.__version__} can't lower products with E4M3 scales for this GPU; 3.8 can")
    for head_dim, is_causal in itertools.product([64, 128], [False, True]):
        check(within, make(300, 500, head_dim, torch.bfloat16, is_causal=is_causal), dot_scaled=True)


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("is_causal", [False, True], ids=["plain", "causal"])
def test_both_implementations_differ_by_what_their_recipes_differ(within, head_dim, is_causal):
    """The CUDA kernel takes 32 keys a step and a line for some exponentials; nothing else may set the two apart."""
    from sage_kernels.kernels.nvfp4_cuda import NVFP4CudaKernel  # noqa: PLC0415 the rest needs no CUDA compiler

    call = make(500, 700, head_dim, torch.bfloat16, is_causal=is_causal)
    kernels = [
        NVFP4CudaKernel(emulate_instructions=torch.cuda.get_device_capability()[0] != 12),
        NVFP4TritonKernel(dot_scaled=False),
    ]
    outputs = [kernel.run(kernel.prepare(call))[0] for kernel in kernels]
    expected = relative_l1(reference(call, RECIPES["fp4"])[0], reference(call)[0])
    assert expected < QUALITY / 2
    within(relative_l1(*outputs), expected + 2 * BOUND[torch.bfloat16])
