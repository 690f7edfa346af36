"""Compile, load and launch on a real GPU, with the example kernel: streams, threads, graphs, devices, the cache."""

import logging
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from example_kernel import SOURCES, VARIANT, Parameters
from sage_kernels.architectures import device_architecture
from sage_kernels.cubin_cache import CubinCache
from sage_kernels.cubin_loader import KernelLoader
from sage_kernels.cubin_manifest import CubinManifest
from sage_kernels.driver import Driver, DriverError, KernelLoadError, cuda_driver
from sage_kernels.launch_plan import LaunchSequence, ParameterTemplate

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA GPU"),
]
COUNT = 1000


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return CubinCache(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def load(cache):
    """Loads the example kernel as a new process would, built as where instructions are emulated."""

    def load(index=0):
        loader = KernelLoader(cuda_driver(), SOURCES, CubinManifest(cache.folder), cache)
        return loader.load(VARIANT, index, device_architecture(torch.device("cuda", index)).target, emulate=True)

    return load


def launch(kernel, scale=0.5, device="cuda:0"):
    """Launch on fresh tensors; returns what came out and what should."""
    source = torch.randn(COUNT, device=device)
    destination = torch.full((COUNT,), 777.0, device=device)
    parameters = Parameters(source.data_ptr(), destination.data_ptr(), COUNT, scale)
    kernel.launch((-(-COUNT // VARIANT.threads), 1, 1), parameters)
    return destination, source * scale * 3 * 2


def test_it_compiles_once_and_computes_with_more_than_48_kib_of_shared_memory(load, caplog):
    caplog.set_level(logging.INFO, "sage_kernels")
    assert torch.equal(*launch(load()))
    compiled = caplog.text.count("compiling")
    assert torch.equal(*launch(load()))
    assert caplog.text.count("compiling") == compiled <= 1


def test_a_damaged_cache_entry_is_compiled_again_and_computes(load, cache, caplog):
    load()
    for damage in (lambda content: content[:-7], lambda content: b"", lambda content: content[:40] + b"x" * 100):
        for entry in cache.folder.glob("*.cubin"):
            entry.write_bytes(damage(entry.read_bytes()))
        caplog.clear()
        assert torch.equal(*launch(load()))
        assert "damaged and will be compiled again" in caplog.text
    caplog.clear()
    assert torch.equal(*launch(load()))
    assert caplog.text == ""


def test_processes_that_compile_at_once_share_a_cache(tmp_path):
    script = Path(__file__).parents[1] / "support" / "launch_example.py"
    processes = [
        subprocess.Popen([sys.executable, script, tmp_path], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(4)
    ]
    for process in processes:
        output, errors = process.communicate(timeout=120)
        assert output == "right\n", errors
    assert [path.suffix for path in tmp_path.iterdir()] == [".cubin"]


def test_a_driver_that_is_too_old_is_named(cache, monkeypatch):
    monkeypatch.setattr(Driver, "version", lambda self: (11, 8))
    loader = KernelLoader(cuda_driver(), SOURCES, CubinManifest(cache.folder), cache)
    target = device_architecture(torch.device("cuda")).target
    with pytest.raises(KernelLoadError, match=r"supports CUDA up to 11\.8; .* need a driver .* update the GPU"):
        loader.load(VARIANT, 0, target, emulate=True)


def test_it_runs_on_the_current_stream(load):
    kernel, stream = load(), torch.cuda.Stream()
    launch(kernel)  # torch loads its own kernels at first use, which takes long
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)  # what the launch must wait for, and the default stream must not
        destination, expected = launch(kernel)
        done = torch.cuda.Event()
        done.record()
    assert not done.query()
    done.synchronize()
    assert torch.equal(destination, expected)


def test_a_thread_that_never_used_cuda_can_launch(load):
    kernel = load()
    source, destination = torch.randn(COUNT, device="cuda"), torch.zeros(COUNT, device="cuda")
    torch.cuda.synchronize()
    parameters = Parameters(source.data_ptr(), destination.data_ptr(), COUNT, 1.0)
    errors = []

    def work():
        try:
            kernel.launch((8, 1, 1), parameters)
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert errors == []
    torch.cuda.synchronize()
    assert torch.equal(destination, source * 6)


def test_a_graph_replays_it(load):
    kernel = load()
    source, destination = torch.ones(COUNT, device="cuda"), torch.zeros(COUNT, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kernel.launch((8, 1, 1), Parameters(source.data_ptr(), destination.data_ptr(), COUNT, 1.0))
    source.fill_(5.0)
    graph.replay()
    assert torch.equal(destination, torch.full_like(destination, 30.0))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_tensors_on_a_device_other_than_the_current_one_work(load):
    with torch.cuda.device(0):
        destination, expected = launch(load(1), device="cuda:1")
        assert torch.cuda.current_device() == 0
        assert torch.equal(destination, expected)


def test_a_struct_of_the_wrong_size_is_refused(load):
    class Longer(Parameters):
        _fields_ = (("more", Parameters),)

    with pytest.raises(TypeError, match="Longer has 48 bytes, scaled_copy takes 24"):
        load().launch((1, 1, 1), Longer())


def test_more_shared_memory_than_the_gpu_has_is_an_error_and_not_a_crash(load):
    kernel = load()
    with pytest.raises(DriverError, match="shared memory"):
        kernel.launch((1, 1, 1), Parameters(), shared_bytes=1 << 20)
    assert torch.equal(*launch(kernel))


def test_what_is_no_cubin_is_an_error_and_not_a_crash():
    driver: Driver = cuda_driver()
    torch.cuda.synchronize()
    with pytest.raises(DriverError, match="cuModuleLoadData failed: CUDA_ERROR"):
        driver.load_function(driver.primary_context(0), b"no cubin", "kernel")
    assert torch.ones(3, device="cuda").sum().item() == 3


def test_a_planned_launch_computes(load):
    source, destination = torch.ones(COUNT, device="cuda"), torch.zeros(COUNT, device="cuda")
    template = ParameterTemplate(Parameters(count=COUNT, scale=1.0), {}, ("source", "destination"))
    LaunchSequence(((load(), 8),), template).start(0, source.data_ptr(), destination.data_ptr())
    assert torch.equal(destination, source * 6)
