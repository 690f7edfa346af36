"""attention() on a GPU as programs use it: streams, threads, graphs, compilation, other devices, memory.

The FP4 kernel runs with emulated instructions where the GPU has none.
"""

import threading

import pytest
import torch

import sage_kernels
from sage_kernels import planned_attention
from sage_kernels.architectures import device_architecture
from sage_kernels.attention_call import make_call
from sage_kernels.call_form import FormCache
from sage_kernels.kernels import find_kernel
from sage_kernels.kernels.nvfp4_cuda import NVFP4CudaKernel
from sage_kernels.planned_attention import plan_with

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA GPU"),
]
TWO_GPUS = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
FP4_KERNELS = {"nvfp4_cuda": "fp4", "mxfp8_nvfp4_cuda": "fp8_fp4"}
NAMES = [*FP4_KERNELS, "int8_sm90", "int8_triton", "sdpa"]


@pytest.fixture(autouse=True)
def without_plans(monkeypatch):
    """Each test begins as a new process."""
    monkeypatch.setattr(planned_attention, "_PLANNED", FormCache(64))
    monkeypatch.setattr(planned_attention, "_DECISIONS", FormCache(64))


@pytest.fixture(params=NAMES)
def kernel(request):
    """A kernel that runs on this GPU."""
    if request.param in FP4_KERNELS:
        return NVFP4CudaKernel(torch.cuda.get_device_capability()[0] != 12, FP4_KERNELS[request.param])
    kernel = find_kernel(request.param)
    reason = kernel.refuse(checked(*make_qkv()), device_architecture(torch.device("cuda")))
    if reason is not None:
        pytest.skip(f"{kernel.name}: {reason}")
    return kernel


def make_qkv(rows=257, keys=333, seed=0, device="cuda", head_dim=128):
    generator = torch.Generator(device).manual_seed(seed)
    sizes = ((4, rows), (2, keys), (2, keys))
    return [
        torch.randn(2, heads, length, head_dim, generator=generator, device=device, dtype=torch.bfloat16)
        for heads, length in sizes
    ]


def options_of(kernel, return_lse=False, layout="BHND"):
    return (None, False, None, True, None, layout, kernel.precision, return_lse, False)


def checked(q, k, v, kernel=None):
    return make_call(q, k, v, *options_of(kernel or find_kernel("sdpa")))


def attend(kernel, qkv, **options):
    """attention(), by this kernel whatever it would choose."""
    given = options_of(kernel, **options)
    plan_with(kernel, *qkv, *given)
    return sage_kernels.attention(*qkv, enable_gqa=True, precision=kernel.precision, **options)


def directly(kernel, qkv):
    """The same by the kernel itself."""
    output, _ = kernel.run(kernel.prepare(checked(*qkv, kernel)))
    return output


def test_attention_is_what_the_kernel_computes_in_either_layout(kernel):
    qkv = make_qkv()
    expected = directly(kernel, qkv)
    assert torch.equal(attend(kernel, qkv), expected)
    swapped = [x.transpose(1, 2).contiguous() for x in qkv]
    output = attend(kernel, swapped, layout="BNHD")
    assert output.is_contiguous()
    assert torch.equal(output.transpose(1, 2), expected)
    prepared = sage_kernels.prepare(*qkv, enable_gqa=True, precision=kernel.precision)
    assert prepared.kernel == kernel.name
    assert torch.equal(sage_kernels.run(prepared), expected)


def test_a_planned_call_reads_the_tensors_it_is_given(kernel):
    plan_with(kernel, *make_qkv(), *options_of(kernel))
    for seed in range(3):
        qkv = make_qkv(seed=seed)
        output = sage_kernels.attention(*qkv, enable_gqa=True, precision=kernel.precision)
        assert torch.equal(output, directly(kernel, qkv))


def test_a_graph_replays_with_new_data(kernel):
    qkv = make_qkv()
    plan_with(kernel, *qkv, *options_of(kernel))

    def call():
        return sage_kernels.attention(*qkv, enable_gqa=True, precision=kernel.precision)

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = call()
    for seed in (5, 6):
        fresh = make_qkv(seed=seed)
        for old, new in zip(qkv, fresh, strict=True):
            old.copy_(new)
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(output, directly(kernel, fresh))


@pytest.mark.parametrize("return_lse", [False, True])
def test_it_compiles_to_one_graph_that_gives_the_same(kernel, return_lse):
    qkv = make_qkv()
    if return_lse:
        expected, lse = attend(kernel, qkv, return_lse=True)
    else:
        expected, lse = attend(kernel, qkv), None
    torch.compiler.reset()

    def layer(q, k, v):
        return sage_kernels.attention(q, k, v, enable_gqa=True, precision=kernel.precision, return_lse=return_lse)

    result = torch.compile(layer, fullgraph=True, backend="aot_eager")(*qkv)
    output, compiled_lse = result if return_lse else (result, None)
    assert torch.equal(output, expected)
    assert lse is None or torch.equal(lse, compiled_lse)


def test_threads_with_their_own_streams_share_a_plan(kernel):
    sets = [make_qkv(seed=seed) for seed in range(4)]
    expected = [directly(kernel, qkv) for qkv in sets]
    plan_with(kernel, *sets[0], *options_of(kernel))
    torch.cuda.synchronize()
    errors = []

    def work(qkv, wanted):
        try:
            stream = torch.cuda.Stream()
            with torch.cuda.stream(stream):
                for _ in range(20):
                    output = sage_kernels.attention(*qkv, enable_gqa=True, precision=kernel.precision)
                    stream.synchronize()
                    assert torch.equal(output, wanted)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=each) for each in zip(sets, expected, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []


def test_prepare_and_run_may_be_in_different_threads(kernel):
    qkv = make_qkv()
    expected = attend(kernel, qkv)
    prepared = sage_kernels.prepare(*qkv, enable_gqa=True, precision=kernel.precision)
    torch.cuda.synchronize()
    results = []
    thread = threading.Thread(target=lambda: results.append(sage_kernels.run(prepared)))
    thread.start()
    thread.join()
    torch.cuda.synchronize()
    assert torch.equal(results[0], expected)


def test_memory_comes_from_torchs_allocator_and_goes_back(kernel):
    qkv = make_qkv(2048, 2048)
    attend(kernel, qkv)
    for _ in range(3):
        sage_kernels.attention(*qkv, enable_gqa=True, precision=kernel.precision)
    torch.cuda.synchronize()
    allocated, reserved = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    free, _ = torch.cuda.mem_get_info()
    for _ in range(200):
        sage_kernels.attention(*qkv, enable_gqa=True, precision=kernel.precision)
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() == allocated
    assert torch.cuda.memory_reserved() == reserved
    assert torch.cuda.mem_get_info()[0] >= free - (2 << 20)  # other processes may share the GPU


def test_forms_that_come_and_go_do_not_pile_up(kernel):
    for rows in range(1, 200):
        qkv = make_qkv(rows=rows, keys=40)
        plan_with(kernel, *qkv, *options_of(kernel))
        output = sage_kernels.attention(*qkv, enable_gqa=True, precision=kernel.precision)
    assert len(planned_attention._PLANNED) == 64
    assert output.shape == (2, 4, 199, 128)


# ---------------------------------------------------------------- two GPUs


@TWO_GPUS
@pytest.mark.parametrize("current", [0, 1])
def test_tensors_may_be_on_another_device_than_the_current_one(kernel, current):
    other = 1 - current
    expected = directly(kernel, make_qkv(device=f"cuda:{current}"))
    qkv = [x.to(f"cuda:{other}") for x in make_qkv(device=f"cuda:{current}")]
    with torch.cuda.device(current):
        output = attend(kernel, qkv)
        again = sage_kernels.attention(*qkv, enable_gqa=True, precision=kernel.precision)
        assert torch.cuda.current_device() == current
        assert output.device == torch.device("cuda", other)
        assert torch.equal(output.to(expected.device), expected)
        assert torch.equal(again.to(expected.device), expected)


@TWO_GPUS
def test_the_same_form_on_two_devices_has_two_plans(kernel):
    for index in (0, 1, 0, 1):
        qkv = make_qkv(device=f"cuda:{index}")
        output = attend(kernel, qkv)
        assert output.device.index == index
        assert torch.equal(output, directly(kernel, qkv))


@TWO_GPUS
def test_a_thread_that_never_chose_a_device_can_use_the_second(kernel):
    qkv = make_qkv(device="cuda:1")
    expected = attend(kernel, qkv)
    torch.cuda.synchronize(1)
    results = []

    def work():
        results.append(sage_kernels.attention(*qkv, enable_gqa=True, precision=kernel.precision))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    torch.cuda.synchronize(1)
    assert torch.equal(results[0], expected)


@TWO_GPUS
def test_tensors_of_two_devices_are_refused(kernel):
    q, k, v = make_qkv()
    with pytest.raises(ValueError, match="on one device"):
        sage_kernels.attention(q, k.to("cuda:1"), v, enable_gqa=True, precision=kernel.precision)
