"""The Triton INT8 kernels in Triton's interpreter: tests/interpreted/int8_triton.py, in a process of its own.

Triton decides when it is imported whether it interprets, and other tests compile.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import sage_kernels

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
