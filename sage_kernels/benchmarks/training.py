"""Forward and backward pass of trainable attention at the training shapes, beside torch's kernels.

    PYTHONPATH=sage_kernels/src python sage_kernels/benchmarks/training.py

Q, K, V and the gradient of the output are random in bfloat16, K with a bias for each head. Methods take turns on the
same tensors, with a few passes forward and backward in a row, as in the layers of a model: the host launches one while
the GPU is busy with the one before. Times are medians of one such pair, quantisation included, and TFLOP/s are over 3.5
times the operations of a forward pass. The error is the mean relative L1 of dQ, dK and dV to exact gradients of the
same kind of tensors at 2,048 tokens. Memory is the peak of both passes beyond inputs, output and gradients.
"""

import argparse
import contextlib
import json
import multiprocessing
import os
from collections.abc import Callable, Iterator
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

import torch
from result_file import add_commit_option, describe
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from sage_kernels.benchmark_shapes import TRAINING_SHAPES, BenchmarkShape
from sage_kernels.evidence import write_json
from sage_kernels.gpu_timing import time_in_turns
from sage_kernels.training import trainable_attention

RESULTS = Path(__file__).parent / "results"
ERROR_LENGTH = 2048
IN_A_ROW = 4
PASSES = 3.5  # a forward and a backward pass, in forward passes
Inputs = tuple[Tensor, Tensor, Tensor, Tensor]
Attention = Callable[[Tensor, Tensor, Tensor, bool], Tensor]


def sdpa(backend: SDPBackend) -> Attention:
    """torch's attention by one of its kernels."""

    def attend(q: Tensor, k: Tensor, v: Tensor, is_causal: bool) -> Tensor:
        with sdpa_kernel(backend):
            return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=is_causal)

    return attend


def sagebwd(precision: str) -> Attention:
    """Ours."""
    return lambda q, k, v, is_causal: trainable_attention(q, k, v, is_causal=is_causal, precision=precision)


METHODS: dict[str, Attention] = {
    "sdpa_flash": sdpa(SDPBackend.FLASH_ATTENTION),
    "sdpa_cudnn": sdpa(SDPBackend.CUDNN_ATTENTION),
    "sagebwd_int8": sagebwd("int8"),
    "sagebwd_fp8": sagebwd("fp8"),
}


def main() -> None:
    """Measure all shapes, print the table, write the result file, draw it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [shape.name for shape in TRAINING_SHAPES]
    parser.add_argument("--shapes", nargs="+", choices=names, default=names)
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--seconds", type=float, default=3.0, help="of measurements for each shape")
    parser.add_argument("--out", type=Path, default=RESULTS / "training.json")
    add_commit_option(parser)
    parser.add_argument("--plot", action="store_true", help="only draw the result file")
    options = parser.parse_args()
    if not options.plot:
        if not torch.cuda.is_available():
            parser.error("there is no CUDA GPU here; --plot draws an earlier result")
        shapes = [shape for shape in TRAINING_SHAPES if shape.name in options.shapes]
        jobs = [(shape, name) for shape in shapes for name in options.methods if name.startswith("sagebwd")]
        with multiprocessing.get_context("spawn").Pool(min(len(jobs) or 1, os.cpu_count() or 1)) as pool:
            pool.starmap(compile_ahead, jobs, chunksize=1)
        for result in measure(shapes, options):
            write_json(options.out, result)  # after each shape, so that a run that is broken off leaves what it has
    try:
        draw(json.loads(options.out.read_text(encoding="utf-8")), options.out.with_suffix(".png"))
    except ImportError:
        print("matplotlib is not installed: no plot (--plot draws it later, also on another machine)")


def compile_ahead(shape: BenchmarkShape, method: str) -> None:
    """Leave compiled kernels in Triton's cache on disk; what can't be compiled is told later."""
    with contextlib.suppress(Exception):
        small = BenchmarkShape(shape.name, 1, 2, 256, shape.head_dim)
        both_passes(METHODS[method], make_inputs(small, 256, torch.device("cuda")), shape.is_causal)()
        torch.cuda.synchronize()


def measure(shapes: list[BenchmarkShape], options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The content of the result file, as far as it is known after each shape."""
    device = torch.device("cuda", torch.cuda.current_device())
    rows: list[dict[str, Any]] = []
    result = {
        **describe("training.py", device, options.commit),
        "versions": {"cudnn": torch.backends.cudnn.version(), "cuda": torch.version.cuda, "triton": version("triton")},
        "rows": rows,
    }
    for shape in shapes:
        rows += measure_shape(shape, options, device)
        yield result


def measure_shape(shape: BenchmarkShape, options: argparse.Namespace, device: torch.device) -> list[dict[str, Any]]:
    """Rows of one shape; a method that can't run here is left out, and why is printed."""
    inputs = make_inputs(shape, shape.length, device)
    small = make_inputs(BenchmarkShape(shape.name, 1, 2, ERROR_LENGTH, shape.head_dim), ERROR_LENGTH, device)
    exact = exact_gradients(small, shape.is_causal)
    calls, rows = {}, []
    for name in options.methods:
        attend = METHODS[name]
        try:
            error = gradient_error(attend, small, exact, shape.is_causal)
            extra = extra_bytes(attend, inputs, shape.is_causal, device)
        except (RuntimeError, ValueError, TypeError) as reason:
            print(f"{shape}: no {name}: {str(reason).splitlines()[0][:120]}")
            continue
        calls[name] = [both_passes(attend, inputs, shape.is_causal)] * IN_A_ROW
        rows.append(
            {"benchmark": "fwd_bwd", "shape": shape.name, "method": name, "rel_l1": error, "extra_bytes": extra}
        )
    times = time_in_turns(calls, options.seconds, device)
    print(shape)
    for row in rows:
        ms = times[row["method"]]
        row |= {"ms": ms, "tflops": PASSES * shape.flops / ms / 1e9}
        ratio = times.get("sdpa_flash", ms) / ms
        print(
            f"  {row['method']:14} {ms:8.2f} ms {row['tflops']:6.0f} TFLOP/s, {ratio:5.2f} x sdpa_flash, "
            f"gradients' rel. L1 {row['rel_l1']:.4f}, {row['extra_bytes'] / 2**20:6.0f} MiB extra",
            flush=True,
        )
    return rows


def make_inputs(shape: BenchmarkShape, length: int, device: torch.device) -> Inputs:
    """Normal Q, K, V and gradient of the output; K with a bias for each head and channel."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(rows: int) -> Tensor:
        size = (shape.batch, shape.heads, rows, shape.head_dim)
        return torch.randn(size, generator=generator, device=device, dtype=torch.bfloat16)

    query, key, value = normal(length), normal(length).add_(normal(1), alpha=2), normal(length)
    return query.requires_grad_(), key.requires_grad_(), value.requires_grad_(), normal(length)


def both_passes(attend: Attention, inputs: Inputs, is_causal: bool) -> Callable[[], object]:
    """A forward and a backward pass; the gradients are let go."""
    q, k, v, d_output = inputs
    return lambda: torch.autograd.grad(attend(q, k, v, is_causal), (q, k, v), d_output)


def exact_gradients(inputs: Inputs, is_causal: bool) -> list[Tensor]:
    """Of dQ, dK and dV in float64."""
    q, k, v, d_output = (x.detach().double().requires_grad_() for x in inputs)
    scores = q @ k.mT * q.shape[-1] ** -0.5
    if is_causal:
        hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
        scores = scores.masked_fill(hidden, -torch.inf)
    return list(torch.autograd.grad(scores.softmax(-1) @ v, (q, k, v), d_output.detach()))


def gradient_error(attend: Attention, inputs: Inputs, exact: list[Tensor], is_causal: bool) -> float:
    """Mean over dQ, dK and dV of the relative L1."""
    q, k, v, d_output = inputs
    found = torch.autograd.grad(attend(q, k, v, is_causal), (q, k, v), d_output)
    errors = [float((x - y).abs().sum() / y.abs().sum()) for x, y in zip(found, exact, strict=True)]
    return sum(errors) / len(errors)


def extra_bytes(attend: Attention, inputs: Inputs, is_causal: bool, device: torch.device) -> int:
    """Most memory that both passes hold at once beyond the inputs, the output and the three gradients."""
    call = both_passes(attend, inputs, is_causal)
    call()
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    call()
    torch.cuda.synchronize(device)
    results = sum(x.numel() * x.element_size() for x in (inputs[0], *inputs[:3]))
    return torch.cuda.max_memory_allocated(device) - before - results


def version(package: str) -> str | None:
    """Of an installed package."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def draw(result: dict[str, Any], path: Path) -> None:
    """Bars, one group for each shape."""
    pyplot = import_module("matplotlib.pyplot")
    rows = result["rows"]
    shapes, methods = (list(dict.fromkeys(row[key] for row in rows)) for key in ("shape", "method"))
    figure, axes = pyplot.subplots(figsize=(8, 4), layout="constrained")
    width = 0.84 / len(methods)
    for number, method in enumerate(methods):
        found = {row["shape"]: row["tflops"] for row in rows if row["method"] == method}
        places = [index + (number - (len(methods) - 1) / 2) * width for index in range(len(shapes))]
        axes.bar(places, [found.get(shape, 0.0) for shape in shapes], width, label=method)
    axes.set_xticks(range(len(shapes)), shapes)
    axes.set_ylabel("TFLOP/s, forward and backward pass")
    axes.set_title(f"Trainable attention on {result['gpu']}, torch {result['torch']}, {result['date']}")
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)
    axes.legend(ncols=2, frameon=False)
    figure.savefig(path, dpi=150)
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
