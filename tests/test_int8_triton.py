"""The Triton INT8 kernels in Triton's interpreter: tests/interpreted/int8_triton.py, in a process of its own.

Triton decides when it is imported whether it interprets, and other tests compile.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import sage_kernels
from sage_kernels.kernels import int8_triton

ROOT = Path(__file__).resolve().parent.parent


def test_kernels_agree_with_the_reference_in_the_interpreter():
    pytest.importorskip("triton", reason="Triton is not installed")
    packages = [str(Path(sage_kernels.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(packages)}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/interpreted/int8_triton.py"]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900, check=False)
    assert run.returncode == 0, run.stdout
    assert " passed" in run.stdout
    assert "skipped" not in run.stdout


@pytest.mark.parametrize("head_dim", [33, 96])
def test_values_with_odd_rows_are_copied(head_dim):
    """Triton reads two channels at once where it permutes tokens, also of rows that start at an odd element."""
    wide = torch.randn(1, 2, 6, 101)
    value = wide[..., 3 : 3 + head_dim]
    copy = int8_triton._with_even_rows(value)
    assert copy.stride(2) % 16 == 0
    assert torch.equal(copy, value)
    even = torch.randn(1, 2, 6, 100)[..., :head_dim]
    assert int8_triton._with_even_rows(even) is even


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_masks_with_unaligned_rows_are_copied(dtype):
    """Once, whatever they are expanded to; masks that can be loaded in whole words are taken as they are."""
    base = torch.randn(2, 1, 5, 90).to(dtype)
    for mask in (base.expand(2, 3, 5, 90)[..., 1:38], base[0, 0, :, 1:38], base.transpose(2, 3)):
        ready, strides = int8_triton._broadcast_mask(mask)
        assert torch.equal(*torch.broadcast_tensors(ready.view(dtype), mask))
        assert not any(stride * ready.element_size() % 16 for stride in strides[:3])
        assert strides[1] == 0
        assert strides[3] == 1
    for mask in (base[..., :64].clone().expand(2, 3, 5, 64), base[:, :, :1], base[..., :1].expand(2, 3, 5, 90)):
        assert int8_triton._broadcast_mask(mask)[0].data_ptr() == mask.data_ptr()
