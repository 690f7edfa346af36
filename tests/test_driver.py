"""The CUDA driver by ctypes: what is passed to it, and what its errors say."""

import ctypes
import threading

import pytest

from fake_cuda import FakeCuda
from sage_kernels.driver import Driver, DriverError, KernelLoadError, LaunchConfig, configure_launch, point_to


class Parameters(ctypes.Structure):
    _fields_ = (("number", ctypes.c_uint32),)


def launch(library, parameters, context=1000, count=1):
    launches = [(configure_launch(5, (7, 8, 9), 256, 4096, 77), point_to(parameters))] * count
    Driver(library).launch(context, launches)


def test_version_is_that_of_cuda():
    assert Driver(FakeCuda(version=12090)).version() == (12, 9)


def test_launch_configurations_are_laid_out_as_in_c():
    offsets = {name: getattr(LaunchConfig, name).offset for name, _ in LaunchConfig._fields_}
    expected = {"grid": 0, "block": 12, "shared_bytes": 24, "stream": 32, "attributes": 40, "attribute_count": 48}
    assert offsets == expected
    assert ctypes.sizeof(LaunchConfig) == 56


def test_a_launch_passes_grid_block_memory_stream_and_the_address_of_the_struct():
    library = FakeCuda()
    launch(library, Parameters(42))
    assert library.launched_configs == [(5, 7, 8, 9, 256, 1, 1, 4096, 77)]
    assert library.last("cuLaunchKernelEx")[3] is None
    assert library.launched_parameters == [(1000, 42)]


def test_launches_in_a_row_share_one_change_of_context():
    library = FakeCuda()
    launch(library, Parameters(42), count=3)
    assert library.launched_parameters == [(1000, 42)] * 3
    assert library.count("cuCtxPushCurrent_v2") == library.count("cuCtxPopCurrent_v2") == 1


def test_a_launch_leaves_the_callers_context_current():
    library = FakeCuda()
    library.contexts.append("the caller's")
    library._answers["cuCtxGetCurrent"] = lambda out: setattr(out._obj, "value", 999)
    launch(library, Parameters(1), context=1001)
    assert library.launched_parameters[0][0] == 1001
    assert library.contexts == ["the caller's"]


def test_a_context_that_is_current_already_is_not_pushed():
    library = FakeCuda()
    library.contexts.append(1001)
    launch(library, Parameters(1), context=1001)
    assert library.launched_parameters[0][0] == 1001
    assert library.count("cuCtxPushCurrent_v2") == library.count("cuCtxPopCurrent_v2") == 0
    assert library.contexts == [1001]


def test_the_first_launch_that_fails_is_the_last():
    library = FakeCuda()
    library.failures["cuLaunchKernelEx"] = 701
    with pytest.raises(DriverError, match="cuLaunchKernel failed"):
        launch(library, Parameters(1), count=3)
    assert library.count("cuLaunchKernelEx") == 1


@pytest.mark.parametrize("call", ["cuModuleLoadData", "cuLaunchKernel", "cuFuncSetAttribute"])
def test_a_failed_call_raises_and_leaves_the_callers_context_current(call):
    library = FakeCuda()
    library.failures["cuLaunchKernelEx" if call == "cuLaunchKernel" else call] = 701
    driver = Driver(library)
    with pytest.raises(DriverError, match=rf"{call}.*CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES \(701\): what the driver says"):
        {
            "cuModuleLoadData": lambda: driver.load_function(1000, b"cubin", "entry"),
            "cuLaunchKernel": lambda: launch(library, Parameters(1)),
            "cuFuncSetAttribute": lambda: driver.allow_shared_memory(1000, 5, 99 << 10),
        }[call]()
    assert library.contexts == []


@pytest.mark.parametrize(("code", "advice"), [(200, "update the GPU driver"), (900, "call once before the capture")])
def test_known_errors_say_what_to_do(code, advice):
    library = FakeCuda()
    library.failures["cuModuleLoadData"] = code
    with pytest.raises(DriverError, match=advice):
        Driver(library).load_function(1000, b"no cubin", "entry")


def test_an_error_that_the_driver_has_no_name_for_keeps_its_number():
    library = FakeCuda()
    library.failures["cuLaunchKernelEx"] = 12345
    with pytest.raises(DriverError, match="12345"):
        launch(library, Parameters(1))


def test_a_driver_without_a_needed_function_is_called_too_old():
    library = FakeCuda()
    del library.cuDevicePrimaryCtxRetain
    with pytest.raises(KernelLoadError, match=r"no cuDevicePrimaryCtxRetain.*update the GPU driver"):
        Driver(library)


def test_drivers_that_cannot_tell_the_parameter_size_are_fine():
    library = FakeCuda()
    assert Driver(library).parameter_bytes(5) == 24
    del library.cuFuncGetParamInfo
    assert Driver(library).parameter_bytes(5) is None


def test_tensor_maps_are_written_where_the_driver_wants_them():
    library = FakeCuda()
    found = Driver(library).tensor_map(4096, (40, 300, 6, 2), (80, 24000, 144000), (64, 64, 1, 1))
    assert bytes(found) == b"\xab" * 128
    out, kind, rank, address, sizes, strides, box, steps, *modes = library.last("cuTensorMapEncodeTiled")
    assert out.value % 64 == 0
    assert (kind.value, rank.value, address.value) == (1, 4, 4096)  # 16 bits without a sign
    assert [list(x) for x in (sizes, strides, box, steps)] == [
        [40, 300, 6, 2],
        [80, 24000, 144000],
        [64, 64, 1, 1],
        [1, 1, 1, 1],
    ]
    assert [mode.value for mode in modes] == [0, 3, 2, 0]  # not interleaved, swizzled by 128 bytes, L2, zeros outside


def test_threads_can_launch_at_once():
    library = FakeCuda()
    library.contexts.append(1000)  # of every thread: the fake has one stack
    driver, configured = Driver(library), configure_launch(5, (1, 1, 1), 32, 0, 0)

    def work(number):
        for _ in range(50):
            parameters = Parameters(number)
            driver.launch(1000, [(configured, point_to(parameters))])

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(number for _, number in library.launched_parameters) == sorted([0, 1, 2, 3] * 50)
