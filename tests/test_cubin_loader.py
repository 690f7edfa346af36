"""From a variant to a launchable kernel: which cubin is taken, what is refused and in which words."""

import ctypes
import hashlib
import json
import logging
import threading
from types import SimpleNamespace

import pytest
import torch

from example_kernel import SOURCES, VARIANT, Parameters
from fake_cuda import FakeCuda
from sage_kernels import cubin_loader
from sage_kernels.cubin_cache import CubinCache
from sage_kernels.cubin_loader import KernelLoader, check_driver, load_kernel
from sage_kernels.cubin_manifest import CubinManifest
from sage_kernels.driver import Driver, KernelLoadError
from sage_kernels.kernel_sources import collect_sources, source_hashes


class FakeCompiler:
    """Records its calls; its cubins tell what they were made from."""

    def __init__(self, version=(12, 8)):
        self.version = version
        self.name = "NVRTC of a test"
        self.calls = []

    def compile(self, name, source, headers, options):
        self.calls.append((name, tuple(headers), options))
        return json.dumps([source, headers, options]).encode()


@pytest.fixture
def machine(tmp_path):
    """Makes loaders as new processes would, on one disk."""
    for file in SOURCES.iterdir():
        (tmp_path / "csrc").mkdir(exist_ok=True)
        (tmp_path / "csrc" / file.name).write_text(file.read_text())
    (tmp_path / "cubins").mkdir()
    state = SimpleNamespace(csrc=tmp_path / "csrc", cubins=tmp_path / "cubins", cache=CubinCache(tmp_path / "cache"))
    state.cuda, state.compiler = FakeCuda(), FakeCompiler()

    def load(index=0, arch="sm_120a", emulate=False):
        loader = KernelLoader(
            Driver(state.cuda), state.csrc, CubinManifest(state.cubins), state.cache, lambda arch: state.compiler
        )
        return loader.load(VARIANT, index, arch, emulate)

    state.load = load
    return state


def add_cubin(machine, content=b"from the wheel", compiler="12.8.93"):
    """Put a cubin and its manifest where the wheel has them."""
    name = VARIANT.cubin_name("sm_120a")
    (machine.cubins / name).write_bytes(content)
    kernel = {"file": name, "sha256": hashlib.sha256(b"from the wheel").hexdigest(), "compiler": compiler}
    sources = source_hashes(collect_sources(machine.csrc, VARIANT.source))
    (machine.cubins / "manifest.json").write_text(json.dumps({"sources": sources, "kernels": [kernel]}))


def test_the_cubin_of_the_wheel_comes_first(machine):
    add_cubin(machine)
    machine.load()
    assert machine.cuda.last("cuModuleLoadData")[1] == b"from the wheel"
    assert machine.compiler.calls == []


def test_a_cubin_with_a_wrong_hash_is_refused(machine):
    add_cubin(machine, content=b"from elsewhere")
    with pytest.raises(KernelLoadError, match=r"is refused: its SHA-256 is .* the manifest says .*; install the wheel"):
        machine.load()
    assert machine.cuda.count("cuModuleLoadData") == 0


def test_a_missing_cubin_or_damaged_manifest_says_to_install_again(machine):
    add_cubin(machine)
    (machine.cubins / VARIANT.cubin_name("sm_120a")).unlink()
    with pytest.raises(KernelLoadError, match=r"can't be read.*install the wheel again"):
        machine.load()
    (machine.cubins / "manifest.json").write_text("{")
    with pytest.raises(KernelLoadError, match=r"manifest\.json is damaged.*install the wheel again"):
        machine.load()


def test_without_a_cubin_the_source_is_compiled_once_and_kept(machine, caplog):
    caplog.set_level(logging.INFO, "sage_kernels")
    machine.load()
    (name, headers, options) = machine.compiler.calls[0]
    assert (name, headers) == ("scaled_copy.cu", ("scaled_copy.cuh",))
    assert {"-arch=sm_120a", "-DTEST_FACTOR=3"} <= set(options)
    assert "compiling scaled_copy_d64 for sm_120a" in caplog.text
    machine.load()
    assert len(machine.compiler.calls) == 1


def test_a_damaged_cache_is_compiled_again(machine):
    machine.load()
    (entry,) = machine.cache.folder.iterdir()
    entry.write_bytes(entry.read_bytes()[:-3])
    machine.load()
    assert len(machine.compiler.calls) == 2


@pytest.mark.parametrize("change", ["source", "header", "compiler", "emulate", "arch"])
def test_a_change_of_anything_compiles_again(machine, change):
    machine.load(emulate=True)
    options = {"emulate": True}
    if change in ("source", "header"):
        file = machine.csrc / f"scaled_copy.{'cu' if change == 'source' else 'cuh'}"
        file.write_text(file.read_text() + "\n// changed")
    elif change == "compiler":
        machine.compiler.version = (12, 9)
    elif change == "emulate":
        options = {}
    else:
        options["arch"] = "sm_90a"
    machine.load(**options)
    assert len(machine.compiler.calls) == 2


def test_a_checkout_with_windows_line_ends_is_the_same_source(machine):
    add_cubin(machine)
    for file in machine.csrc.iterdir():
        file.write_bytes(file.read_bytes().replace(b"\n", b"\r\n"))
    machine.load()
    assert machine.cuda.last("cuModuleLoadData")[1] == b"from the wheel"


def test_a_cubin_of_other_sources_is_not_taken(machine):
    add_cubin(machine)
    header = machine.csrc / "scaled_copy.cuh"
    header.write_text(header.read_text() + "\n// changed")
    machine.load()
    assert len(machine.compiler.calls) == 1


def test_emulation_is_never_a_cubin_of_the_wheel(machine):
    add_cubin(machine)
    machine.load(arch="sm_90a", emulate=True)
    machine.load(arch="sm_120a", emulate=True)
    assert ["-DSAGE_EMULATE_FP4=1" in options for _, _, options in machine.compiler.calls] == [True, True]


def test_other_architectures_are_refused_without_emulation(machine):
    with pytest.raises(KernelLoadError, match="scaled_copy_d64 is made for sm_120a, sm_121a, not for sm_90a"):
        machine.load(arch="sm_90a")


def test_a_missing_source_is_named(machine):
    (machine.csrc / "scaled_copy.cuh").unlink()
    with pytest.raises(KernelLoadError, match=r"scaled_copy\.cuh is missing.*install the package again"):
        machine.load()


@pytest.mark.parametrize(
    ("driver", "compiler", "arch", "needed"),
    [
        ((12, 7), (12, 8), "sm_120a", "CUDA 12.8 (version 570 or newer)"),
        ((12, 8), (12, 9), "sm_121a", "CUDA 12.9 (version 575 or newer)"),
        ((12, 9), (13, 0), "sm_120a", "CUDA 13.0 (version 580 or newer)"),
        ((11, 8), (12, 8), "sm_90a", "CUDA 12.0 (version 525 or newer)"),
    ],
)
def test_a_driver_that_is_too_old_is_named_with_what_is_needed(driver, compiler, arch, needed):
    with pytest.raises(KernelLoadError) as raised:
        check_driver(driver, compiler, arch)
    assert f"supports CUDA up to {driver[0]}.{driver[1]}" in str(raised.value)
    assert needed in str(raised.value)
    check_driver(tuple(int(part) for part in needed.split()[1].split(".")), compiler, arch)


def test_an_old_driver_is_refused_before_it_sees_a_cubin(machine):
    add_cubin(machine)
    machine.cuda = FakeCuda(version=12060)
    with pytest.raises(KernelLoadError, match="update the GPU driver"):
        machine.load()
    (machine.cubins / "manifest.json").unlink()
    with pytest.raises(KernelLoadError, match="update the GPU driver"):
        machine.load()
    assert machine.cuda.count("cuModuleLoadData") == 0


def test_each_device_has_its_own_module_and_threads_share_it(machine):
    loader = KernelLoader(
        Driver(machine.cuda), machine.csrc, CubinManifest(machine.cubins), machine.cache, lambda arch: machine.compiler
    )
    kernels = []

    def load(index):
        kernels.append(loader.load(VARIANT, index, "sm_120a", False))

    threads = [threading.Thread(target=load, args=(number % 2,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({id(kernel) for kernel in kernels}) == 2
    assert machine.cuda.count("cuModuleLoadData") == 2
    assert {kernel.context for kernel in kernels} == {1000, 1001}


@pytest.fixture
def streams(monkeypatch):
    """torch's current streams, one per device."""
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: 70 + index, raising=False)


def test_a_launch_goes_to_torchs_stream_of_the_kernels_device(machine, streams):
    kernel = machine.load(index=1)
    kernel.launch((4, 5, 6), Parameters(1, 2, 3, 0.5))
    assert machine.cuda.launched_configs[-1][1:] == (4, 5, 6, 128, 1, 1, 65536, 71)


def test_shared_memory_beyond_the_default_is_allowed_first(machine, streams):
    kernel = machine.load()
    assert machine.cuda.last("cuFuncSetAttribute")[1:] == (8, 65536)
    kernel.launch((1, 1, 1), Parameters(), shared_bytes=1024)
    assert machine.cuda.launched_configs[-1][7] == 1024
    assert machine.cuda.count("cuFuncSetAttribute") == 1
    kernel.launch((1, 1, 1), Parameters(), shared_bytes=90000)
    kernel.launch((1, 1, 1), Parameters(), shared_bytes=90000)
    assert machine.cuda.last("cuFuncSetAttribute")[1:] == (8, 90000)
    assert machine.cuda.count("cuFuncSetAttribute") == 2


def test_a_struct_of_the_wrong_size_never_reaches_the_gpu(machine, streams):
    kernel = machine.load()

    class Other(ctypes.Structure):
        _fields_ = (("source", ctypes.c_void_p),)

    with pytest.raises(TypeError, match="Other has 8 bytes, scaled_copy takes 24"):
        kernel.launch((1, 1, 1), Other())
    assert machine.cuda.launched_configs == []


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_only_cuda_devices_load_kernels(device):
    with pytest.raises(ValueError, match=f"kernels load on NVIDIA GPUs, got device {device}"):
        load_kernel(VARIANT, torch.device(device))


def test_the_real_compiler_makes_a_loadable_kernel(machine, nvrtc_12_8):
    machine.compiler = nvrtc_12_8
    machine.load()
    image = machine.cuda.last("cuModuleLoadData")[1]
    assert image.startswith(b"\x7fELF")
    assert b".text.scaled_copy" in image


def test_machines_without_a_driver_say_so(monkeypatch):
    monkeypatch.setattr("sage_kernels.driver._LIBRARY", "libno_such_driver.so.1")
    with pytest.raises(KernelLoadError, match=r"no CUDA driver: .*libno_such_driver.*install the driver"):
        cubin_loader.cuda_driver.__wrapped__()


def test_the_origin_of_a_kernel_is_told_without_loading_it(machine):
    loader = KernelLoader(
        Driver(machine.cuda), machine.csrc, CubinManifest(machine.cubins), machine.cache, lambda arch: machine.compiler
    )
    assert loader.origin(VARIANT, "sm_120a") == "compiled at first use, by NVRTC of a test"
    with pytest.raises(KernelLoadError, match="not for sm_90a"):
        loader.origin(VARIANT, "sm_90a")
    add_cubin(machine)
    loader = KernelLoader(Driver(machine.cuda), machine.csrc, CubinManifest(machine.cubins), machine.cache)
    assert loader.origin(VARIANT, "sm_120a") == "ready in the package, by NVRTC 12.8"
    assert machine.compiler.calls == []
    assert machine.cuda.count("cuModuleLoadData") == 0


def test_what_keeps_a_kernel_from_loading_is_told(monkeypatch):
    def no_driver():
        raise KernelLoadError("no CUDA driver")

    monkeypatch.setattr(cubin_loader, "_default_loader", no_driver)
    assert cubin_loader.loading_obstacle.__wrapped__(VARIANT, "sm_120a") == "no CUDA driver"
    monkeypatch.setattr(cubin_loader, "_default_loader", lambda: SimpleNamespace(origin=lambda variant, arch: "here"))
    assert cubin_loader.loading_obstacle.__wrapped__(VARIANT, "sm_120a") is None
