"""The build of all cubins, on an example kernel: what it writes, and that it compiles nothing twice."""

import dataclasses
import hashlib
import json
from types import SimpleNamespace

import pytest

from example_kernel import SOURCES, VARIANT
from sage_kernels.cubin_cache import CubinCache
from sage_kernels.cubin_manifest import CubinManifest
from sage_kernels.kernel_sources import collect_sources, source_hashes

RESOURCES = SimpleNamespace(registers=32, static_shared_bytes=0)


@pytest.fixture(scope="module")
def builder(tool, nvrtc_12_8):
    pytest.importorskip("tomllib", reason="building needs Python 3.11")
    return tool("build_cubins")


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return CubinCache(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def files(builder, cache):
    return builder.build([VARIANT], SOURCES, cache)


def test_each_target_is_made_by_the_oldest_compiler_that_knows_it(files):
    kernels = json.loads(files["manifest.json"])["kernels"]
    assert [(kernel["arch"], kernel["compiler"]) for kernel in kernels] == [
        ("sm_120a", "12.8.93"),
        ("sm_121a", "12.9.86"),
    ]


def test_the_manifest_describes_each_cubin(files, tool):
    manifest = json.loads(files["manifest.json"])
    assert manifest["compiler"] == "NVRTC 12.8.93, 12.9.86"
    assert manifest["sources"] == source_hashes(collect_sources(SOURCES, VARIANT.source))
    kernel = manifest["kernels"][0]
    cubin = files[kernel["file"]]
    resources = tool("cubin_elf").read_resources(cubin, "scaled_copy")
    assert kernel == {
        "file": "scaled_copy_d64_sm_120a.cubin",
        "entry": "scaled_copy",
        "family": "scaled_copy",
        "arch": "sm_120a",
        "head_dim": 64,
        "causal": False,
        "mask": "none",
        "dtype": "any",
        "registers": resources.registers,
        "shared_bytes": 65536,
        "sha256": hashlib.sha256(cubin).hexdigest(),
        "compiler": "12.8.93",
    }


def test_the_loader_takes_what_the_build_wrote(builder, files, tmp_path):
    builder.replace_folder(tmp_path / "cubins", files)
    hashes = source_hashes(collect_sources(SOURCES, VARIANT.source))
    cubin = CubinManifest(tmp_path / "cubins").find(VARIANT, "sm_121a", hashes)
    assert cubin.compiler == (12, 9)
    assert cubin.read() == files["scaled_copy_d64_sm_121a.cubin"]


def test_a_second_build_compiles_nothing_and_gives_the_same(builder, files, cache, monkeypatch):
    monkeypatch.setattr(builder, "compile_job", None)
    assert builder.build([VARIANT], SOURCES, cache) == files


def test_compiling_again_gives_the_same_bytes(builder, files, tmp_path):
    assert builder.build([VARIANT], SOURCES, CubinCache(tmp_path)) == files


@pytest.mark.parametrize("change", [{"threads": 256}, {"entry": "other", "defines": (("TEST_FACTOR", 4),)}])
def test_two_variants_of_one_name_are_refused(builder, cache, change):
    with pytest.raises(SystemExit, match="two variants are called the same"):
        builder.build([VARIANT, dataclasses.replace(VARIANT, **change)], SOURCES, cache)


def test_kernels_of_one_source_share_a_cubin(builder, files, cache, monkeypatch):
    monkeypatch.setattr(builder, "compile_job", None)
    monkeypatch.setattr(builder.cubin_elf, "read_resources", lambda cubin, entry: RESOURCES)
    shared = builder.build([VARIANT, dataclasses.replace(VARIANT, entry="second")], SOURCES, cache)
    assert set(shared) == set(files)
    kernels = json.loads(shared["manifest.json"])["kernels"]
    assert [(kernel["entry"], kernel["file"]) for kernel in kernels if kernel["arch"] == "sm_120a"] == [
        ("scaled_copy", "scaled_copy_d64_sm_120a.cubin"),
        ("second", "scaled_copy_d64_sm_120a.cubin"),
    ]


def test_the_folder_of_cubins_holds_nothing_of_an_older_build(builder, tmp_path):
    builder.replace_folder(tmp_path / "cubins", {"old.cubin": b"1", "both.cubin": b"2"})
    builder.replace_folder(tmp_path / "cubins", {"both.cubin": b"3"})
    assert {file.name: file.read_bytes() for file in (tmp_path / "cubins").iterdir()} == {"both.cubin": b"3"}
    assert [file.name for file in tmp_path.iterdir()] == ["cubins"]


def test_checksums_are_written_as_sha256sum_does(builder, tmp_path):
    (tmp_path / "a.whl").write_bytes(b"wheel")
    builder.write_checksums(tmp_path)
    assert (tmp_path / "SHA256SUMS").read_text() == f"{hashlib.sha256(b'wheel').hexdigest()}  a.whl\n"
