"""The Triton FP4 kernel without a GPU: its operands, its arithmetic in Triton's interpreter, its code for sm_100."""

import importlib
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sage_kernels.architectures import find_architecture
from sage_kernels.attention_call import make_call
from sage_kernels.dispatch import decide
from sage_kernels.formats import dequantize_nvfp4
from sage_kernels.kernels import nvfp4_triton
from sage_kernels.kernels.nvfp4_triton import RECIPE, NVFP4TritonKernel, quantize
from sage_kernels.recipes import SAGE_ATTENTION_3
from sage_kernels.reference import quantize_operands

SUPPORT = Path(__file__).parent / "support"
INTERPRETER_TRITON = (3, 9)  # the first whose interpreter knows every operation of the kernel

# The output's own rounding to fp16 is left, 1.8e-4 on average, and now and then a weight that the last bit of a score
# carries across a rounding boundary.
OUTPUT_BOUND = 3e-4
LSE_BOUND = 2e-4

CASES = {
    "plain": {"rows": 100, "keys": 77, "causal": False},
    "one token": {"rows": 1, "keys": 1, "causal": False},
    "several tiles": {"rows": 130, "keys": 300, "causal": False, "head_dim": 128},
    "causal, grouped heads": {"rows": 200, "keys": 130, "causal": True, "heads": 4, "kv_heads": 2},
    "causal, more keys": {"rows": 130, "keys": 257, "causal": True, "recipe": {"key_block": 64}},
    "means of 128 rows": {"rows": 200, "keys": 60, "causal": False, "recipe": {"smooth_q_rows": 128}},
    "rescaled at once": {"rows": 60, "keys": 300, "causal": False, "recipe": {"rescale_threshold": 0.0}},
    "negative scale": {"rows": 60, "keys": 60, "causal": False, "scale": -0.3},
    "not a number": {"rows": 130, "keys": 60, "causal": False, "nan_row": 40},
}


def require_triton(oldest=(0,)):
    triton = pytest.importorskip("triton", reason="Triton is not installed (published for Linux only)")
    if tuple(int(part) for part in triton.__version__.split(".")[:2]) < oldest:
        pytest.skip(f"needs Triton {'.'.join(map(str, oldest))} or newer, found {triton.__version__}")


def call_of(rows=40, keys=50, head_dim=64, dtype=torch.bfloat16, **options):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, n, head_dim, generator=generator).to(dtype) + 1 for n in (rows, keys, keys))
    options = {"is_causal": False, "attn_mask": None, "key_lengths": None, "precision": "fp4", **options}
    mask, causal, lengths = options["attn_mask"], options["is_causal"], options["key_lengths"]
    return make_call(q, k, v, mask, causal, None, True, lengths, "BHND", options["precision"], True, False)


@pytest.fixture(scope="module")
def interpreted() -> dict[str, dict[str, float]]:
    """Errors of every case, from one run of the interpreter."""
    require_triton(INTERPRETER_TRITON)
    cases = [{"heads": 1, "kv_heads": 1, "head_dim": 64, **case} for case in CASES.values()]
    command = [sys.executable, str(SUPPORT / "interpret_nvfp4_triton.py"), json.dumps(cases)]
    environ = {**os.environ, "TRITON_INTERPRET": "1"}
    result = subprocess.run(command, env=environ, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return dict(zip((*CASES, "weights"), map(json.loads, result.stdout.splitlines()), strict=True))


@pytest.mark.parametrize("case", CASES)
def test_interpreted_kernel_is_the_quantised_reference(interpreted, case):
    assert interpreted[case]["relative_l1"] < OUTPUT_BOUND
    assert interpreted[case]["lse"] < LSE_BOUND
    assert interpreted[case]["nan"] == 0


def test_interpreted_weights_round_as_the_format_does(interpreted):
    assert interpreted["weights"] == {"codes": 0, "scales": 0, "sums": 0}


@pytest.mark.parametrize(("capability", "head_dim", "causal"), [(100, 64, False), (100, 128, True), (103, 128, False)])
def test_code_for_sm_100_multiplies_with_block_scaled_tcgen05(capability, head_dim, causal):
    require_triton(nvfp4_triton.OLDEST_TRITON)
    ptx = importlib.import_module("compile_nvfp4_triton").attention_ptx(capability, head_dim, causal)
    assert f".target sm_{capability}a" in ptx
    products = [line for line in ptx.splitlines() if "tcgen05.mma" in line]
    assert products
    assert all("kind::mxf4nvf4.block_scale.block16" in line for line in products)
    assert "mma.sync" not in ptx
    assert "wgmma" not in ptx


@pytest.mark.parametrize(("rows", "keys", "head_dim"), [(1, 1, 64), (45, 77, 64), (200, 130, 128)])
@pytest.mark.parametrize("smooth_q_rows", [32, 128])
def test_operands_are_those_of_the_reference(rows, keys, head_dim, smooth_q_rows):
    recipe = replace(RECIPE, smooth_q_rows=smooth_q_rows)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, h, n, head_dim, generator=generator) for h, n in ((4, rows), (2, keys), (2, keys)))
    ours, expected = quantize(q, k, v, recipe), quantize_operands(q, k, v, recipe)
    query_factors = ours.query_factors.repeat_interleave(smooth_q_rows, dim=2)[:, :, :rows, None]
    blocks = expected.query_means.shape[2]
    means = dequantize_nvfp4(ours.means) * ours.query_factors[..., None]
    key_factors, value_factors = ours.key_factors[..., None, None], ours.value_factors[..., None, None]
    both = dequantize_nvfp4(ours.key) + dequantize_nvfp4(ours.residual)
    padded = expected.key.shape[2]
    assert torch.equal(dequantize_nvfp4(ours.query)[:, :, :rows] * query_factors, expected.query)
    assert torch.equal(means[:, :, :blocks], expected.query_means)
    assert torch.equal(dequantize_nvfp4(ours.key)[:, :, :padded] * key_factors, expected.key)
    assert torch.equal(both[:, :, :padded] * key_factors, expected.smooth_key)
    assert torch.equal((dequantize_nvfp4(ours.value) * value_factors).mT[:, :, :padded], expected.value)
    assert not dequantize_nvfp4(ours.key)[:, :, padded:].any()
    assert not dequantize_nvfp4(ours.value)[..., padded:].any()
    assert torch.equal(ours.lse_shifts, expected.lse_shift)
    assert torch.equal(ours.value_means[:, :, None], expected.value_mean)


@pytest.mark.parametrize("capability", [(9, 0), (12, 0), (8, 9)])
def test_other_gpus_are_refused(capability):
    reason = NVFP4TritonKernel().refuse(call_of(), find_architecture(capability))
    assert "compiled for sm_100a and sm_103a" in reason


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"precision": "auto"}, "never run"),
        ({"attn_mask": torch.ones(40, 50, dtype=torch.bool)}, "no attn_mask"),
        ({"key_lengths": torch.tensor([3], dtype=torch.int32)}, "no key_lengths"),
        ({"head_dim": 96}, "head_dim must be 64 or 128, got 96"),
    ],
)
def test_what_it_can_not_do_is_refused(options, reason):
    assert reason in NVFP4TritonKernel().refuse(call_of(**options), find_architecture((10, 0)))


def test_gradients_are_refused():
    call = call_of()
    call.query.requires_grad_()
    assert "gradients" in NVFP4TritonKernel().refuse(call, find_architecture((10, 0)))


@pytest.mark.parametrize(
    ("installed", "reason"), [("3.8.1", "needs Triton 3.9 or newer, found 3.8.1"), ("3.9.0", None), ("3.10.0", None)]
)
def test_old_triton_is_refused(monkeypatch, installed, reason):
    monkeypatch.setattr(nvfp4_triton, "version", lambda name: installed)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: True)
    found = NVFP4TritonKernel().refuse(call_of(), find_architecture((10, 3)))
    assert found == reason if reason is None else reason in found


def test_missing_triton_is_refused(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "Triton is not installed" in NVFP4TritonKernel().refuse(call_of(), find_architecture((10, 0)))


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        (SAGE_ATTENTION_3, "quantized_delta"),
        (replace(RECIPE, qk="mxfp8"), "computes NVFP4"),
        (replace(RECIPE, linear_exp_of_8=3), "linear_exp_of_8"),
        (replace(RECIPE, key_block=32), "key_block 64 or 128"),
        (replace(RECIPE, smooth_q_rows=48), "divide 128"),
    ],
)
def test_other_recipes_are_errors(recipe, message):
    with pytest.raises(ValueError, match=message):
        NVFP4TritonKernel(recipe)


def test_the_router_never_chooses_it_without_its_gpu():
    assert decide(call_of(), [NVFP4TritonKernel()]).kernel is None
