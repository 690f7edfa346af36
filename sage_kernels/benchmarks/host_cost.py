"""Host time of one call, eager and compiled: attention() and its parts beside torch's SDPA.

    PYTHONPATH=sage_kernels/src python sage_kernels/benchmarks/host_cost.py [--calls N] [--out FILE]

How long the Python thread is held up, which is what small and fast calls are limited by. Two ways: single calls, each
after waiting for the GPU, of which the median counts (the processor has cooled down while it waited); and calls in a
row, fewer than fill the launch queue, as a model makes them. Where the GPU has no FP4 instructions the FP4 kernel is
built with emulated ones: the host's part is the same.
"""

import argparse
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from result_file import add_commit_option, describe
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import sage_kernels
from sage_kernels.architectures import device_architecture
from sage_kernels.evidence import write_json
from sage_kernels.kernels.nvfp4_cuda import NVFP4CudaKernel
from sage_kernels.planned_attention import plan_with

RESULTS = Path(__file__).parent / "results"
SHAPE = (1, 4, 256, 128)  # B, H, N, D
_WARM_UP = 20
_IN_A_ROW = 20
QKV = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class Method:
    """Something to time: a name as in the result file, and the call."""

    name: str
    call: Callable[[], object]


def main() -> None:
    """Measure, print the table, write the result file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=400, help="of each kind that are timed")
    parser.add_argument("--out", type=Path, default=RESULTS / "host_cost.json")
    parser.add_argument("--no-compile", action="store_true", help="leave out what torch.compile has to build")
    add_commit_option(parser)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("there is no CUDA GPU here")
    device = torch.device("cuda", torch.cuda.current_device())
    qkv = tuple(torch.randn(SHAPE, device=device, dtype=torch.bfloat16) for _ in range(3))
    print(f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}: host µs of a single call, of one in a row")
    rows = []
    for name, (single, in_a_row) in measure(methods((qkv[0], qkv[1], qkv[2]), not options.no_compile), options, device):
        print(f"{name:24} {single:8.1f} {in_a_row:8.1f}")
        for benchmark, time_us in (("host_single", single), ("host_in_a_row", in_a_row)):
            row = {"benchmark": benchmark, "shape": "x".join(map(str, SHAPE)), "method": name}
            rows.append({**row, "ms": time_us / 1e3, "tflops": None, "rel_l1": None, "extra_bytes": None})
    record = {**describe("host_cost.py", device, options.commit), "python": platform.python_version(), "rows": rows}
    write_json(options.out, record)


def methods(qkv: QKV, compiled: bool) -> Iterator[Method]:
    """All that is timed; suffixes say what of attention() it is, or that it was compiled."""
    yield Method("sdpa", lambda: scaled_dot_product_attention(*qkv))
    add_bare_operator()
    yield Method("custom_op", lambda: torch.ops.sage_kernels_host_cost.bare(*qkv))
    for precision in ("fp16", "auto", "int8", "fp4"):
        yield from methods_of(precision, qkv)
    if compiled:
        yield Method("sdpa_compiled", compile_call(scaled_dot_product_attention, qkv))
        yield Method("custom_op_compiled", compile_call(torch.ops.sage_kernels_host_cost.bare, qkv))
        for precision in ("fp16", "auto", "int8", "fp4"):
            yield Method(f"{precision}_compiled", compile_call(attend_at(precision), qkv))


def methods_of(precision: str, qkv: QKV) -> Iterator[Method]:
    """attention() at a precision and its parts."""
    kernel = NVFP4CudaKernel(emulate_instructions=True)
    architecture = device_architecture(qkv[0].device)
    if precision == "fp4" and architecture is not None and "fp4" not in architecture.runnable:
        plan_with(kernel, *qkv, None, False, None, False, None, "BHND", precision, False, False)
    attend = attend_at(precision)
    yield Method(precision, lambda: attend(*qkv))
    prepared: list[sage_kernels.PreparedAttention] = []

    def run() -> object:
        if not prepared:
            prepared.append(sage_kernels.prepare(*qkv, precision=precision))
        return sage_kernels.run(prepared[0])

    yield Method(f"{precision}_prepare", lambda: sage_kernels.prepare(*qkv, precision=precision))
    yield Method(f"{precision}_run", run)
    yield Method(f"{precision}_explain", lambda: sage_kernels.explain(*qkv, precision=precision))


def attend_at(precision: str) -> Callable[[Tensor, Tensor, Tensor], Any]:
    """attention() at a precision, as a function of the tensors alone."""
    return lambda q, k, v: sage_kernels.attention(q, k, v, precision=precision)


def compile_call(function: Callable[[Tensor, Tensor, Tensor], Any], qkv: QKV) -> Callable[[], object]:
    """The function as one compiled graph; the first call compiles."""
    compiled = torch.compile(function, fullgraph=True)
    return lambda: compiled(*qkv)


def add_bare_operator() -> None:
    """An operator in Python that does nothing but allocate its result: what any operator costs."""

    @torch.library.custom_op("sage_kernels_host_cost::bare", mutates_args=())
    def bare(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.empty_like(q)

    bare.register_fake(lambda q, k, v: torch.empty_like(q))


def measure(
    found: Iterator[Method], options: argparse.Namespace, device: torch.device
) -> Iterator[tuple[str, tuple[float, float]]]:
    """Median microseconds of a single call and of one in a row, by method.

    Methods take turns: the clock of a processor, and what else it has to do, change while this runs.
    """
    ready = [method for method in found if is_ready(method)]
    times: dict[str, tuple[list[float], list[float]]] = {method.name: ([], []) for method in ready}
    for _ in range(max(1, options.calls // _IN_A_ROW)):
        for method in ready:
            single, in_a_row = times[method.name]
            single += [host_time(method.call, 1, device) for _ in range(_IN_A_ROW)]
            in_a_row.append(host_time(method.call, _IN_A_ROW, device))
    for name, (single, in_a_row) in times.items():
        yield name, (statistics.median(single), statistics.median(in_a_row))


def is_ready(method: Method) -> bool:
    """Warm up; whether it runs here, else why not is printed."""
    try:
        for _ in range(_WARM_UP):
            method.call()
    except Exception as error:  # of torch's compiler, or a rung that this GPU lacks: the others go on
        print(f"{method.name:24} not measured: {type(error).__name__}: {str(error).splitlines()[0][:100]}")
        return False
    return True


def host_time(call: Callable[[], object], count: int, device: torch.device) -> float:
    """Microseconds of one of `count` calls that begin with an idle GPU."""
    torch.cuda.synchronize(device)
    start = time.perf_counter()
    for _ in range(count):
        call()
    return (time.perf_counter() - start) * 1e6 / count


if __name__ == "__main__":
    main()
