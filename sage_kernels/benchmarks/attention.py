"""Attention at the sizes of seven models: rungs of this package, torch's kernels, sageattention where installed.

    PYTHONPATH=sage_kernels/src python sage_kernels/benchmarks/attention.py
    python sage_kernels/benchmarks/attention.py --plot    # draws the result file again, without a GPU

Q, K and V are random in bfloat16, K with a bias for each head, as in diffusion models. Methods take turns on the same
tensors; times are medians. "whole_call" includes quantisation, "kernel_only" does not. The error is relative L1 to
exact attention in float32, over rows spread evenly over the sequence of two heads.
"""

import argparse
import importlib
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from result_file import add_commit_option, describe
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import sage_kernels
from sage_kernels.benchmark_shapes import FORWARD_SHAPES, BenchmarkShape
from sage_kernels.evidence import write_json
from sage_kernels.gpu_timing import extra_bytes, time_in_turns
from sage_kernels.selftest import sampled_error

RESULTS = Path(__file__).parent / "results"
SDPA = {"sdpa_flash": SDPBackend.FLASH_ATTENTION, "sdpa_cudnn": SDPBackend.CUDNN_ATTENTION}
RUNGS = ("fp4", "int8", "int8_fp16", "auto")
# Dense TFLOP/s of the tensor cores with 8-bit operands, by what the product's name holds.
PEAKS = {"H100": 1979.0, "H200": 1979.0}
CACHED_BYTES = 256 << 20  # inputs of one measurement in all: several times the L2 cache of any GPU
Inputs = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class Method:
    """One way to compute attention: a function of Q, K and V, made ready for one set of them."""

    name: str
    benchmark: str
    make: Callable[[Inputs, bool], Callable[[], Tensor]]


def main() -> None:
    """Measure all shapes, print the table, write the result file, draw it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [shape.name for shape in FORWARD_SHAPES]
    parser.add_argument("--shapes", nargs="+", choices=names, default=names)
    parser.add_argument("--seconds", type=float, default=4.0, help="of measurements for each shape")
    parser.add_argument("--out", type=Path, default=RESULTS / "attention.json")
    add_commit_option(parser)
    parser.add_argument("--plot", action="store_true", help="only draw the result file")
    options = parser.parse_args()
    if not options.plot:
        if not torch.cuda.is_available():
            parser.error("there is no CUDA GPU here; --plot draws an earlier result")
        write_json(options.out, measure([shape for shape in FORWARD_SHAPES if shape.name in options.shapes], options))
    try:
        draw(json.loads(options.out.read_text(encoding="utf-8")), options.out.with_suffix(".png"))
    except ImportError:
        print("matplotlib is not installed: no plot (--plot draws it later, also on another machine)")


def measure(shapes: list[BenchmarkShape], options: argparse.Namespace) -> dict[str, Any]:
    """The content of the result file."""
    device = torch.device("cuda", torch.cuda.current_device())
    methods = [*sdpa_methods(), *(rung(name) for name in RUNGS), *(prepared(name) for name in RUNGS[:-1])]
    methods += sageattention_methods()
    rows: list[dict[str, Any]] = []
    for shape in shapes:
        start = time.perf_counter()
        found = measure_shape(shape, methods, options.seconds, device)
        print(f"{shape} ({time.perf_counter() - start:.0f} s)")
        for row in found:
            print_row(row)
        rows += found
    return {
        **describe("attention.py", device, options.commit),
        "versions": {"cudnn": torch.backends.cudnn.version(), "cuda": torch.version.cuda, "triton": version("triton")},
        "rows": rows,
    }


def measure_shape(
    shape: BenchmarkShape, methods: list[Method], seconds: float, device: torch.device
) -> list[dict[str, Any]]:
    """Rows of one shape; a method that can't run here is left out, and why is printed."""
    count = max(1, min(8, CACHED_BYTES // (6 * shape.batch * shape.heads * shape.length * shape.head_dim)))
    inputs = [make_inputs(shape, seed, device) for seed in range(count)]
    calls, rows = {}, []
    for method in methods:
        try:
            first = method.make(inputs[0], shape.is_causal)
            error = sampled_error(first(), inputs[0], shape.is_causal)
            extra = extra_bytes(first, device)
            calls[method.benchmark, method.name] = [
                first,
                *(method.make(each, shape.is_causal) for each in inputs[1:]),
            ]
        except (RuntimeError, ValueError, TypeError, AssertionError) as reason:  # of any of the packages
            print(f"{shape}: no {method.name}: {str(reason).splitlines()[0][:120]}")
            continue
        rows.append({"benchmark": method.benchmark, "shape": shape.name, "method": method.name, "rel_l1": error})
        rows[-1]["extra_bytes"] = extra
    times = time_in_turns({"/".join(key): each for key, each in calls.items()}, seconds, device)
    for row in rows:
        ms = times[f"{row['benchmark']}/{row['method']}"]
        row |= {"ms": ms, "tflops": shape.flops / ms / 1e9}
    return rows


def make_inputs(shape: BenchmarkShape, seed: int, device: torch.device) -> Inputs:
    """Normal Q, K and V; K with a bias for each head and channel."""
    generator = torch.Generator(device).manual_seed(seed)

    def normal(length: int) -> Tensor:
        size = (shape.batch, shape.heads, length, shape.head_dim)
        return torch.randn(size, generator=generator, device=device, dtype=torch.bfloat16)

    return normal(shape.length), normal(shape.length).add_(normal(1), alpha=2), normal(shape.length)


def sdpa_methods() -> list[Method]:
    """torch's own kernels."""

    def make(backend: SDPBackend) -> Callable[[Inputs, bool], Callable[[], Tensor]]:
        def call(qkv: Inputs, is_causal: bool) -> Tensor:
            with sdpa_kernel(backend):
                return torch.nn.functional.scaled_dot_product_attention(*qkv, is_causal=is_causal)

        return lambda qkv, is_causal: lambda: call(qkv, is_causal)

    return [Method(name, "whole_call", make(backend)) for name, backend in SDPA.items()]


def rung(precision: str) -> Method:
    """attention() of this package."""

    def make(qkv: Inputs, is_causal: bool) -> Callable[[], Tensor]:
        return lambda: sage_kernels.attention(*qkv, is_causal=is_causal, precision=precision)

    return Method(precision, "whole_call", make)


def prepared(precision: str) -> Method:
    """run() of this package, on operands that are quantised already."""

    def make(qkv: Inputs, is_causal: bool) -> Callable[[], Tensor]:
        operands = sage_kernels.prepare(*qkv, is_causal=is_causal, precision=precision)
        return lambda: sage_kernels.run(operands)

    return Method(precision, "kernel_only", make)


def sageattention_methods() -> list[Method]:
    """The package of that name, where it is installed."""
    try:
        sageattn = importlib.import_module("sageattention").sageattn
    except ImportError:
        print("sageattention is not installed: left out")
        return []

    def make(qkv: Inputs, is_causal: bool) -> Callable[[], Tensor]:
        q, k, v = qkv
        own_k = k.clone()  # from which that package subtracts the mean, in place
        return lambda: sageattn(q, own_k, v, is_causal=is_causal)

    return [Method(f"sageattention_{version('sageattention')}", "whole_call", make)]


def version(package: str) -> str | None:
    """Of an installed package."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def print_row(row: dict[str, Any]) -> None:
    """One line of the table."""
    name = torch.cuda.get_device_name()
    peak = next((peak for product, peak in PEAKS.items() if product in name), None)
    share = f" {row['tflops'] / peak:5.1%} of the 8-bit peak" if peak else ""
    print(
        f"  {row['method']:20} {row['benchmark']:11} {row['ms']:9.3f} ms {row['tflops']:6.0f} TFLOP/s{share}, "
        f"rel. L1 {row['rel_l1']:.4f}, {row['extra_bytes'] / 2**20:6.0f} MiB extra",
        flush=True,
    )


def draw(result: dict[str, Any], path: Path) -> None:
    """Bars of whole calls, one group for each shape."""
    pyplot = importlib.import_module("matplotlib.pyplot")
    rows = [row for row in result["rows"] if row["benchmark"] == "whole_call"]
    shapes, methods = (list(dict.fromkeys(row[key] for row in rows)) for key in ("shape", "method"))
    figure, axes = pyplot.subplots(figsize=(11, 4.5), layout="constrained")
    width = 0.84 / len(methods)
    for number, method in enumerate(methods):
        found = {row["shape"]: row["tflops"] for row in rows if row["method"] == method}
        places = [index + (number - (len(methods) - 1) / 2) * width for index in range(len(shapes))]
        axes.bar(places, [found.get(shape, 0.0) for shape in shapes], width, label=method)
    axes.set_xticks(range(len(shapes)), shapes)
    axes.set_ylabel("TFLOP/s, whole call")
    axes.set_title(f"Attention on {result['gpu']}, torch {result['torch']}, {result['date']}")
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)
    axes.legend(ncols=3, frameon=False)
    figure.savefig(path, dpi=150)
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
