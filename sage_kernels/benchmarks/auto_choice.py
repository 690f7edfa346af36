"""precision="auto" beside torch's fastest 16-bit kernel where calls are small or of rarer kinds: what choosing costs.

    PYTHONPATH=sage_kernels/src python sage_kernels/benchmarks/auto_choice.py

Two times of whole calls: in a row, so that of a small one it counts whichever takes longer, the GPU or the host
("whole_call"), and replayed as a CUDA graph, so that the GPU alone counts ("graph"). torch's kernels are chosen once
for a row of calls, which costs them nothing; "sdpa" is torch's own choice among them. Most lengths lie between those
that the router's table was measured at.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from result_file import add_commit_option, describe
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

import sage_kernels
from sage_kernels.evidence import write_json
from sage_kernels.gpu_timing import time_in_turns

RESULTS = Path(__file__).parent / "results"
BACKENDS = {
    "sdpa_flash": SDPBackend.FLASH_ATTENTION,
    "sdpa_cudnn": SDPBackend.CUDNN_ATTENTION,
    "sdpa_efficient": SDPBackend.EFFICIENT_ATTENTION,
}
RUNGS = ("auto", "int8", "int8_fp16")
IN_A_ROW = 20


@dataclass(frozen=True)
class Shape:
    """Attention of `heads` heads; `mask`: bool of queries by keys, which all heads share."""

    name: str
    heads: int
    queries: int
    keys: int
    head_dim: int
    is_causal: bool = False
    has_mask: bool = False

    @property
    def flops(self) -> float:
        """4 Nq Nk D a head, half of it where causal."""
        return 4.0 * self.heads * self.queries * self.keys * self.head_dim * (0.5 if self.is_causal else 1.0)


SHAPES = (
    *(Shape(f"d{dim}_{length}", 24, length, length, dim)
      for dim in (128, 64) for length in (256, 384, 640, 1280, 2560, 3500, 4096, 6000, 12000)),
    *(Shape(f"d128_{length}_causal", 24, length, length, 128, is_causal=True) for length in (1280, 3500, 6000, 12000)),
    *(Shape(f"d256_{length}", 24, length, length, 256) for length in (640, 3500)),
    Shape("sdxl_text", 20, 4096, 77, 64),
    Shape("wan_text", 40, 32760, 512, 128),
    *(Shape(f"d{dim}_{length}_mask", 24, length, length, dim, has_mask=True)
      for dim in (64, 128) for length in (640, 1281, 3496, 3497, 6001)),
)  # fmt: skip


def main() -> None:
    """Measure, print the table, write the result file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=0.4, help="of measurements for each shape")
    parser.add_argument("--out", type=Path, default=RESULTS / "auto_choice.json")
    add_commit_option(parser)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("there is no CUDA GPU here")
    device = torch.device("cuda", torch.cuda.current_device())
    record = describe("auto_choice.py", device, options.commit)
    rows = [row for shape in SHAPES for row in measure(shape, options.seconds, device)]
    write_json(options.out, {**record, "rows": rows})


def measure(shape: Shape, seconds: float, device: torch.device) -> list[dict[str, Any]]:
    """Rows of one shape; a method that can't do it is left out."""
    sizes = (shape.queries, shape.keys, shape.keys)
    qkv = [torch.randn(1, shape.heads, size, shape.head_dim, device=device, dtype=torch.bfloat16) for size in sizes]
    mask = torch.rand(shape.queries, shape.keys, device=device) > 0.25 if shape.has_mask else None
    options = {"attn_mask": mask, "is_causal": shape.is_causal}
    sdpa = partial(scaled_dot_product_attention, *qkv, **options)
    calls: dict[str, Callable[[], Tensor]] = {"sdpa": sdpa, **dict.fromkeys(BACKENDS, sdpa)}
    calls |= {rung: partial(sage_kernels.attention, *qkv, **options, precision=rung) for rung in RUNGS}
    rows: dict[str, Callable[[], None]] = {}
    graphs: dict[str, Callable[[], None]] = {}
    for name, call in calls.items():
        try:
            in_a_row(name, call, 2)
            torch.cuda.synchronize(device)
        except RuntimeError as reason:
            print(f"{shape.name}: no {name}: {str(reason).splitlines()[0]}")
            continue
        rows[name] = partial(in_a_row, name, call, IN_A_ROW)
        graphs[name] = capture(rows[name])
    found = []
    print(f"{shape.name:18} {sage_kernels.explain(*qkv, **options).kernel:10}", end="")  # type: ignore[arg-type]
    for benchmark, methods in (("whole_call", rows), ("graph", graphs)):
        times = {
            name: ms / IN_A_ROW
            for name, ms in time_in_turns({name: [row] for name, row in methods.items()}, seconds, device).items()
        }
        best = min((name for name in times if name.startswith("sdpa")), key=lambda name: times[name])
        others = ", ".join(f"{name} {times[name] * 1e3:.1f}" for name in (best, "sdpa", "int8") if name in times)
        print(f" {benchmark}: {times['auto'] * 1e3:.1f} us, {others}: {times['auto'] / times[best]:.3f};", end="")
        found += [
            {"benchmark": benchmark, "shape": shape.name, "method": name, "ms": ms, "tflops": shape.flops / ms / 1e9}
            | {"rel_l1": None, "extra_bytes": None}
            for name, ms in times.items()
        ]
    print(flush=True)
    return found


def capture(row: Callable[[], None]) -> Callable[[], None]:
    """`row` as a CUDA graph."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        row()
    replay: Callable[[], None] = graph.replay
    return replay


def in_a_row(name: str, call: Callable[[], Tensor], count: int) -> None:
    """`count` calls, of torch's kernel of that name where it is one."""
    if name in BACKENDS:
        with sdpa_kernel(BACKENDS[name]):
            for _ in range(count):
                call()
        return
    for _ in range(count):
        call()


if __name__ == "__main__":
    main()
