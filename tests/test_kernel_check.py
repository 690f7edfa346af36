"""The live test of the kernels: what it finds, and that nothing a kernel does can hurt who asks."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

import sage_kernels
from sage_kernels.kernels import KERNELS

PACKAGE_FOLDER = Path(sage_kernels.__file__).parents[1]


@pytest.fixture(scope="module")
def kernel_check(pack_module):
    return pack_module("kernel_check")


@pytest.fixture
def check(kernel_check, tmp_path):
    """Checks with a script that runs the cases a, b and c; `at_b` is what b does."""

    def check(at_b, timeout_s=30.0, before=""):
        script = tmp_path / "script.py"
        script.write_text(
            f"import json, os, sys, time\n{before}\n"
            "def say(**line): print(json.dumps(line), flush=True)\n"
            "for number, case in enumerate('abc'):\n"
            "    if number < int(sys.argv[2]): continue\n"
            "    say(case=case)\n"
            f"    if case == 'b': {at_b}\n"
            "    say(case=case, state='ok', detail='')\n"
        )
        return [
            (line["case"], line["state"], line["detail"])
            for line in kernel_check.check_kernels(tmp_path, timeout_s, script)
        ]

    return check


def test_every_kernel_that_runs_here_agrees_with_torch(kernel_check):
    results = kernel_check.check_kernels(PACKAGE_FOLDER)
    states = {result["case"]: result["state"] for result in results}
    assert {case: state for case, state in states.items() if case.startswith("cpu")} == {
        f"cpu {kernel.name}": "ok" for kernel in KERNELS if kernel.emulated or kernel.precision == "fp16"
    }


def test_a_crash_is_reported_and_the_other_kernels_are_still_tested(check):
    a, b, c = check("print('CUDA error: misaligned address', file=sys.stderr, flush=True); os.abort()")
    assert (a, c) == (("a", "ok", ""), ("c", "ok", ""))
    assert b[:2] == ("b", "crashed")
    assert "exit code" in b[2]
    assert "CUDA error: misaligned address" in b[2]


def test_a_hanging_kernel_is_given_up(check):
    _, b, _ = check("time.sleep(60)", timeout_s=1.0)
    assert b == ("b", "crashed", "no answer within 1 s")


def test_a_script_that_cannot_start_is_reported_once(check):
    assert check("pass", before="raise SystemExit('no module named torch')") == [
        ("the test itself", "crashed", "the process ended with exit code 1: no module named torch")
    ]


def test_a_kernel_that_is_wrong_is_named(tmp_path):
    """The script on a package whose fp4 gives zeros and whose int8 gives NaN."""
    program = f"""
import importlib.util, sys
sys.path.insert(0, {str(PACKAGE_FOLDER)!r})
spec = importlib.util.spec_from_file_location("kernel_check", sys.argv[1])
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
import sage_kernels
from sage_kernels.kernels import KERNELS
real = sage_kernels.attention
factor = {{"fp4": 0.0, "int8": float("nan")}}
sage_kernels.attention = lambda *args, **options: real(*args, **options) * factor.get(options["precision"], 1.0)
module.main({str(PACKAGE_FOLDER)!r}, 0)
"""
    script = Path(__file__).resolve().parent.parent / "nodes" / "kernel_check.py"
    command = [sys.executable, "-c", program, str(script)]
    output = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout
    lines = [json.loads(line) for line in output.splitlines()]
    states = {line["case"]: line["state"] for line in lines if "state" in line and line["case"].startswith("cpu")}
    assert [case for case, state in states.items() if state == "wrong"] == ["cpu fp4_emulated", "cpu int8_emulated"]


def test_modules_of_the_pack_do_not_hide_those_of_the_standard_library(tmp_path):
    """The script's own folder is first on the path, and may hold a profile.py."""
    source = Path(__file__).resolve().parent.parent / "nodes" / "kernel_check.py"
    script = tmp_path / "kernel_check.py"
    script.write_text(source.read_text(encoding="utf-8"), encoding="utf-8")
    for name in ("profile", "torch"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('the wrong module')")
    done = subprocess.run(
        [sys.executable, script, PACKAGE_FOLDER, "0"], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
