"""The tests of the browser's modules that need no browser, run by Node.js."""

import shutil
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).parent
WEB = HERE.parents[1] / "nodes" / "web"
FIRST_WITH_TEST_RUNNER = 20


@pytest.fixture(scope="module")
def node():
    program = shutil.which("node")
    if program is None:
        pytest.skip("needs Node.js")
    version = subprocess.run([program, "--version"], capture_output=True, text=True, check=True).stdout.strip()
    if int(version.lstrip("v").partition(".")[0]) < FIRST_WITH_TEST_RUNNER:
        pytest.skip(f"needs Node.js {FIRST_WITH_TEST_RUNNER} or newer, this is {version}")
    return program


@pytest.mark.parametrize("file", sorted(HERE.glob("*.test.mjs")), ids=lambda file: file.name)
def test_unit_tests_pass(node, file):
    run = subprocess.run(
        [node, "--test", "--test-reporter=tap", file], capture_output=True, text=True, check=False, timeout=60
    )
    failures = [line for line in run.stdout.splitlines() if line.strip().startswith(("not ok", "error:"))]
    assert run.returncode == 0, "\n".join(failures) or run.stdout + run.stderr
    assert "# pass 0" not in run.stdout


@pytest.mark.parametrize("file", sorted(WEB.glob("*.js")), ids=lambda file: file.name)
def test_files_are_valid_modules(node, file):
    run = subprocess.run([node, "--check", file], capture_output=True, text=True, check=False, timeout=60)
    assert run.returncode == 0, run.stderr
