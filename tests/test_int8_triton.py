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
