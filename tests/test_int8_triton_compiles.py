"""The Triton INT8 kernels compile for GPUs that are not here, and fit into their shared memory."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import sage_kernels
from sage_kernels.architectures import find_architecture

pytest.importorskip("triton", reason="Triton is not installed")

SUPPORT = Path(__file__).parent / "support"
PACKAGES = Path(sage_kernels.__file__).parents[1]


# How many of the calls: all where shared memory is small, and where MMAs are asynchronous.
CALLS = {(8, 0): 1, (8, 9): 3, (9, 0): 2, (10, 0): 1, (12, 0): 1}


@pytest.mark.parametrize("capability", CALLS, ids=lambda capability: "sm_{}{}".format(*capability))
def test_kernels_compile_and_fit_into_shared_memory(capability, tmp_path):
    """In a process of its own, because here Triton only interprets."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    environment["PYTHONPATH"] = os.pathsep.join([str(SUPPORT), str(PACKAGES), os.environ.get("PYTHONPATH", "")])
    command = [
        sys.executable,
        str(SUPPORT / "compile_int8_triton.py"),
        "{}.{}".format(*capability),
        str(CALLS[capability]),
    ]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert run.returncode == 0, run.stderr
    programs = [json.loads(line) for line in run.stdout.splitlines()]
    assert {program["kernel"] for program in programs} == {"gather_statistics", "quantize", "attend"}
    available = find_architecture(capability).shared_memory
    assert [program for program in programs if program["shared"] > available] == []
    assert [program for program in programs if program["read_twice"]] == []
