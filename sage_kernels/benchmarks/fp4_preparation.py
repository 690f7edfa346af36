"""What the FP4 rung costs around its attention kernel: preparation time, memory and host time.

    python sage_kernels/benchmarks/fp4_preparation.py [--output FILE]

Runs on any NVIDIA GPU: of the FP4 instructions preparation needs only the rounding to E2M1, which takes a few integer
instructions where the GPU has none, and memory and host time don't depend on the attention kernel's speed.
"""

import argparse
import math
import statistics
import time
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from sage_kernels.attention_call import AttentionCall, make_call
from sage_kernels.benchmark_shapes import FORWARD_SHAPES, BenchmarkShape
from sage_kernels.evidence import write_json
from sage_kernels.gpu_timing import time_on_gpu
from sage_kernels.kernels.nvfp4_cuda import NVFP4CudaKernel
from sage_kernels.precision import Precision

_HOST_CALLS = 200
_COLD_BYTES = 1 << 28  # of Q, K and V between two calls on the same ones: more than a cache holds
_IN_A_ROW = 6  # calls at least
_COPY_BYTES = 1 << 30
_HOST_SHAPE = BenchmarkShape("host", 1, 4, 256, 128)  # so small that the GPU is never what the host waits for


def main() -> None:
    """Print a table, and write it as JSON where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="also write the rows as JSON")
    output = parser.parse_args().output
    device = torch.device("cuda", torch.cuda.current_device())
    kernel = NVFP4CudaKernel(emulate_instructions=torch.cuda.get_device_capability(device)[0] != 12)
    bandwidth = copy_bandwidth(device)
    print(f"{torch.cuda.get_device_name(device)}: a copy moves {bandwidth / 1e12:.2f} TB/s")
    rows = [measure(shape, kernel, bandwidth, device) for shape in tqdm(FORWARD_SHAPES, leave=False)]
    print(f"{'shape':12} {'prepare ms':>10} {'of floor':>9} {'memory / bf16 Q, K, V':>22}")
    for row in rows:
        print(f"{row['shape']:12} {row['ms']:10.3f} {row['floor_share']:9.2f} {row['memory_ratio']:22.3f}")
    hosts = host_times(kernel, device)
    print("host us a call: " + ", ".join(f"{name} {value:.1f}" for name, value in hosts.items()))
    if output is not None:
        record = {
            "machine": torch.cuda.get_device_name(device),
            "gpu": torch.cuda.get_device_name(device),
            "torch": torch.__version__,
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "command": "python sage_kernels/benchmarks/fp4_preparation.py",
            "copy_bytes_a_second": bandwidth,
            "host_us": hosts,
            "rows": rows,
        }
        write_json(output, record)


def measure(shape: BenchmarkShape, kernel: NVFP4CudaKernel, bandwidth: float, device: torch.device) -> dict[str, Any]:
    """Preparation of one shape: time, its share of the floor, and the most memory beyond Q, K, V and the output.

    Timed are calls in a row, so that the host is not what is timed, on tensors that have left the cache. The floor is Q
    once, K and V twice (their means come first) and the packed operands once, at the speed of a copy.
    """
    size = (shape.batch, shape.heads, shape.length, shape.head_dim)
    operand = 2 * math.prod(size)

    def new_call() -> AttentionCall:
        return call_of(*(torch.randn(size, device=device, dtype=torch.bfloat16) for _ in range(3)), shape.is_causal)

    call = new_call()
    kernel.prepare(call)
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    state = kernel.prepare(call)
    torch.cuda.synchronize(device)
    extra = torch.cuda.max_memory_allocated(device) - before  # run() allocates the output and nothing else
    packed = torch.cuda.memory_allocated(device) - before
    del state
    calls = [call, *(new_call() for _ in range(_COLD_BYTES // (3 * operand)))]
    calls *= -(-_IN_A_ROW // len(calls))

    def prepare_all() -> None:
        for each in calls:
            kernel.prepare(each)

    milliseconds = time_on_gpu(prepare_all, device) / len(calls)
    floor = (5 * operand + packed) / bandwidth * 1e3
    return {
        "benchmark": "prepare",
        "shape": shape.name,
        "method": "fp4",
        "ms": milliseconds,
        "floor_ms": floor,
        "floor_share": floor / milliseconds,
        "extra_bytes": extra,
        "memory_ratio": extra / (3 * operand),
    }


def call_of(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, is_causal: bool, precision: Precision = "fp4"
) -> AttentionCall:
    """A call with all options at their defaults."""
    return make_call(q, k, v, None, is_causal, None, False, None, "BHND", precision, False, False)


def copy_bandwidth(device: torch.device) -> float:
    """Bytes a second that a large copy reads and writes."""
    source = torch.empty(_COPY_BYTES, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * _COPY_BYTES / (time_on_gpu(lambda: target.copy_(source), device) / 1e3)


def host_times(kernel: NVFP4CudaKernel, device: torch.device) -> dict[str, float]:
    """Median microseconds of host time of one eager call: checks, preparation and attention, beside torch's SDPA."""
    shape = (_HOST_SHAPE.batch, _HOST_SHAPE.heads, _HOST_SHAPE.length, _HOST_SHAPE.head_dim)
    q, k, v = (torch.randn(shape, device=device, dtype=torch.bfloat16) for _ in range(3))
    call = call_of(q, k, v, False)
    state = kernel.prepare(call)
    return {
        "fp4_call": host_time(lambda: kernel.run(kernel.prepare(call_of(q, k, v, False))), device),
        "fp4_checks": host_time(lambda: call_of(q, k, v, False), device),
        "fp4_prepare": host_time(lambda: kernel.prepare(call), device),
        "fp4_run": host_time(lambda: kernel.run(state), device),
        "sdpa": host_time(lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v), device),
    }


def host_time(call: Callable[[], object], device: torch.device) -> float:
    """Median microseconds until `call` returns, with an idle GPU."""
    times = []
    for _ in range(_HOST_CALLS):
        torch.cuda.synchronize(device)
        start = time.perf_counter()
        call()
        times.append((time.perf_counter() - start) * 1e6)
    return statistics.median(times)


if __name__ == "__main__":
    main()
