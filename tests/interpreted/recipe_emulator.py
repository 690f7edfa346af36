"""The quantised reference's inner loop as a Triton kernel, in Triton's interpreter, against the reference itself.

Run by tests/test_training_study.py, with TRITON_INTERPRET=1.
"""

import sys
from pathlib import Path

import pytest
import torch

from sage_kernels.recipes import RECIPES, SAGE_ATTENTION_3_PUBLISHED
from sage_kernels.reference import quantize_operands, quantized_attention
from triton_interpreter import multiply_bfloat16, round_as_gpus_do

sys.path.append(str(Path(__file__).resolve().parents[2] / "sage_kernels" / "benchmarks"))
from recipe_emulator import emulate

BOUND = 2e-3  # relative L1: sums in another order carry some weights across a rounding boundary


@pytest.fixture(autouse=True)
def as_on_gpus(monkeypatch):
    round_as_gpus_do(monkeypatch)
    multiply_bfloat16(monkeypatch)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("recipe", [RECIPES["fp4"], SAGE_ATTENTION_3_PUBLISHED], ids=["ours", "published"])
def test_the_emulator_computes_the_reference(recipe, is_causal):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 1, 256, 32, generator=generator).bfloat16() for _ in range(3))
    expected = quantized_attention(q, k, v, recipe, is_causal=is_causal)[0]
    found = emulate(quantize_operands(q, k, v, recipe), recipe, 32**-0.5, 256, is_causal=is_causal)
    assert float((found - expected).abs().sum() / expected.abs().sum()) < BOUND
