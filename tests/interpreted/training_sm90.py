"""The CUDA training kernels for sm_90a on the CPU, behind Triton's interpreter, against the reference.

Run by tests/test_training_sm90.py, with TRITON_INTERPRET=1.
"""

import pytest
import torch

from sage_kernels.architectures import find_architecture
from sage_kernels.driver import TENSOR_MAP
from sage_kernels.kernel_variants import TRAINING_SM90_ENTRIES, training_sm90_variant
from sage_kernels.training import sm90_backend
from sage_kernels.training.configs import find_config
from sm90_on_host import HostKernel
from training_cases import exact, expected, make_tensors, relative_l1, run
from triton_interpreter import multiply_bfloat16, round_as_gpus_do

BOUND = 3e-3  # relative L1 to the reference, as for Triton's kernels
LSE_BOUND = 2e-4
QUALITY = 0.035  # to exact attention


@pytest.fixture(scope="session")
def kernels(tmp_path_factory):
    """Compiled once."""
    folder, loaded = tmp_path_factory.mktemp("kernels"), {}

    def load(block_d, dtype, device):
        if (block_d, dtype) not in loaded:
            variants = (
                training_sm90_variant(entry, block_d, dtype == torch.bfloat16) for entry in TRAINING_SM90_ENTRIES
            )
            loaded[block_d, dtype] = tuple(HostKernel(variant, folder) for variant in variants)
        return loaded[block_d, dtype]

    return load


def tensor_map(x):
    """What tests/kernels/sm90_on_host.h copies by: address, sizes and strides, the fastest axis first."""
    strides = [2 * stride for stride in x.stride()]
    return TENSOR_MAP(x.data_ptr(), *x.shape[::-1], *strides[2::-1])


@pytest.fixture(autouse=True)
def as_on_gpus(monkeypatch, kernels):
    round_as_gpus_do(monkeypatch)
    multiply_bfloat16(monkeypatch)
    monkeypatch.setattr(sm90_backend, "_load", kernels)
    monkeypatch.setattr(sm90_backend, "_tensor_map", tensor_map)
    monkeypatch.setattr(sm90_backend, "serves", lambda *call: True)


@pytest.mark.parametrize(
    ("heads", "rows", "keys", "head_dim", "is_causal", "scale"),
    [
        ((2, 1), 150, 300, 128, True, None),
        ((1, 1), 70, 60, 104, False, -0.1),
        ((1, 1), 1, 130, 40, False, None),
        ((1, 1), 130, 1, 64, True, None),
    ],
)
def test_kernels_agree_with_the_reference(heads, rows, keys, head_dim, is_causal, scale):
    tensors = make_tensors(1, *heads, rows, keys, head_dim, torch.bfloat16)  # GPUs also test float16
    results, lse = run(*tensors, is_causal=is_causal, scale=scale)
    recipe = find_config(find_architecture((9, 0)), 64 if head_dim <= 64 else 128).recipe("int8")
    wanted, wanted_lse = expected(*tensors, recipe, is_causal=is_causal, scale=scale)
    for x, y, z in zip(results, wanted, exact(*tensors, is_causal=is_causal, scale=scale), strict=True):
        assert torch.isfinite(x).all(), "not finite, or never written"
        if float(z.abs().max()) > 1e-6:  # one key: dQ and dK are zero
            assert relative_l1(x, y) < BOUND
            assert relative_l1(x, z) < QUALITY
    assert float((lse - wanted_lse).abs().mean()) <= LSE_BOUND


@pytest.mark.parametrize("which", [0, 2])
def test_faults_of_the_inputs_are_not_hidden(which):
    tensors = make_tensors(1, 1, 1, 70, 60, 64, torch.bfloat16)
    tensors[which][0, 0, 50, 5] = torch.nan
    results, _ = run(*tensors)
    for x, y in zip(results, exact(*tensors), strict=True):
        assert not (x.isfinite() & ~y.isfinite()).any()
