"""The Triton training kernels without a GPU: run by Triton's interpreter, and compiled for every architecture.

Both in processes of their own: Triton decides once, at import, whether it interprets, and other tests compile with it.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import sage_kernels
from sage_kernels.architectures import ARCHITECTURES

pytest.importorskip("triton", reason="Triton is not installed")
ROOT = Path(__file__).resolve().parent.parent
CAPABLE = [row for row in ARCHITECTURES if row.name in {"sm_80", "sm_90", "sm_120"}]  # one of each generation


def start(command, **environment):
    packages = [str(Path(sage_kernels.__file__).parents[1]), str(ROOT / "tests" / "support")]
    packages.append(os.environ.get("PYTHONPATH", ""))
    variables = {**os.environ, **environment, "PYTHONPATH": os.pathsep.join(packages)}
    return subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=variables, capture_output=True, text=True, timeout=300, check=False
    )


def test_kernels_agree_with_the_reference_in_the_interpreter():
    files = ["tests/interpreted/training_triton.py"]
    run = start(["-m", "pytest", "-q", "-p", "no:cacheprovider", *files], TRITON_INTERPRET="1")
    assert run.returncode == 0, run.stdout
    assert " passed" in run.stdout
    assert "skipped" not in run.stdout


@pytest.mark.parametrize("row", CAPABLE, ids=lambda row: row.name)
def test_kernels_compile_and_fit_into_shared_memory(row, tmp_path):
    command = ["tests/support/compile_training_triton.py", ".".join(map(str, row.capability))]
    run = start(command, TRITON_CACHE_DIR=str(tmp_path), TRITON_INTERPRET="0")
    assert run.returncode == 0, run.stderr
    kernels = [json.loads(line) for line in run.stdout.splitlines()]
    assert {kernel["kernel"] for kernel in kernels} == {
        "sum_keys",
        "quantize_inputs",
        "attend",
        "prepare_backward",
        "key_value_gradients",
        "query_gradients",
    }
    too_large = [kernel for kernel in kernels if kernel["shared"] > row.shared_memory]
    assert too_large == []
