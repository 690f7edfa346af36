"""The selftest: are the kernels right on this GPU, and how fast are they? Writes what an issue needs."""

import platform
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import date
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
from sage_kernels.dispatch import Refusal
from sage_kernels.doctor import doctor
from sage_kernels.evidence import FAMILIES, Case, family_source_hashes, make_record, write_json
from sage_kernels.gpu_timing import extra_bytes, time_on_gpu
from sage_kernels.kernels import find_kernel
from sage_kernels.precision import Precision
from sage_kernels.reference import attention_fp32
from sage_kernels.selftest_grid import grid, kernel_recipe, run_call
from sage_kernels.selftest_warmup import warm_up

_SDPA = {"sdpa_flash": SDPBackend.FLASH_ATTENTION, "sdpa_cudnn": SDPBackend.CUDNN_ATTENTION}
_SHOWN = 20  # failed cases of the summary; the file has all
_SAMPLED_HEADS, _SAMPLED_ROWS = 2, 128  # whose error to float32 is measured at full length

_T = TypeVar("_T")


@dataclass(frozen=True)
class _Method:
    name: str
    call: Callable[[], Tensor]
    benchmark: str = "whole_call"


@dataclass
class Report:
    """What was found so far.

    Attributes:
        rungs: what this GPU runs natively.
        refusals: what it doesn't, and why.
        kernels: names of those that computed the cases, by rung.
        rows: of timings, as in the result files of the benchmarks.
        errors: what broke off.
    """

    rungs: tuple[Precision, ...]
    refusals: tuple[Refusal, ...] = ()
    cases: list[Case] = field(default_factory=list)
    kernels: dict[str, list[str]] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)


def selftest(output: Path, device: torch.device, timings: bool) -> bool:
    """Run the grid and the timings, write `output`, print the summary.

    Only what this GPU runs natively is run: nothing is emulated.

    Args:
        output: JSON file to write: an evidence record with "rows" of timings, "kernels" by precision, "errors" of what
            could not be finished, and the "doctor" text.
        device: a CUDA device.
        timings: whether to time the benchmark shapes too.

    Returns:
        Whether there were cases, all passed, and nothing broke off.

    Raises:
        ValueError: not an NVIDIA GPU.
    """
    architecture = device_architecture(device)
    if architecture is None:
        raise ValueError(f"the selftest runs on NVIDIA GPUs, got device {device}")
    torch.cuda.set_device(device)
    here = next(each for each in capabilities() if each.device == str(device))
    report = Report(here.precisions, here.refusals)
    warm_up(here.precisions, device, timings, progress)
    check(report, device)
    if timings:
        try:
            report.rows += measure(here.precisions, device)
        except Exception as error:  # a report of what was found so far is worth more than a traceback
            report.errors.append(f"timings: {_describe(error)}")
    families = [family for family in FAMILIES if family_source_hashes(family)]
    record = make_record(families, report.cases, architecture.target, f"sage_kernels {__version__}")
    record |= {"rows": report.rows, "kernels": report.kernels, "errors": report.errors, "doctor": doctor()}
    write_json(output, record)
    print(summary(record, report))
    print(f"\nPaste the lines above into an issue, and attach {output}.")
    return bool(report.cases) and all(case.passed for case in report.cases) and not report.errors


def check(report: Report, device: torch.device) -> None:
    """Cases of the grid at every rung; calls that a rung refuses are left out."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")  # the references' products
    try:
        for precision, call in progress([(rung, call) for rung in report.rungs for call in grid()], "correctness"):
            q, k, v = call.operands(device)
            gqa = call.kind == "gqa"
            name = explain(q, k, v, precision=precision, enable_gqa=gqa, **call.options(device)).kernel
            if name is None:
                continue
            used = report.kernels.setdefault(precision, [])
            used += [name] if name not in used else []
            try:
                recipe = kernel_recipe(find_kernel(name), call, device)
                report.cases += run_call(call, precision, attention, device, recipe)
            except Exception as error:  # such as a compiler that is missing: the other cases may run
                report.cases.append(Case(f"{precision}/{call.name}/ran", False, None, None))
                report.errors.append(f"{precision}/{call.name}: {_describe(error)}")
    finally:
        torch.set_float32_matmul_precision(before)


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


def summary(record: dict[str, Any], report: Report) -> str:
    """What an issue needs to show, in a few lines."""
    failed = [case for case in report.cases if not case.passed]
    rungs = (f"{rung} ({', '.join(report.kernels.get(rung, ['nothing of the grid']))})" for rung in report.rungs)
    errors = list(dict.fromkeys(report.errors))
    lines = [
        f"sage-kernels selftest {__version__}: {record['gpu']}, driver {record['driver']}, torch {record['torch']}",
        f"runs: {', '.join(rungs)}; nothing is emulated",
        *(f"not here: {refusal}" for refusal in report.refusals),
        f"correctness: {len(report.cases) - len(failed)} of {len(report.cases)} cases passed",
        *(f"  FAILED {_describe_case(case)}" for case in failed[:_SHOWN]),
        *([f"  and {len(failed) - _SHOWN} more, in the file"] if len(failed) > _SHOWN else []),
        *(f"  ERROR {error}" for error in errors[:_SHOWN]),
    ]
    return "\n".join([*lines, *timing_lines(report.rows)])


def bench(output: Path | None, device: torch.device) -> None:
    """Time the benchmark shapes, print them, and write them where `output` says.

    Raises:
        ValueError: not an NVIDIA GPU.
    """
    if device_architecture(device) is None:
        raise ValueError(f"the benchmark runs on NVIDIA GPUs, got device {device}")
    torch.cuda.set_device(device)
    rungs = next(each.precisions for each in capabilities() if each.device == str(device))
    rows = list(measure(rungs, device))
    if output is not None:
        machine = {"machine": platform.platform(), "gpu": torch.cuda.get_device_name(), "torch": torch.__version__}
        version = {"commit": f"sage_kernels {__version__}", "date": date.today().isoformat()}
        write_json(output, {**machine, **version, "command": "sage-kernels bench", "rows": rows})
    print("\n".join([torch.cuda.get_device_name(), *timing_lines(rows)]))


def timing_lines(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Rows of timings for people, by shape."""
    lines = []
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
    return lines


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


def _describe_case(case: Case) -> str:
    if case.bound is None:
        return f"{case.name}: broke off"
    error = "not finite" if case.max_error is None else f"{case.max_error:.4g}"
    return f"{case.name}: error {error}, bound {case.bound:.4g}"


def _describe(error: Exception) -> str:
    """In one line."""
    first = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {first}"


def _tensor(result: Tensor | tuple[Tensor, Tensor]) -> Tensor:
    assert isinstance(result, Tensor)
    return result
