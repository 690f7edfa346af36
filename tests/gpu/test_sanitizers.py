"""compute-sanitizer on a sample of the cases of the attention kernels in CUDA, each in a process of its own.

racecheck follows mbarriers only for threads that arrive themselves: a ring of bulk copies in which one lane arrives for
its warp, after __syncwarp, is reported although it is right. So every lane of our consumers arrives.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
HERE = Path(__file__).parent
# With more key tiles than the rings have stages, grouped heads, both dtypes, masks and causal cases.
SAMPLES = {
    "nvfp4": (
        "test_nvfp4_cuda.py",
        ("128-fp16-plain-257-512", "64-bf16-plain-129-129", "128-bf16-causal-100-77", "128-bf16-bool-257-512"),
    ),
    "mxfp8_nvfp4": ("test_mxfp8_nvfp4_cuda.py", ("128-bf16-plain-257-512", "128-bf16-bool-257-512")),
    "int8": ("test_int8_sm90.py", ("128-plain-1000-1000", "64-plain-1-1000")),
}
pytestmark = pytest.mark.skipif(
    shutil.which("compute-sanitizer") is None, reason="compute-sanitizer of the CUDA toolkit is not on PATH"
)


def run(tool, arguments):
    """compute-sanitizer's report on a Python process, which must not fail for another reason."""
    command = ["compute-sanitizer", "--tool", tool, "--print-limit", "5", sys.executable, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=240, check=False).stdout


@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
@pytest.mark.parametrize(
    "family", [pytest.param(family, marks=pytest.mark.evidence(family)) for family in SAMPLES], ids=list(SAMPLES)
)
def test_no_sanitizer_finds_a_fault(request, family, tool):
    file, cases = SAMPLES[family]
    options = ["-q", "-p", "no:cacheprovider", "-k", " or ".join(cases)]
    emulated = request.config.getoption("--emulated-cubins")
    if emulated is not None:
        options.append(f"--emulated-cubins={emulated}")
    report = run(tool, ["-m", "pytest", *options, os.fspath(HERE / file)])
    assert f"{len(cases)} passed" in report, report[-3000:]
    clean = {"memcheck": "ERROR SUMMARY: 0 errors", "racecheck": "RACECHECK SUMMARY: 0 hazards"}
    assert clean[tool] in report, report[-3000:]


def test_a_race_is_found():
    report = run("racecheck", [os.fspath(HERE.parent / "support" / "launch_race.py")])
    assert "hazard" in report.lower()
    assert "RACECHECK SUMMARY: 0 hazards" not in report
