"""Evidence of what ran on a GPU.

Tests marked `evidence("FAMILY")` are cases of tests/gpu/evidence/FAMILY.json. Each says its error by the fixture
`within`. With --write-evidence=DIR a session that ran to its end writes DIR/FAMILY.json for every family it had cases
of; the file then holds exactly the cases of that session.

Kernels come from the package's cubins where it has them (tools/build_cubins.py puts them there), else they are compiled
at first use by the NVRTC of the machine. With --emulated-cubins=DIR nothing is compiled: what is tested is the code of
the pinned compilers.
"""

import multiprocessing
import os
import subprocess
from collections import defaultdict
from pathlib import Path

import pytest
import torch

from sage_kernels import cubin_loader, evidence
from sage_kernels.architectures import device_architecture
from sage_kernels.cubin_cache import CubinCache
from sage_kernels.cubin_manifest import CubinManifest
from sage_kernels.driver import cuda_driver
from sage_kernels.kernel_sources import source_folder

ROOT = Path(__file__).resolve().parents[2]
CASES = pytest.StashKey[dict[str, list[evidence.Case]]]()
ERROR = pytest.StashKey[tuple[float, float]]()
PHASES = pytest.StashKey[list[str]]()


@pytest.fixture(scope="session")
def workers():
    """Processes on all cores, for what has much to compile."""
    with multiprocessing.get_context("spawn").Pool(min(28, os.cpu_count() or 1)) as pool:
        yield pool


@pytest.fixture(scope="session", autouse=True)
def pinned_code(request):
    """With --emulated-cubins, kernels of the pinned compilers and no others."""
    folder = request.config.getoption("--emulated-cubins", default=None)
    if folder is None:
        return
    # Here, so that the hooks below can be tested by themselves.
    from precompiled import Precompiled  # noqa: PLC0415

    compiler = Precompiled((12, 8))
    manifest = CubinManifest(Path(cubin_loader.__file__).parent / "cubins")
    loader = cubin_loader.KernelLoader(
        cuda_driver(), source_folder(), manifest, CubinCache(Path(folder)), lambda arch: compiler
    )
    # For good: the evidence is written after the last fixture's end.
    cubin_loader._default_loader = lambda: loader
    evidence.find_nvrtc = lambda arch: compiler


@pytest.fixture
def within(request):
    """Function (error, bound): asserts that the error is within its bound, and notes both for the evidence."""

    def within(error, bound):
        known = request.node.stash.get(ERROR, (float("-inf"), 1.0))
        # Of several errors of a case the one nearest to its bound is kept.
        if not error / bound <= known[0] / known[1]:
            request.node.stash[ERROR] = (error, bound)
        assert error <= bound

    return within


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """Note each phase's outcome; after the last one the case is known."""
    report = yield
    marker = item.get_closest_marker("evidence")
    if marker is not None:
        outcomes = item.stash.setdefault(PHASES, [])
        outcomes.append(report.outcome)
        if report.when == "teardown" and "skipped" not in outcomes:
            error, bound = item.stash.get(ERROR, (None, None))
            finite = error is not None and error - error == 0
            case = evidence.Case(
                item.nodeid.rpartition("/")[2], set(outcomes) == {"passed"}, error if finite else None, bound
            )
            item.config.stash.setdefault(CASES, defaultdict(list))[marker.args[0]].append(case)
    return report


def pytest_collection_finish(session):
    """Fail before the tests run, not after, where the commit can't be known."""
    if session.config.getoption("--write-evidence") is not None:
        commit(session.config)


def pytest_sessionfinish(session, exitstatus):
    """Write the files, but not those of a session that was broken off."""
    folder = session.config.getoption("--write-evidence")
    if folder is None or exitstatus not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        return
    architecture = device_architecture(torch.device("cuda"))
    for family, cases in session.config.stash.get(CASES, {}).items():
        record = evidence.make_record([family], cases, architecture.target, commit(session.config))
        evidence.write_json(Path(folder) / f"{family}.json", record)
        failed = sum(not case.passed for case in cases)
        print(f"\n{folder}/{family}.json: {len(cases)} cases, {failed} failed")


def commit(config):
    """The commit under test: as the command line says, else as git does."""
    given = config.getoption("--evidence-commit")
    if given:
        return given
    command = ["git", "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError) as error:
        raise pytest.UsageError("no git checkout here: say the commit with --evidence-commit=HASH") from error
