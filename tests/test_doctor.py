"""The doctor on machines that are not this one: what it says and what it tells people to do."""

import hashlib
import json

import pytest
import torch

from example_kernel import VARIANT
from fake_cuda import FakeCuda
from sage_kernels import doctor
from sage_kernels.architectures import find_architecture
from sage_kernels.capabilities import DeviceCapabilities
from sage_kernels.cubin_loader import check_driver
from sage_kernels.driver import Driver, KernelLoadError

GPU = DeviceCapabilities("cuda:0", "RTX 5090", "sm_120", ("fp4", "fp16"), ())


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """An RTX 5090 with driver 570.86 whose kernels come with the package."""
    (tmp_path / "cubins").mkdir()
    monkeypatch.setattr(doctor, "_PACKAGE", tmp_path)
    monkeypatch.setattr(doctor, "cache_folder", lambda: tmp_path / "cache")
    monkeypatch.setattr(doctor, "cuda_driver", lambda: Driver(FakeCuda(version=12080)))
    monkeypatch.setattr(doctor, "driver_version", lambda: "570.86")
    monkeypatch.setattr(doctor, "find_libraries", lambda folders: [])
    monkeypatch.setattr(doctor, "capabilities", lambda: [GPU])
    monkeypatch.setattr(doctor, "device_architecture", lambda device: find_architecture((12, 0)))
    monkeypatch.setattr(doctor, "VARIANTS", (VARIANT,))
    monkeypatch.setattr(doctor, "kernel_origin", lambda variant, arch: "ready in the package")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    return monkeypatch


def add_cubin(folder, content):
    (folder / "cubins" / "a.cubin").write_bytes(content)
    kernel = {"file": "a.cubin", "sha256": hashlib.sha256(b"cubin").hexdigest(), "compiler": "12.8.93"}
    (folder / "cubins" / "manifest.json").write_text(json.dumps({"sources": {}, "kernels": [kernel]}))


def fixes(text):
    return text.partition("What to do:\n")[2].splitlines()


def test_a_machine_without_faults(machine, tmp_path):
    add_cubin(tmp_path, b"cubin")
    text = doctor.doctor()
    assert f"from {tmp_path.parent}" in text
    assert "GPU driver: 570.86, CUDA up to 12.8" in text
    assert "kernels in the package: 1, none damaged" in text
    assert "cuda:0: RTX 5090 (sm_120)\n  runs: fp4, fp16\n  fp4: compiled for this GPU, never run on one" in text
    assert "\n  scaled_copy: ready in the package" in text
    assert fixes(text) == ["- nothing: no problem was found"]


def test_a_damaged_cubin_is_named(machine, tmp_path):
    add_cubin(tmp_path, b"other")
    text = doctor.doctor()
    assert "kernels in the package: 1, 1 damaged" in text
    assert "a.cubin is refused" in fixes(text)[0]
    assert "install the wheel again" in fixes(text)[0]


def test_a_damaged_manifest_is_named(machine, tmp_path):
    (tmp_path / "cubins" / "manifest.json").write_text("[")
    assert "manifest.json is damaged" in fixes(doctor.doctor())[0]


def test_a_driver_that_is_too_old_is_said_once_with_the_version_that_is_needed(machine):
    machine.setattr(doctor, "VARIANTS", (VARIANT, VARIANT))
    machine.setattr(doctor, "kernel_origin", lambda variant, arch: check_driver((12, 4), (12, 8), arch))
    text = doctor.doctor()
    assert "scaled_copy: can't be loaded" in text
    assert len(fixes(text)) == 1
    assert "version 570 or newer" in fixes(text)[0]


def test_a_missing_driver_is_named(machine):
    def no_driver():
        raise KernelLoadError("no CUDA driver: install it")

    machine.setattr(doctor, "cuda_driver", no_driver)
    assert "GPU driver: no CUDA driver: install it" in doctor.doctor()


def test_compilers_are_listed_with_version_and_path(machine, nvrtc_12_8, tmp_path):
    (tmp_path / "libnvrtc.so.11").write_text("no library")
    machine.setattr(doctor, "find_libraries", lambda folders: [nvrtc_12_8.path, tmp_path / "libnvrtc.so.11"])
    text = doctor.doctor()
    assert f"NVRTC 12.8: {nvrtc_12_8.path}" in text
    assert "libnvrtc.so.11 can't be used" in text


def test_missing_compiler_and_cubins_are_said(machine, tmp_path):
    text = doctor.doctor()
    assert "NVRTC: none found" in text
    assert "kernels in the package: none" in text


@pytest.mark.parametrize(
    ("architecture", "calls"),
    [("sm_89", "int8 and int8_fp16 can't"), ("sm_90", "int8_fp16, and int8 with a mask tensor")],
)
@pytest.mark.parametrize(("platform", "package"), [("linux", "triton"), ("win32", "triton-windows")])
def test_missing_triton_is_named_with_what_it_costs(machine, architecture, calls, platform, package):
    device = DeviceCapabilities("cuda:0", "a GPU", architecture, ("int8", "int8_fp16", "fp16"), ())
    machine.setattr(doctor, "capabilities", lambda: [device])
    assert "Triton" not in fixes(doctor.doctor())[0]
    machine.setattr(doctor.importlib.util, "find_spec", lambda name: None)
    machine.setattr("sys.platform", platform)
    text = doctor.doctor()
    assert "Triton: not installed" in text
    (fix,) = fixes(text)
    assert calls in fix
    assert fix.endswith(f"pip install {package}")


def test_kernels_of_other_architectures_are_not_listed(machine):
    machine.setattr(doctor, "device_architecture", lambda device: find_architecture((9, 0)))
    assert "scaled_copy" not in doctor.doctor()


def test_kernels_compiled_here_are_counted(machine, tmp_path):
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "k.cubin").touch()
    assert f"kernels compiled on this machine: 1, in {tmp_path / 'cache'}" in doctor.doctor()


@pytest.mark.parametrize(
    ("cuda", "advice"), [(None, "install a CUDA build of torch"), ("13.0", "check that nvidia-smi shows it")]
)
def test_no_gpu_is_explained_by_torch_or_by_the_driver(machine, cuda, advice):
    machine.setattr(torch.cuda, "is_available", lambda: False)
    machine.setattr(torch.version, "cuda", cuda)
    (fix,) = fixes(doctor.doctor())
    assert "No CUDA GPU" in fix
    assert advice in fix
