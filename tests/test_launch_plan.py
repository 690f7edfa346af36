"""Launch plans: what of a call is worked out once, what each call adds, and that nothing of a call is kept."""

import ctypes
import gc
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from fake_cuda import FakeCuda
from sage_kernels import launch_plan
from sage_kernels.attention_call import make_call
from sage_kernels.call_form import FormCache, form_of_call
from sage_kernels.cubin_loader import LoadedKernel
from sage_kernels.driver import Driver, DriverError
from sage_kernels.kernels import int8_sm90, nvfp4_cuda
from sage_kernels.kernels.int8_sm90 import Int8Sm90Kernel
from sage_kernels.kernels.nvfp4_cuda import NVFP4CudaKernel
from sage_kernels.launch_plan import LaunchSequence, ParameterTemplate, WorkspaceLayout

PROCESSORS = 132


@pytest.fixture
def cuda(monkeypatch):
    """The kernels load on a pretended GPU, whose tensors are on the CPU; knows what was launched."""
    library = FakeCuda()
    driver, streams = Driver(library), [71]
    driver.parameter_bytes = lambda function: None  # as drivers before CUDA 12.4
    library.struct_bytes = {entry: ctypes.sizeof(struct) for entry, struct in STRUCTS.items()}

    def load(variant, device, emulate=False):
        return LoadedKernel(driver, variant, 0, b"cubin")

    for module in (nvfp4_cuda, int8_sm90):
        monkeypatch.setattr(module, "load_kernel", load)
        monkeypatch.setattr(module, "_multiprocessors", lambda index: PROCESSORS)
    int8_sm90._load.cache_clear()
    monkeypatch.setattr(launch_plan, "_PLANS", FormCache(8))
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: streams[-1], raising=False)
    library.streams = streams
    yield library
    int8_sm90._load.cache_clear()


STRUCTS = {
    b"nvfp4_prepare_queries": nvfp4_cuda._PrepareParameters,
    b"nvfp4_prepare_keys_values": nvfp4_cuda._PrepareParameters,
    b"nvfp4_attention": nvfp4_cuda._AttentionParameters,
    b"int8_sm90_prepare": int8_sm90._Parameters,
    b"int8_sm90_attention": int8_sm90._Parameters,
}
KERNELS = {
    "nvfp4": (NVFP4CudaKernel(True), nvfp4_cuda._PrepareParameters, nvfp4_cuda._AttentionParameters),
    "mxfp8": (NVFP4CudaKernel(True, "fp8_fp4"), nvfp4_cuda._PrepareParameters, nvfp4_cuda._AttentionParameters),
    "int8_sm90": (Int8Sm90Kernel(), int8_sm90._Parameters, int8_sm90._Parameters),
}


def call_of(layout="BHND", dtype=torch.bfloat16, rows=300, keys=500, return_lse=False, key_lengths=None, mask=None):
    q, k, v = (torch.randn(2, heads, length, 64).to(dtype) for heads, length in ((4, rows), (2, keys), (2, keys)))
    if layout == "BNHD":
        q, k, v = (x.transpose(1, 2).contiguous() for x in (q, k, v))
    return make_call(q, k, v, mask, False, None, True, key_lengths, layout, "auto", return_lse, False)


def read(library, struct, index):
    """Parameters of a launch."""
    return struct.from_buffer_copy(library.launched_structs[index])


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("layout", ["BHND", "BNHD"])
def test_a_plan_gives_the_addresses_and_strides_of_each_call(cuda, name, layout):
    kernel, prepare_struct, run_struct = KERNELS[name]
    lengths = torch.tensor([3, 4], dtype=torch.int32)
    calls = [call_of(layout, key_lengths=lengths, return_lse=True) for _ in range(2)]
    plan = kernel.plan(calls[0])
    for number, call in enumerate(calls):
        cuda.launched_structs.clear()
        state = plan.prepare_call(call)
        output, lse = plan.run(state)
        assert len(cuda.launched_structs) == {"nvfp4": 3, "int8_sm90": 2}[name]
        assert set(cuda.launched_structs[:-1]) == {cuda.launched_structs[0]}
        prepared, ran = read(cuda, prepare_struct, 0), read(cuda, run_struct, -1)
        address = (lambda field: field.data) if name != "int8_sm90" else (lambda field: field)
        for tensor, field in ((call.query, "query"), (call.key, "key"), (call.value, "value")):
            assert address(getattr(prepared, field)) == tensor.data_ptr(), number
        assert prepared.key_lengths == ran.key_lengths == lengths.data_ptr()
        assert (ran.output, ran.lse) == (output.data_ptr(), lse.data_ptr())
        assert tuple(ran.output_strides) == output.stride()[:3]
        assert output.shape == call.query.shape
        assert output.transpose(1, 2).is_contiguous() == (layout == "BNHD")
        start, end = state.workspace.data_ptr(), state.workspace.data_ptr() + plan.workspace.size
        for field, offset in plan.workspace.offsets().items():
            assert getattr(prepared, field) == start + offset < end
            if hasattr(run_struct, field):
                assert getattr(ran, field) == start + offset


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("layout", ["BHND", "BNHD"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_all_at_once_launches_the_same_as_one_after_the_other(cuda, name, layout, dtype):
    kernel, prepare_struct, run_struct = KERNELS[name]
    lengths = torch.tensor([3, 9, 4], dtype=torch.int32)[::2]
    call = call_of(layout, dtype, key_lengths=lengths, return_lse=True)
    q, k, v = (x.transpose(1, 2) if layout == "BNHD" else x for x in (call.query, call.key, call.value))
    plan = kernel.plan(call)
    apart = plan.run(plan.prepare(q, k, v, None, lengths))
    structs, configs = list(cuda.launched_structs), list(cuda.launched_configs)
    cuda.launched_structs.clear()
    cuda.launched_configs.clear()
    cuda.calls.clear()
    at_once = plan.attend(q, k, v, None, lengths)
    assert cuda.launched_configs == configs
    assert cuda.count("cuCtxPushCurrent_v2") == 1
    for one, other in zip(apart, at_once, strict=True):
        assert (one.shape, one.stride(), one.dtype) == (other.shape, other.stride(), other.dtype)
    ran = read(cuda, run_struct, -1)
    assert ran.lse == at_once[1].data_ptr()
    assert dtype == torch.float32 or ran.output == at_once[0].data_ptr()
    addresses = {"query", "key", "value", "key_lengths", "output", "lse", *plan.workspace.offsets()}
    for index in range(len(structs)):
        struct = run_struct if index == len(structs) - 1 else prepare_struct
        before, after = struct.from_buffer_copy(structs[index]), read(cuda, struct, index)
        for field, _ in struct._fields_:
            values = [getattr(each, field) for each in (before, after)]
            values = [tuple(x) if isinstance(x, ctypes.Array) else x for x in values]
            if field in addresses:
                values = [bool(getattr(x, "data", x)) for x in values]
            assert values[0] == values[1], field


@pytest.mark.parametrize("name", KERNELS)
def test_a_plan_keeps_no_tensor(cuda, name):
    kernel, _, _ = KERNELS[name]
    call = call_of(key_lengths=torch.tensor([3, 4], dtype=torch.int32))
    alive = [weakref.ref(x) for x in (call.query, call.key, call.value, call.key_lengths)]
    plan = kernel.plan(call)
    state = plan.prepare_call(call)
    output, _ = plan.run(state)
    alive += [weakref.ref(state.workspace), weakref.ref(output)]
    del call, state, output
    gc.collect()
    assert [ref() for ref in alive] == [None] * 6


@pytest.mark.parametrize("name", KERNELS)
def test_float32_is_copied_to_bfloat16_in_either_layout(cuda, name):
    kernel, prepare_struct, _ = KERNELS[name]
    for layout in ("BHND", "BNHD"):
        call = call_of(layout, torch.float32)
        cuda.launched_structs.clear()
        plan = kernel.plan(call)
        output, _ = plan.run(plan.prepare_call(call))
        assert output.dtype == torch.float32
        prepared = read(cuda, prepare_struct, 0)
        if name != "int8_sm90":
            address, strides = prepared.query.data, prepared.query.strides[:3]
        else:
            address, strides = prepared.query, prepared.query_strides[:]
        assert address != call.query.data_ptr()
        assert tuple(strides) == (4 * 300 * 64, 300 * 64, 64)


def test_key_lengths_with_gaps_are_made_dense(cuda):
    lengths = torch.tensor([3, 77, 4, 77], dtype=torch.int32)[::2]
    kernel = KERNELS["nvfp4"][0]
    call = call_of(key_lengths=lengths)
    state = kernel.prepare(call)
    assert state.key_lengths.tolist() == [3, 4]
    assert state.key_lengths.is_contiguous()


def test_calls_of_one_form_share_a_plan_and_others_have_their_own(cuda):
    kernel = KERNELS["nvfp4"][0]
    first = kernel.prepare(call_of()).plan
    assert kernel.prepare(call_of()).plan is first
    for other in (
        call_of(keys=501),
        call_of("BNHD"),
        call_of(dtype=torch.float16),
        call_of(return_lse=True),
        call_of(mask=torch.ones(300, 500, dtype=torch.bool)),
        call_of(key_lengths=torch.tensor([3, 4], dtype=torch.int32)),
    ):
        assert kernel.prepare(other).plan is not first
    assert NVFP4CudaKernel().prepare(call_of()).plan is not first


def test_misaligned_tensors_have_a_plan_of_their_own(cuda):
    aligned = call_of()
    buffer = torch.zeros(aligned.query.numel() + 1, dtype=torch.bfloat16)
    shifted = make_call(
        buffer[1:].view(aligned.query.shape), aligned.key, aligned.value,
        None, False, None, True, None, "BHND", "auto", False, False,
    )  # fmt: skip
    assert form_of_call(shifted) != form_of_call(aligned)
    kernel, struct, _ = KERNELS["nvfp4"]
    for call, vectors in ((aligned, 1), (shifted, 0)):
        cuda.launched_structs.clear()
        kernel.prepare(call)
        assert read(cuda, struct, 0).vectors == vectors
    cuda.launched_structs.clear()
    kernel, struct, _ = KERNELS["int8_sm90"]
    kernel.prepare(shifted)
    assert read(cuda, struct, 0).query != shifted.query.data_ptr()
    assert read(cuda, struct, 0).key == shifted.key.data_ptr()


@pytest.mark.parametrize("name", KERNELS)
def test_without_queries_nothing_is_launched(cuda, name):
    kernel, _, _ = KERNELS[name]
    output, lse = kernel.run(kernel.prepare(call_of(rows=0, return_lse=True)))
    assert (output.shape, lse.shape) == ((2, 4, 0, 64), (2, 4, 0))
    assert cuda.launched_structs == []


def test_launches_follow_the_current_stream(cuda):
    kernel = KERNELS["nvfp4"][0]
    call = call_of()
    for stream in (71, 72, 71, *range(100, 200), 72):
        cuda.streams.append(stream)
        cuda.launched_configs.clear()
        kernel.run(kernel.prepare(call))
        assert [config[-1] for config in cuda.launched_configs] == [stream] * 3


def test_a_context_is_pushed_once_for_launches_in_a_row_or_not_at_all(cuda):
    kernel = KERNELS["nvfp4"][0]
    call = call_of()
    kernel.prepare(call)
    cuda.calls.clear()
    kernel.prepare(call)
    assert [cuda.count(name) for name in ("cuCtxPushCurrent_v2", "cuLaunchKernelEx")] == [1, 2]
    cuda.contexts.append(1000)
    cuda.calls.clear()
    kernel.run(kernel.prepare(call))
    assert [cuda.count(name) for name in ("cuCtxPushCurrent_v2", "cuLaunchKernelEx")] == [0, 3]


def test_a_failed_launch_raises_each_time(cuda):
    kernel = KERNELS["nvfp4"][0]
    call = call_of()
    state = kernel.prepare(call)
    cuda.failures["cuLaunchKernelEx"] = 701
    for _ in range(2):
        with pytest.raises(DriverError, match=r"cuLaunchKernel failed.*701"):
            kernel.prepare(call)
        with pytest.raises(DriverError, match=r"cuLaunchKernel failed.*701"):
            kernel.run(state)


def test_threads_share_a_plan(cuda):
    kernel, struct, _ = KERNELS["nvfp4"]
    cuda.contexts.append(1000)
    call = call_of()
    plan = kernel.plan(call)
    errors = []
    calls = [call_of() for _ in range(4)]

    def work(call):
        try:
            for _ in range(30):
                plan.prepare_call(call)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(call,)) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    launched = [struct.from_buffer_copy(data).query.data for data in cuda.launched_structs]
    assert {address: launched.count(address) for address in launched} == {c.query.data_ptr(): 60 for c in calls}


# ---------------------------------------------------------------- parts


class Parameters(ctypes.Structure):
    _fields_ = (
        ("first", ctypes.c_uint64),
        ("second", ctypes.c_uint64),
        ("buffer", ctypes.c_uint64),
        ("number", ctypes.c_int32),
        ("factor", ctypes.c_float),
    )


def test_a_template_is_filled_with_addresses_and_stays_as_it_is():
    template = ParameterTemplate(Parameters(number=7, factor=0.5), {"buffer": 512}, ("second", None, "first"))
    for base in (1 << 40, 4096, 1 << 40):
        words = template.filled(base, 22, 33, 11)
        assert words[0] == ctypes.addressof(words) + 8
        filled = Parameters.from_address(words[0])
        assert (filled.first, filled.second, filled.buffer) == (11, 22, base + 512)
        assert (filled.number, filled.factor) == (7, 0.5)
    with pytest.raises(ValueError, match="zip"):
        template.filled(0, 1, 2)
    for base in range(100):
        template.filled(base, 1, 2, 3)
    assert len(template._with_workspace) <= 16


def test_each_thread_fills_a_struct_of_its_own():
    template = ParameterTemplate(Parameters(), {"buffer": 0}, ("first", "second"))
    words = template.filled(4096, 11, 22)
    with ThreadPoolExecutor(1) as other:
        others = other.submit(template.filled, 4096, 33, 44).result()
    mine, theirs = (Parameters.from_address(each[0]) for each in (words, others))
    assert ((mine.first, mine.second), (theirs.first, theirs.second)) == ((11, 22), (33, 44))


def test_buffers_of_a_workspace_are_aligned_and_do_not_overlap():
    shapes = {"a": ((3, 5), torch.int32), "b": None, "c": ((7,), torch.uint8), "d": ((2, 2), torch.float32)}
    layout = WorkspaceLayout(shapes)
    workspace = torch.zeros(layout.size, dtype=torch.uint8)
    assert list(layout.offsets()) == ["a", "c", "d"]
    assert all(offset % 256 == 0 for offset in layout.offsets().values())
    for value, name in enumerate(layout.offsets(), 1):
        layout.view(workspace, name).fill_(value)
    assert [layout.view(workspace, name).unique().tolist() for name in layout.offsets()] == [[1], [2], [3]]
    assert layout.view(workspace, "d").shape == (2, 2)
    assert layout.view(workspace, "b") is None


def test_a_struct_of_the_wrong_size_is_refused_when_planned(cuda):
    variant = nvfp4_cuda.nvfp4_attention_variant(64, False)
    kernel = LoadedKernel(Driver(FakeCuda(parameter_bytes=24)), variant, 0, b"cubin")
    with pytest.raises(TypeError, match="Parameters has 32 bytes, nvfp4_attention takes 24"):
        LaunchSequence(((kernel, 1),), ParameterTemplate(Parameters(), {}, ()))
