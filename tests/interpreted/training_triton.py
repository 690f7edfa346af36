"""The Triton training kernels in Triton's interpreter, against the reference of trainable attention.

Run by tests/test_training_triton.py, with TRITON_INTERPRET=1.
"""

import pytest
import torch

from sage_kernels.training import triton_backend
from sage_kernels.training.configs import BlockConfig, TrainingConfig, find_config
from training_cases import exact, expected, make_tensors, relative_l1, run
from triton_interpreter import multiply_bfloat16, round_as_gpus_do

# Relative L1 to the reference: rounding to bfloat16 is 1.4e-3, and codes at the edge of rounding fall to either side.
BOUND = 3e-3
LSE_BOUND = 2e-4  # mean error; a code of K that fell to the other side moves the LSE of a row of few keys by 0.01
QUALITY = {"int8": 0.035, "fp8": 0.08}  # relative L1 to exact attention


@pytest.fixture(autouse=True)
def as_on_gpus(monkeypatch):
    round_as_gpus_do(monkeypatch)
    multiply_bfloat16(monkeypatch)


def check(tensors, precision="int8", config=None, **options):
    results, lse = run(*tensors, precision=precision, config=config, **options)
    recipe = (config or find_config(None, triton_backend.padded_head_dim(tensors[0].shape[3]))).recipe(precision)
    wanted, wanted_lse = expected(*tensors, recipe, **options)
    for x, y, z in zip(results, wanted, exact(*tensors, **options), strict=True):
        assert torch.isfinite(x).all(), "not finite, or never written"
        if float(z.abs().max()) > 1e-6:  # one key: dQ and dK are zero
            assert relative_l1(x, y) < BOUND
            assert relative_l1(x, z) < QUALITY[precision]
    assert float((lse - wanted_lse).abs().sum()) <= LSE_BOUND * lse.numel()
    return results


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("precision", ["int8", "fp8"])
def test_output_and_gradients_agree_with_the_reference(precision, is_causal):
    check(make_tensors(1, 2, 1, 70, 150, 64, torch.bfloat16), precision, is_causal=is_causal)


@pytest.mark.parametrize(("rows", "keys"), [(1, 1), (1, 200), (129, 130), (150, 2)])
@pytest.mark.parametrize("is_causal", [False, True])
def test_every_length_agrees_with_the_reference(rows, keys, is_causal):
    check(make_tensors(1, 1, 1, rows, keys, 32, torch.float16), is_causal=is_causal)


@pytest.mark.parametrize("head_dim", [1, 40, 128])
def test_every_head_dim_agrees_with_the_reference(head_dim):
    check(make_tensors(1, 1, 1, 70, 60, head_dim, torch.bfloat16), is_causal=True)


@pytest.mark.parametrize("scale", [-0.1, 0.0, 0.2])
def test_scales_agree_with_the_reference(scale):
    check(make_tensors(1, 1, 1, 60, 90, 64, torch.bfloat16), scale=scale, is_causal=True)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("split", [False, True])
def test_other_blocks_are_those_of_their_recipe(split, is_causal):
    blocks = (BlockConfig(64, 128, 4, 1), BlockConfig(32, 128, 4, 1), BlockConfig(128, 128, 4, 1))
    check(
        make_tensors(1, 1, 1, 150, 140, 40, torch.bfloat16),
        config=TrainingConfig(*blocks, split),
        is_causal=is_causal,
    )


@pytest.mark.parametrize("size", [1e-3, 1e3])
def test_tensors_of_any_size_are_as_accurate(size):
    check(make_tensors(1, 1, 1, 60, 90, 64, torch.bfloat16, size=size), scale=0.125 / size**2)


@pytest.mark.parametrize("view", ["transposed", "sliced", "head_dim_strided"])
def test_any_strides_give_the_same_result(view):
    tensors = make_tensors(1, 2, 2, 50, 60, 64, torch.bfloat16)
    wanted = check(tensors)
    if view == "transposed":
        tensors = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in tensors]
    elif view == "sliced":
        tensors = [torch.nn.functional.pad(x, (3, 2, 1, 1))[:, :, 1:-1, 3:-2] for x in tensors]
    else:
        tensors = [x.transpose(2, 3).contiguous().transpose(2, 3) for x in tensors]
    assert all(torch.equal(x, y) for x, y in zip(run(*tensors)[0], wanted, strict=True))


@pytest.mark.parametrize("which", range(4))
@pytest.mark.parametrize("fault", [torch.nan, torch.inf])
def test_faults_of_the_inputs_are_not_hidden(which, fault):
    tensors = make_tensors(1, 1, 1, 70, 60, 64, torch.bfloat16)
    tensors[which][0, 0, 50, 5] = fault
    results, _ = run(*tensors)
    for x, y in zip(results, exact(*tensors), strict=True):
        assert not (x.isfinite() & ~y.isfinite()).any()


def test_no_query_rows_give_empty_results():
    q, k, v, d_output = make_tensors(1, 2, 1, 0, 60, 64, torch.bfloat16)
    (output, d_query, d_key, d_value), _ = run(q, k, v, d_output)
    assert output.shape == d_query.shape == q.shape
    assert not d_key.any()
    assert not d_value.any()
