"""The selftest: are the kernels right on this GPU, and how fast are they? Writes what an issue needs."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from sage_kernels import __version__
from sage_kernels.architectures import device_architecture
from sage_kernels.attention import attention, explain, prepare, run
from sage_kernels.benchmark_shapes import FORWARD_SHAPES, BenchmarkShape
from sage_kernels.capabilities import capabilities
from sage_kernels.doctor import doctor
from sage_kernels.evidence import FAMILIES, Case, family_source_hashes, make_record, write_json
from sage_kernels.gpu_timing import extra_bytes, time_on_gpu
from sage_kernels.precision import Precision
from sage_kernels.reference import attention_fp32
from sage_kernels.selftest_grid import grid, run_call

_SDPA = {"sdpa_flash": SDPBackend.FLASH_ATTENTION, "sdpa_cudnn": SDPBackend.CUDNN_ATTENTION}
_SAMPLED_HEADS, _SAMPLED_ROWS = 2, 128  # whose error to float32 is measured at full length

_T = TypeVar("_T")


@dataclass(frozen=True)
class _Method:
    name: str
    call: Callable[[], Tensor]
    benchmark: str = "whole_call"


def selftest(output: Path, device: torch.device, timings: bool) -> bool:
    """Run the grid and the timings, write `output`, print the summary.

    Args:
        output: JSON file to write: an evidence record with "rows" of timings and the "doctor" text.
        device: a CUDA device.
        timings: whether to time the benchmark shapes too.

    Returns:
        Whether there were cases, and all passed.

    Raises:
        ValueError: not an NVIDIA GPU.
    """
    architecture = device_architecture(device)
    if architecture is None:
        raise ValueError(f"the selftest runs on NVIDIA GPUs, got device {device}")
    torch.cuda.set_device(device)
    rungs = next(each.precisions for each in capabilities() if each.device == str(device))
    cases = check(rungs, device)
    rows = list(measure(rungs, device)) if timings else []
    families = [family for family in FAMILIES if family_source_hashes(family)]
    record = make_record(families, cases, architecture.target, f"sage_kernels {__version__}")
    write_json(output, {**record, "rows": rows, "doctor": doctor()})
    print(summary(record, rungs, rows))
    print(f"\nPaste the lines above into an issue, and attach {output}.")
    return bool(cases) and all(case.passed for case in cases)


def check(rungs: Iterable[Precision], device: torch.device) -> list[Case]:
    """Cases of the grid at every rung; calls that a rung refuses are left out."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")  # the references' products
    cases: list[Case] = []
    try:
        for precision, call in progress([(rung, call) for rung in rungs for call in grid()], "correctness"):
            q, k, v = call.operands(device)
            gqa = call.kind == "gqa"
            if explain(q, k, v, precision=precision, enable_gqa=gqa, **call.options(device)).kernel is None:
                continue
            cases += run_call(call, precision, attention, device)
    finally:
        torch.set_float32_matmul_precision(before)
    return cases


def measure(rungs: Iterable[Precision], device: torch.device) -> Iterator[dict[str, Any]]:
    """Rows of timings, as in the result files of the benchmarks; what doesn't fit into memory is left out."""
    rungs = [rung for rung in rungs if rung != "fp16"]
    for shape in progress(FORWARD_SHAPES, "timings"):
        try:
            q, k, v = (
                torch.randn(shape.batch, shape.heads, shape.length, shape.head_dim, device=device, dtype=torch.bfloat16)
                for _ in range(3)
            )
            rows = [_row(shape, method, (q, k, v), device) for method in _methods(shape, (q, k, v), rungs)]
        except torch.cuda.OutOfMemoryError:
            print(f"{shape}: does not fit into the memory of this GPU")
            continue
        yield from (row for row in rows if row is not None)


def summary(record: dict[str, Any], rungs: Iterable[Precision], rows: list[dict[str, Any]]) -> str:
    """What an issue needs to show, in a few lines."""
    failed = [case for case in record["cases"] if not case["passed"]]
    lines = [
        f"sage-kernels selftest {__version__}: {record['gpu']}, driver {record['driver']}, torch {record['torch']}",
        f"runs: {', '.join(rungs)}",
        f"correctness: {len(record['cases']) - len(failed)} of {len(record['cases'])} cases passed",
        *(f"  FAILED {case['name']}: error {_number(case['max_error'])}, bound {case['bound']:.4g}" for case in failed),
    ]
    for shape in dict.fromkeys(row["shape"] for row in rows):
        entries = [row for row in rows if row["shape"] == shape]
        best = min((row["ms"] for row in entries if row["method"] in _SDPA), default=None)
        lines.append(shape)
        for row in entries:
            speed = f", {best / row['ms']:.2f} x the best of SDPA" if best and row["method"] not in _SDPA else ""
            lines.append(
                f"  {row['method']:10} {row['benchmark']:11} {row['ms']:9.3f} ms {row['tflops']:6.0f} TFLOP/s, "
                f"rel. L1 {row['rel_l1']:.4f}{speed}"
            )
    return "\n".join(lines)


def progress(items: Iterable[_T], description: str) -> Iterable[_T]:
    """A progress bar where tqdm is installed; the kernel package itself needs only torch."""
    try:
        tqdm = import_module("tqdm").tqdm
    except ImportError:
        print(f"{description} ...", flush=True)
        return items
    bar: Iterable[_T] = tqdm(items, desc=description)
    return bar


def _methods(
    shape: BenchmarkShape, qkv: tuple[Tensor, Tensor, Tensor], rungs: Iterable[Precision]
) -> Iterator[_Method]:
    def sdpa(backend: SDPBackend) -> Callable[[], Tensor]:
        def call() -> Tensor:
            with sdpa_kernel(backend):
                return torch.nn.functional.scaled_dot_product_attention(*qkv, is_causal=shape.is_causal)

        return call

    def ours(precision: Precision) -> Callable[[], Tensor]:
        return lambda: _tensor(attention(*qkv, is_causal=shape.is_causal, precision=precision))

    def prepared(precision: Precision) -> Callable[[], Tensor]:
        operands = prepare(*qkv, is_causal=shape.is_causal, precision=precision)
        return lambda: _tensor(run(operands))

    for name, backend in _SDPA.items():
        yield _Method(name, sdpa(backend))
    for precision in (*rungs, "auto"):
        yield _Method(precision, ours(precision))
    for precision in rungs:
        yield _Method(precision, prepared(precision), "kernel_only")


def _row(
    shape: BenchmarkShape, method: _Method, qkv: tuple[Tensor, Tensor, Tensor], device: torch.device
) -> dict[str, Any] | None:
    """Measurements of one method; None where this torch or GPU doesn't have it."""
    try:
        output = method.call()
    except torch.cuda.OutOfMemoryError:
        raise
    except RuntimeError as error:
        if method.name in _SDPA:
            print(f"{shape}: no {method.name}: {str(error).splitlines()[0]}")
            return None
        raise
    rel_l1 = sampled_error(output, qkv, shape.is_causal)
    del output
    extra = extra_bytes(method.call, device)
    milliseconds = time_on_gpu(method.call, device)
    return {
        "benchmark": method.benchmark,
        "shape": shape.name,
        "method": method.name,
        "ms": milliseconds,
        "tflops": shape.flops / milliseconds / 1e9,
        "rel_l1": rel_l1,
        "extra_bytes": extra,
    }


def sampled_error(output: Tensor, qkv: tuple[Tensor, Tensor, Tensor], is_causal: bool) -> float:
    """Relative L1 to exact attention over rows spread evenly over the sequence, of the first heads."""
    q, k, v = (x[:, :_SAMPLED_HEADS] for x in qkv)
    rows = torch.linspace(0, q.shape[2] - 1, _SAMPLED_ROWS, device=q.device).long()
    mask = torch.arange(k.shape[2], device=q.device) <= rows[:, None] if is_causal else None
    expected, _ = attention_fp32(q[:, :, rows], k, v, attn_mask=mask)
    found = output[:, :_SAMPLED_HEADS, rows].float()
    return ((found - expected).abs().sum() / expected.abs().sum()).item()


def _number(error: float | None) -> str:
    return "not finite" if error is None else f"{error:.4g}"


def _tensor(result: Tensor | tuple[Tensor, Tensor]) -> Tensor:
    assert isinstance(result, Tensor)
    return result
