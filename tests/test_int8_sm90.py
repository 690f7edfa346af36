"""What the INT8 kernel for sm_90a refuses, and that its forms fit the hardware."""

import pytest
import torch

from sage_kernels.architectures import find_architecture
from sage_kernels.attention_call import make_call
from sage_kernels.int8_sm90_forms import FORMS
from sage_kernels.kernels.int8_sm90 import KERNEL

HOPPER = find_architecture((9, 0))


def call_with(head_dim=64, mask=None, requires_grad=False):
    q, k, v = (torch.zeros(1, 2, 5, head_dim, dtype=torch.bfloat16, requires_grad=requires_grad) for _ in range(3))
    return make_call(q, k, v, mask, False, None, False, None, "BHND", "int8", False, False)


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
