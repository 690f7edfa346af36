"""What the INT8 kernel for sm_90a refuses, and that its forms fit the hardware."""

import pytest
import torch

from sage_kernels import reference
from sage_kernels.architectures import find_architecture
from sage_kernels.attention_call import make_call
from sage_kernels.int8_sm90_forms import FORMS
from sage_kernels.kernels.int8_sm90 import KERNEL
from sage_kernels.reference import attention_fp32, quantized_attention

HOPPER = find_architecture((9, 0))


def call_with(head_dim=64, mask=None, requires_grad=False, scale=None):
    q, k, v = (torch.zeros(1, 2, 5, head_dim, dtype=torch.bfloat16, requires_grad=requires_grad) for _ in range(3))
    return make_call(q, k, v, mask, False, scale, False, None, "BHND", "int8", False, False)


@pytest.mark.parametrize("head_dim", [8, 40, 64, 72, 80, 96, 104, 128])
def test_takes_head_dims_that_fit_its_tiles(head_dim):
    assert KERNEL.refuse(call_with(head_dim), HOPPER) is None


@pytest.mark.parametrize(
    ("call", "architecture", "words"),
    [
        (call_with(), None, "only sm_90a has"),
        (call_with(), find_architecture((8, 9)), "only sm_90a has"),
        (call_with(), find_architecture((12, 0)), "only sm_90a has"),
        (call_with(requires_grad=True), HOPPER, "trainable_attention"),
        (call_with(mask=torch.ones(5, 5, dtype=torch.bool)), HOPPER, "no mask tensor"),
        (call_with(head_dim=136), HOPPER, "head_dim 136"),
        (call_with(head_dim=33), HOPPER, "head_dim 33"),
    ],
)
def test_refuses_what_it_can_not_do(call, architecture, words):
    assert words in (KERNEL.refuse(call, architecture) or "")


@pytest.mark.parametrize("form", FORMS)
def test_forms_fit_into_a_thread_block(form):
    assert form.shared_bytes <= HOPPER.shared_memory
    assert 128 * (form.warpgroups + 1) <= 1024
    assert not form.pingpong or form.warpgroups == 2


def test_every_call_has_a_form_and_every_form_a_call():
    served = [
        next(form for form in FORMS if form.serves(head_dim, keys))
        for head_dim in (64, 128)
        for keys in (1, 16384, 10**6)
    ]
    assert {form.name for form in served} == {form.name for form in FORMS}
    assert all(FORMS[-1].serves(128, keys) for keys in (1, 10**6))


@pytest.mark.parametrize("head_dim", [64, 128])
def test_what_it_computes_is_accurate(head_dim):
    """On K with a bias that all tokens of a head share."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 4, length, head_dim, generator=generator) for length in (32, 1500, 1500))
    k += 2 * torch.randn(1, 4, 1, head_dim, generator=generator)
    call = make_call(*(x.bfloat16() for x in (q, k, v)), None, False, None, False, None, "BHND", "int8", False, False)
    output, _ = quantized_attention(call.query, call.key, call.value, KERNEL.recipe(call))
    exact, _ = attention_fp32(call.query, call.key, call.value)
    assert (output - exact).abs().sum() < 0.038 * exact.abs().sum()


def test_weights_of_the_line_are_within_six_percent_of_the_exponential():
    weights = reference._line_exp2_e4m3(torch.linspace(-5, 8.8, 1000))
    ratio = weights / torch.linspace(-5, 8.8, 1000).exp2()
    assert (ratio - 1).abs().max() < 0.03 + 1 / 16  # the line, and rounding to E4M3
    assert (ratio.mean() - 1).abs() < 2e-3
    assert reference._line_exp2_e4m3(torch.tensor([-40.0, -torch.inf])).tolist() == [0, 0]
