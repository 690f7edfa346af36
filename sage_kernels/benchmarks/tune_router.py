"""Time all kernels of this GPU at many lengths, for the router: fills its architecture's part of router_table.json.

    PYTHONPATH=sage_kernels/src python sage_kernels/benchmarks/tune_router.py

Times are of whole calls in a row, preparation included, of self-attention with 24 heads in bfloat16, the methods taking
turns: of short calls it counts whichever takes longer, the GPU or the host. With a mask: a bool tensor of queries by
keys that all heads share. What is compiled is compiled on all cores first.
"""

import argparse
import contextlib
import json
import multiprocessing
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from result_file import add_commit_option, describe
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from sage_kernels.architectures import device_architecture
from sage_kernels.attention_call import make_call
from sage_kernels.dispatch import precision_refusal
from sage_kernels.evidence import write_json
from sage_kernels.gpu_timing import time_in_turns
from sage_kernels.kernels import KERNELS
from sage_kernels.kernels.interface import Kernel, PlanningKernel
from sage_kernels.planned_attention import CallByCall
from sage_kernels.router import TABLE, MaskClass

BACKENDS = {
    "sdpa_flash": SDPBackend.FLASH_ATTENTION,
    "sdpa_cudnn": SDPBackend.CUDNN_ATTENTION,
    "sdpa_efficient": SDPBackend.EFFICIENT_ATTENTION,
}
HEADS = 24
LENGTHS = (1024, 2048, 4096, 8192, 16384, 32768)  # shorter calls take as long as the host needs to launch them
SHORT, LEAST_IN_A_ROW = 2049, 64  # up to this length so many calls share what it takes to choose torch's kernel
# head_dim, causality, mask and lengths of each shape class. Long calls of the rarer ones would take most of the time
# and tell nothing: times grow with the square from 8192 on.
CLASSES: tuple[tuple[int, bool, MaskClass, tuple[int, ...]], ...] = (
    *((head_dim, is_causal, "none", LENGTHS) for head_dim in (128, 64) for is_causal in (False, True)),
    *((head_dim, False, "aligned", LENGTHS[:-2]) for head_dim in (128, 64)),
    *((head_dim, False, "odd", tuple(length + 1 for length in LENGTHS[:-2])) for head_dim in (128, 64)),
    *((256, is_causal, "none", LENGTHS[:-2]) for is_causal in (False, True)),
)
CACHED_BYTES = 256 << 20  # inputs of one measurement in all: several times the L2 cache of any GPU


def main() -> None:
    """Measure, print the table, write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=0.25, help="of measurements for each length")
    add_commit_option(parser)
    parser.add_argument("--compile-only", action="store_true", help="only fill the caches of compiled kernels")
    parser.add_argument("--out", type=Path, default=TABLE, help=f"default: {TABLE.name} of the package")
    options = parser.parse_args()
    device = torch.device("cuda", torch.cuda.current_device())
    architecture = device_architecture(device)
    if architecture is None:
        parser.error("there is no CUDA GPU here")
    with multiprocessing.get_context("spawn").Pool(min(14, os.cpu_count() or 1)) as pool:
        pool.starmap(
            compile_kernel, [(index, *each[:3]) for index in range(len(KERNELS)) for each in CLASSES], chunksize=1
        )
    if options.compile_only:
        return
    about = describe("tune_router.py", device, options.commit)
    entry = {
        **{name: about[name] for name in ("gpu", "torch", "commit", "date")},
        "cudnn": torch.backends.cudnn.version(),
    }
    table = json.loads(options.out.read_text(encoding="utf-8")) if options.out.exists() else {}
    rows = []
    for each in CLASSES:
        rows.append(measure_class(*each, options.seconds, device))
        write_json(options.out, {**table, architecture.name: {**entry, "rows": rows}})
    print(f"wrote {architecture.name} to {options.out}")


def compile_kernel(index: int, head_dim: int, is_causal: bool, mask: MaskClass) -> None:
    """Leave one kernel's programs in the caches on disk."""
    kernel = KERNELS[index]
    length = 513 if mask == "odd" else 512
    q, k, v = (torch.randn(1, HEADS, length, head_dim, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    try:
        attend = whole_call(kernel, is_causal, make_mask(mask, length, q.device), q, k, v)
        if attend is not None:
            attend(q, k, v)
        torch.cuda.synchronize()
    except RuntimeError as error:
        print(f"D{head_dim}: no {kernel.name}: {str(error).splitlines()[0][:100]}")


def make_mask(mask: MaskClass, length: int, device: torch.device) -> Tensor | None:
    """Three of four keys, at random."""
    return None if mask == "none" else torch.rand(length, length, device=device) > 0.25


def measure_class(
    head_dim: int, is_causal: bool, mask: MaskClass, lengths: Sequence[int], seconds: float, device: torch.device
) -> dict[str, Any]:
    """One row of the table: milliseconds of every method at every length."""
    times: dict[str, list[float]] = {}
    for length in lengths:
        rows = working_methods(length, head_dim, is_causal, mask, device)
        found = time_in_turns({name: [row.run] for name, row in rows.items()}, seconds, device)
        found = {name: ms / len(rows[name].inputs) for name, ms in found.items()}
        for name, ms in found.items():
            times.setdefault(name, []).append(ms)
        line = ", ".join(f"{name} {ms:.3f} ms" for name, ms in found.items())
        print(f"D{head_dim} {'causal ' * is_causal}{f'mask {mask} ' * (mask != 'none')}N{length}: {line}", flush=True)
    return {
        "head_dim": head_dim,
        "is_causal": is_causal,
        "mask": mask,
        "heads": HEADS,
        "lengths": lengths,
        "ms": {name: ms for name, ms in times.items() if len(ms) == len(lengths)},
    }


@dataclass(frozen=True)
class Row:
    """Calls of one method, one after the other.

    Attributes:
        inputs: Q, K and V of each; several calls may have the same.
        attend: makes one.
        backend: what torch is to use; chosen once, so that choosing costs the calls nothing.
    """

    inputs: Sequence[Sequence[Tensor]]
    attend: Callable[[Tensor, Tensor, Tensor], Any]
    backend: SDPBackend | None = None

    def run(self) -> None:
        """All of them."""
        with contextlib.nullcontext() if self.backend is None else sdpa_kernel(self.backend):
            for q, k, v in self.inputs:
                self.attend(q, k, v)


def working_methods(
    length: int, head_dim: int, is_causal: bool, mask_class: MaskClass, device: torch.device
) -> dict[str, Row]:
    """What this GPU and torch can do at this size, each with as many inputs as it takes to leave the cache."""
    count = max(1, min(16, CACHED_BYTES // (3 * 2 * HEADS * length * head_dim)))
    inputs = [
        [torch.randn(1, HEADS, length, head_dim, device=device, dtype=torch.bfloat16) for _ in range(3)]
        for _ in range(count)
    ]
    if length <= SHORT:
        inputs *= -(-LEAST_IN_A_ROW // count)
    mask = make_mask(mask_class, length, device)
    sdpa = partial(torch.nn.functional.scaled_dot_product_attention, attn_mask=mask, is_causal=is_causal)
    rows = {name: Row(inputs, sdpa, backend) for name, backend in BACKENDS.items()}
    for kernel in KERNELS:
        attend = whole_call(kernel, is_causal, mask, *inputs[0])
        if attend is not None:
            rows[kernel.name] = Row(inputs, attend)
    working = {}
    for name, row in rows.items():
        try:
            row.run()
        except RuntimeError as error:
            print(f"D{head_dim} N{length}: no {name}: {str(error).splitlines()[0][:100]}")
            continue
        working[name] = row
    return working


def whole_call(
    kernel: Kernel, is_causal: bool, mask: Tensor | None, q: Tensor, k: Tensor, v: Tensor
) -> Callable[[Tensor, Tensor, Tensor], Any] | None:
    """Calls of these tensors' form by a kernel of a quantised rung; None where it refuses them."""
    architecture = device_architecture(q.device)
    call = make_call(q, k, v, mask, is_causal, None, False, None, "BHND", kernel.precision, False, False)
    if kernel.emulated or kernel.precision == "fp16" or precision_refusal(kernel.precision, architecture, [kernel]):
        return None
    if kernel.refuse(call, architecture):
        return None
    plan = kernel.plan(call) if isinstance(kernel, PlanningKernel) else CallByCall(kernel, call)
    return lambda q, k, v: plan.attend(q, k, v, mask, None)


if __name__ == "__main__":
    main()
