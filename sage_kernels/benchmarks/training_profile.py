"""What Nsight Compute counts in the kernels of trainable attention on Hopper: where their time goes.

    PYTHONPATH=sage_kernels/src python sage_kernels/benchmarks/training_profile.py

One forward and backward pass of each training shape, under `ncu` of the CUDA toolkit, after one that isn't counted.
Times are those of kernels by themselves at a fixed clock, as the profiler sets it, and so longer than a benchmark's.
"""

import argparse
import csv
import glob
import io
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from result_file import add_commit_option, describe

from sage_kernels.benchmark_shapes import TRAINING_SHAPES
from sage_kernels.evidence import write_json
from sage_kernels.training import trainable_attention

RESULTS = Path(__file__).parent / "results"
# By the names of the result file. Shares are in percent of what the hardware can do in the kernel's time.
METRICS = {
    "us": "gpu__time_duration.sum",
    "instructions": "smsp__inst_executed.sum",
    "issue_slots_busy": "smsp__issue_active.avg.pct_of_peak_sustained_elapsed",
    "tensor_cores_busy": "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_elapsed",
    "alu_busy": "sm__inst_executed_pipe_alu.avg.pct_of_peak_sustained_elapsed",
    "fma_busy": "sm__inst_executed_pipe_fma.avg.pct_of_peak_sustained_elapsed",
    "special_functions_busy": "sm__inst_executed_pipe_xu.avg.pct_of_peak_sustained_elapsed",
    "l2_busy": "lts__throughput.avg.pct_of_peak_sustained_elapsed",
    "dram_busy": "gpu__dram_throughput.avg.pct_of_peak_sustained_elapsed",
}
_PREFIX = "training_sm90_"


def main() -> None:
    """Profile, print the table, write the result file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [shape.name for shape in TRAINING_SHAPES]
    parser.add_argument("--shapes", nargs="+", choices=names, default=names)
    parser.add_argument("--out", type=Path, default=RESULTS / "training_profile.json")
    parser.add_argument("--run", choices=names, help="make the passes of one shape and nothing else")
    add_commit_option(parser)
    options = parser.parse_args()
    if options.run:
        run_passes(options.run)
        return
    ncu = shutil.which("ncu") or next(iter(sorted(glob.glob("/usr/local/cuda*/bin/ncu"), reverse=True)), None)
    if ncu is None or not torch.cuda.is_available():
        parser.error("this needs a CUDA GPU, and ncu (Nsight Compute) on PATH or in /usr/local/cuda*/bin")
    record = describe("training_profile.py", None, options.commit)
    rows = [row for name in options.shapes for row in profile(ncu, name)]
    write_json(options.out, {**record, "rows": rows})
    print(f"wrote {options.out}")


def run_passes(name: str) -> None:
    """Two passes, of which the second counts."""
    shape = next(shape for shape in TRAINING_SHAPES if shape.name == name)
    size = (shape.batch, shape.heads, shape.length, shape.head_dim)
    tensors = [torch.randn(size, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(3)]
    for _ in range(2):
        output = trainable_attention(*tensors, is_causal=shape.is_causal)
        torch.autograd.grad(output, tensors, torch.randn_like(output))
    torch.cuda.synchronize()


def profile(ncu: str, name: str) -> Iterator[dict[str, Any]]:
    """Rows of one shape: of each kernel, its last launch."""
    command = [ncu, "--csv", "--page", "raw", "--print-units", "base", "-k", f"regex:{_PREFIX}"]
    command += ["--metrics", ",".join(METRICS.values()), sys.executable, __file__, "--run", name]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"ncu failed on {name}:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    for kernel, values in read_counts(done.stdout, METRICS).items():
        row = {"benchmark": "profile", "shape": name, "method": kernel, **values, "us": values["us"] / 1000}
        shares = ", ".join(f"{key.removesuffix('_busy')} {value:.0f} %" for key, value in row.items() if "busy" in key)
        print(f"{name} {kernel}: {row['us']:.0f} us, {shares}", flush=True)
        yield row


def read_counts(text: str, metrics: dict[str, str]) -> dict[str, dict[str, float]]:
    """Numbers of each kernel's last launch in ncu's CSV, by kernel and by the names of `metrics`."""
    start = text.index('"ID"')  # before it stands what the program and ncu print
    lines = csv.DictReader(io.StringIO(text[start:]))
    next(lines)  # units
    return {
        line["Kernel Name"].partition("(")[0].removeprefix(_PREFIX): {
            key: float(line[metric].replace(",", "")) for key, metric in metrics.items()
        }
        for line in lines
    }


if __name__ == "__main__":
    main()
