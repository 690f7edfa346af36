"""Evidence from a GPU can't go stale, because this fails; and the hooks that write it write what happened."""

import dataclasses
import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest

from example_kernel import VARIANT
from sage_kernels import evidence
from sage_kernels.driver import KernelLoadError
from sage_kernels.evidence import FAMILIES, build_flags_hash, family_source_hashes

ROOT = Path(__file__).resolve().parent.parent
EVIDENCE = ROOT / "tests" / "gpu" / "evidence"
RENEW = "run it on a GPU again: pytest tests/gpu --write-evidence=tests/gpu/evidence"
PACKAGE = ROOT / "sage_kernels" / "src" / "sage_kernels"


@pytest.mark.parametrize("family", FAMILIES)
def test_evidence_is_of_these_sources_and_all_of_it_passed(family):
    hashes = family_source_hashes(family)
    if not hashes:
        assert not (EVIDENCE / f"{family}.json").exists(), f"{family} has no kernels any more"
        pytest.skip(f"{family} has no kernels yet")
    assert (EVIDENCE / f"{family}.json").exists(), f"{family} was never run on a GPU; {RENEW}"
    record = json.loads((EVIDENCE / f"{family}.json").read_text(encoding="utf-8"))
    assert record["sources"] == hashes, f"{family}'s sources have changed since; {RENEW}"
    assert record["build_flags"] == {family: build_flags_hash(family)}, f"{family}'s build flags have changed; {RENEW}"
    assert all(record[key] for key in ("gpu", "driver", "torch", "compiler", "date", "cases"))
    assert re.fullmatch("[0-9a-f]{40}", record["commit"])
    bad = [c for c in record["cases"] if not c["passed"] or (c["bound"] is not None and c["max_error"] > c["bound"])]
    assert bad == []
    names = [case["name"] for case in record["cases"]]
    assert len(set(names)) == len(names)


def test_every_kernel_source_belongs_to_a_family():
    covered = {path for family in FAMILIES for path in family_source_hashes(family)}
    sources = [path for path in (ROOT / "sage_kernels" / "csrc").glob("*") if path.suffix in {".cu", ".cuh", ".h"}]
    triton = re.compile(r"^\s*import triton\b", re.MULTILINE)
    sources += [path for path in PACKAGE.rglob("*.py") if triton.search(path.read_text(encoding="utf-8"))]
    missing = {path.relative_to(ROOT).as_posix() for path in sources} - covered
    assert missing == set(), "name them in sage_kernels/evidence.py"


def test_hashes_change_with_a_source_a_header_and_the_flags(tmp_path, monkeypatch):
    (tmp_path / "nvfp4_a.cu").write_text('#include "b.cuh"')
    (tmp_path / "b.cuh").write_text("// b")
    (tmp_path / "int8_a.cu").write_text("")
    monkeypatch.setattr(evidence, "source_folder", lambda: tmp_path)
    assert list(family_source_hashes("nvfp4")) == ["sage_kernels/csrc/b.cuh", "sage_kernels/csrc/nvfp4_a.cu"]
    before = family_source_hashes("nvfp4")
    (tmp_path / "b.cuh").write_text("// c")
    after = family_source_hashes("nvfp4")
    assert [path for path in before if before[path] != after[path]] == ["sage_kernels/csrc/b.cuh"]

    variant = kernel_variant("nvfp4_a.cu", 1)
    monkeypatch.setattr(evidence, "VARIANTS", (variant,))
    flags = build_flags_hash("nvfp4")
    monkeypatch.setattr(evidence, "VARIANTS", (variant, kernel_variant("int8_a.cu", 1)))
    assert build_flags_hash("nvfp4") == flags
    monkeypatch.setattr(evidence, "VARIANTS", (kernel_variant("nvfp4_a.cu", 2),))
    assert build_flags_hash("nvfp4") != flags


def kernel_variant(source, value):
    return dataclasses.replace(VARIANT, source=source, defines=(("VALUE", value),))


# ---------------------------------------------------------------- the hooks of tests/gpu/conftest.py

pytest_plugins = ["pytester"]

TESTS = """
import pytest

pytestmark = pytest.mark.evidence("nvfp4")

def test_good(within):
    within(0.1, 0.5)
    within(0.4, 0.5)
    within(0.3, 0.5)

def test_bad(within):
    within(0.6, 0.5)

def test_not_a_number(within):
    within(float("nan"), 0.5)

def test_crashes(within):
    raise RuntimeError

def test_wrong_otherwise(within):
    within(0.1, 0.5)
    assert False

@pytest.fixture
def breaks():
    raise RuntimeError

def test_never_starts(breaks):
    pass

@pytest.mark.skip(reason="not here")
def test_skipped():
    pass

@pytest.mark.parametrize("number", [1, 2])
def test_cases(within, number):
    within(0.0, 0.5)
"""


@pytest.fixture
def run(pytester, monkeypatch):
    """Run tests under the hooks, on a machine whose GPU is pretended."""
    source = (ROOT / "tests" / "gpu" / "conftest.py").read_text(encoding="utf-8")
    options = (
        "\ndef pytest_addoption(parser):\n    parser.addoption('--write-evidence')\n"
        "    parser.addoption('--evidence-commit', default='')\n"
        "def pytest_configure(config):\n    config.addinivalue_line('markers', 'evidence(family)')\n"
        "from types import SimpleNamespace\n"
        "device_architecture = lambda device: SimpleNamespace(target='sm_90a')\n"
        "torch.cuda.get_device_name = lambda: 'H100'\n"
        "evidence.find_nvrtc = lambda arch: SimpleNamespace(name='NVRTC 13.0')\n"
    )
    pytester.makeconftest(source + options)

    def run(tests, commit="a" * 40):
        pytester.makepyfile(tests)
        run.result = pytester.runpytest_subprocess("--write-evidence=out", f"--evidence-commit={commit}")
        file = pytester.path / "out" / "nvfp4.json"
        return json.loads(file.read_text()) if file.exists() else None

    return run


def test_the_record_holds_every_case_with_its_outcome(run):
    record = run(TESTS)
    cases = {case["name"].partition("::")[2]: case for case in record["cases"]}
    assert {name: (case["passed"], case["max_error"], case["bound"]) for name, case in cases.items()} == {
        "test_good": (True, 0.4, 0.5),
        "test_bad": (False, 0.6, 0.5),
        "test_not_a_number": (False, None, 0.5),
        "test_crashes": (False, None, None),
        "test_wrong_otherwise": (False, 0.1, 0.5),
        "test_never_starts": (False, None, None),
        "test_cases[1]": (True, 0.0, 0.5),
        "test_cases[2]": (True, 0.0, 0.5),
    }
    assert (record["gpu"], record["commit"]) == ("H100", "a" * 40)
    assert record["sources"] == family_source_hashes("nvfp4")


def test_a_session_that_was_broken_off_writes_nothing(run):
    assert run("import pytest\n" + TESTS.replace("raise RuntimeError\n\ndef", "pytest.exit('enough')\n\ndef")) is None


def test_without_a_commit_no_test_is_run_in_vain(run, pytester):
    pytester.path.joinpath("conftest.py").write_text(
        pytester.path.joinpath("conftest.py").read_text() + "\nROOT = Path(__file__).parent / 'no checkout'\n"
    )
    assert run("def test_a():\n    print('has run')", commit="") is None
    assert "say the commit with --evidence-commit=HASH" in run.result.stderr.str() + run.result.stdout.str()
    assert "passed" not in run.result.stdout.str()


def test_files_are_written_whole(tmp_path):
    evidence.write_json(tmp_path / "made" / "a.json", {"a": 1})
    with pytest.raises(TypeError):
        evidence.write_json(tmp_path / "made" / "a.json", {"a": object()})
    assert [file.name for file in (tmp_path / "made").iterdir()] == ["a.json"]
    assert json.loads((tmp_path / "made" / "a.json").read_text()) == {"a": 1}


@pytest.mark.parametrize(
    ("arch", "compiler"), [("sm_120a", "ready in the package, by NVRTC 12.8"), ("sm_90a", "NVRTC 13.0")]
)
def test_the_record_names_what_compiled_the_kernels(monkeypatch, tmp_path, arch, compiler):
    (tmp_path / "nvfp4_a.cu").touch()
    monkeypatch.setattr(evidence, "source_folder", lambda: tmp_path)
    monkeypatch.setattr(evidence, "VARIANTS", (kernel_variant("nvfp4_a.cu", 1), kernel_variant("int8_a.cu", 1)))
    monkeypatch.setattr(evidence, "kernel_origin", lambda variant, arch: "ready in the package, by NVRTC 12.8")
    monkeypatch.setattr(evidence, "find_nvrtc", lambda arch: SimpleNamespace(name="NVRTC 13.0"))
    monkeypatch.setattr(evidence.torch.cuda, "get_device_name", lambda: "a GPU")
    assert evidence.make_record(["nvfp4"], [], arch, "commit")["compiler"] == compiler


def test_a_record_can_be_made_where_some_kernels_cannot_be_loaded(monkeypatch, tmp_path):
    def no_compiler(arch):
        raise KernelLoadError("no NVRTC")

    (tmp_path / "nvfp4_a.cu").touch()
    monkeypatch.setattr(evidence, "source_folder", lambda: tmp_path)
    monkeypatch.setattr(evidence, "VARIANTS", (kernel_variant("nvfp4_a.cu", 1),))
    monkeypatch.setattr(evidence, "find_nvrtc", no_compiler)
    monkeypatch.setattr(evidence.torch.cuda, "get_device_name", lambda: "a GPU")
    assert evidence.make_record(["nvfp4"], [], "sm_90a", "commit")["compiler"] == "none for some kernels"
