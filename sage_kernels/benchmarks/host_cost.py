"""Host time of one call, eager and compiled: attention() and its parts beside torch's SDPA.

    PYTHONPATH=sage_kernels/src python sage_kernels/benchmarks/host_cost.py [--calls N] [--out FILE]

How long the Python thread is held up, which is what small and fast calls are limited by; the GPU is idle before each
call, and tensors are so small that it is never waited for. Where the GPU has no FP4 instructions the FP4 kernel is
built with emulated ones: the host's part is the same.
"""

import argparse
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import sage_kernels
from sage_kernels.architectures import device_architecture
from sage_kernels.evidence import write_json
from sage_kernels.kernels.nvfp4_cuda import NVFP4CudaKernel
from sage_kernels.planned_attention import plan_with

ROOT = Path(__file__).resolve().parents[2]
RESULTS = Path(__file__).parent / "results"
SHAPE = (1, 4, 256, 128)  # B, H, N, D
_WARM_UP = 20
QKV = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class Method:
    """Something to time: a name as in the result file, and the call."""

    name: str
    call: Callable[[], object]


def main() -> None:
    """Measure, print the table, write the result file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=300, help="of which each time is the median")
    parser.add_argument("--out", type=Path, default=RESULTS / "host_cost.json")
    parser.add_argument("--no-compile", action="store_true", help="leave out what torch.compile has to build")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("there is no CUDA GPU here")
    device = torch.device("cuda", torch.cuda.current_device())
    qkv = tuple(torch.randn(SHAPE, device=device, dtype=torch.bfloat16) for _ in range(3))
    rows = []
    print(f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}: median host µs of a call (fastest)")
    for method in methods((qkv[0], qkv[1], qkv[2]), not options.no_compile):
        try:
            median, fastest = host_time(method.call, options.calls, device)
        except Exception as error:  # of torch's compiler, or a rung that this GPU lacks: the others go on
            print(f"{method.name:24} not measured: {type(error).__name__}: {str(error).splitlines()[0][:100]}")
            continue
        print(f"{method.name:24} {median:8.1f} ({fastest:.1f})")
        row = {"benchmark": "host", "shape": "x".join(map(str, SHAPE)), "method": method.name, "ms": median / 1e3}
        rows.append({**row, "tflops": None, "rel_l1": None, "extra_bytes": None, "fastest_ms": fastest / 1e3})
    record = {
        "machine": f"{platform.processor() or platform.machine()}, Python {platform.python_version()}",
        "gpu": torch.cuda.get_device_name(device),
        "torch": torch.__version__,
        "commit": subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
        ).stdout.strip(),
        "date": date.today().isoformat(),
        "command": "python sage_kernels/benchmarks/host_cost.py",
        "rows": rows,
    }
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


def host_time(call: Callable[[], object], calls: int, device: torch.device) -> tuple[float, float]:
    """Median and least microseconds until `call` returns, with an idle GPU."""
    for _ in range(_WARM_UP):
        call()
    times = []
    for _ in range(calls):
        torch.cuda.synchronize(device)
        start = time.perf_counter()
        call()
        times.append((time.perf_counter() - start) * 1e6)
    return statistics.median(times), min(times)


if __name__ == "__main__":
    main()
