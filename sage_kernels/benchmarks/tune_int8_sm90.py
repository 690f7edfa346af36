"""Time forms of the INT8 kernel for sm_90a beside cuDNN's attention, to choose int8_sm90_forms.FORMS.

Run on a Hopper GPU from the repository root:
    PYTHONPATH=sage_kernels/src python3 sage_kernels/benchmarks/tune_int8_sm90.py
Forms take turns, so that a GPU that grows warm slows all of them down. TFLOP/s count 4 B H N^2 D, half where causal.

What was tried on an H100 (kernel alone, TFLOP/s, from three runs, between which cuDNN differed by 3 %), and what had
been predicted:
- Half of the exponentials by a line, as codes (LINE), half of all behind the wait for P V (SPLIT): Wan 480p 853 to
  1005; predicted 1050, since special functions took as long as the tensor cores.
- Maxima shared between lanes only where one grew, two chains of them, and codes packed by conversion to float16
  denormals: Flux 919 to 980, Wan 480p 1005 to 1142; predicted 967 for Flux.
- Three warpgroups for head_dim 64, float32 sums in shared memory: SDXL 596 to 624, CogVideoX 686 to 734; predicted 690
  for SDXL. A turn of the loop is 350 instructions a warp: 1050 cycles of issue for three warps, beside 816 of the
  tensor cores. So it is bound by issue, which is busy 53 % of the time.
- One launch for both steps of preparation: 87 to 81 us for Flux, 32 to 33 us for SDXL; predicted 60 and 22. It waits
  for memory and for its clusters, at 60 % of the bandwidth. Q between K and V: 90 and 38 us; predicted 72 and 26.
- Preparation that loads what it needs next before it stores: Flux 78 to 68 us, Wan 480p 845 to 751, SDXL 34 to 33, of
  eight calls in a CUDA graph rather than by this script; predicted 71 for Flux, nothing for the others.
- Two warpgroups for head_dim 64 with even shares, because SDXL's ten units of 64 rows a thread block are four turns of
  three: 598 beside 620 TFLOP/s. Nothing was predicted but that it pays if a unit takes at most 1.2 times as long.
- A unit of 64 rows that is left over for the end shared by the three warpgroups (SHARE), each on every third key block:
  SDXL 136 to 128 us, whole call 168 to 159, of six calls in a CUDA graph beside the kernel before rather than by this
  script; predicted 5 % less. With two warpgroups that take turns (head_dim 128) it gave
  nothing: one of them alone is nearly as fast.
- Attention that begins before its preparation has ended (programmatic dependent launch), to save 3 us of launch:
  33.4 beside 34.3 us at 1024 tokens of 24 heads and head_dim 64, 45.4 beside 45.1 at 128, SDXL alike. Left out.
"""

import argparse
import itertools
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import sage_kernels
from sage_kernels.attention_call import AttentionCall, make_call
from sage_kernels.benchmark_shapes import FORWARD_SHAPES, BenchmarkShape
from sage_kernels.cubin_cache import CubinCache, cache_folder
from sage_kernels.cubin_loader import KernelLoader
from sage_kernels.cubin_manifest import CubinManifest
from sage_kernels.driver import cuda_driver
from sage_kernels.int8_sm90_forms import FORMS, Int8Sm90Form
from sage_kernels.kernel_sources import source_folder
from sage_kernels.kernel_variants import KernelVariant, int8_sm90_attention_variant, int8_sm90_prepare_variant
from sage_kernels.kernels.int8_sm90 import Int8Sm90Kernel
from sage_kernels.reference import attention_fp32

D64, D128, LONG = FORMS


@dataclass(frozen=True)
class Candidate:
    """A form, and up to how many turns rows are shared out evenly."""

    name: str
    form: Int8Sm90Form
    turns: int = 16


CANDIDATES = (
    Candidate("line4", replace(D128, longest=0)),
    Candidate("line3", LONG),
    Candidate("line4-share", replace(D128, longest=0, share=True)),
    Candidate("line0", replace(LONG, line=0)),
    Candidate("line4-turns", replace(D128, longest=0), turns=0),
    Candidate("line4-split0", replace(D128, longest=0, split=0)),
    Candidate("line4-no-pingpong", replace(D128, longest=0, pingpong=False)),
    Candidate("line4-park", replace(D128, longest=0, park=True, stages=4)),
    Candidate("line5", D64),
    Candidate("line5-alone", replace(D64, share=False)),
    Candidate("line5-split0", replace(D64, split=0)),
    Candidate("line4", replace(D64, line=4)),
    Candidate("line0", replace(D64, line=0)),
    Candidate("rows128", replace(D64, warpgroups=2, split=4, park=False), turns=0),
    Candidate("rows128-shares", replace(D64, warpgroups=2, split=4, park=False)),
    Candidate("rows128-park-shares", replace(D64, warpgroups=2, split=2)),
    Candidate("rows128-pingpong-shares", replace(D64, warpgroups=2, split=4, pingpong=True, park=False)),
    Candidate("rows128-pingpong", replace(D64, warpgroups=2, split=4, pingpong=True, park=False), turns=0),
)


def main() -> None:
    """Compile all candidates, then one table for each shape."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [shape.name for shape in FORWARD_SHAPES]
    parser.add_argument("--shapes", nargs="+", choices=names, default=names)
    parser.add_argument("--seconds", type=float, default=0.1, help="time of one measurement")
    parser.add_argument("--rounds", type=int, default=2, help="measurements of each number; the median counts")
    parser.add_argument("--candidates", nargs="+", help="names; all where left out")
    parser.add_argument("--compile-only", action="store_true", help="fill the cache of compiled kernels and stop")
    parser.add_argument("--once", action="store_true", help="one call of each, without timing, for a profiler")
    options = parser.parse_args()
    candidates = [candidate for candidate in CANDIDATES if candidate.name in (options.candidates or candidate.name)]
    compile_ahead(candidates)
    if options.compile_only:
        return
    for shape in FORWARD_SHAPES:
        if shape.name in options.shapes:
            matching = [candidate for candidate in candidates if candidate.form.head_dim == shape.head_dim]
            if options.once:
                run_once(shape, matching)
            else:
                time_shape(shape, matching, options.seconds, options.rounds)


def compile_ahead(candidates: list[Candidate]) -> None:
    """Fill the cache of compiled kernels on all cores; the package itself compiles one after another."""
    forms = {candidate.form for candidate in candidates}
    variants = {int8_sm90_attention_variant(form) for form in forms}
    for form, is_bfloat16 in itertools.product(forms, (False, True)):
        variants.add(int8_sm90_prepare_variant(form.head_dim, form.keys, is_bfloat16))
    torch.zeros(1, device="cuda")
    manifest = CubinManifest(Path(sage_kernels.__file__).parent / "cubins")

    def compile_one(variant: KernelVariant) -> None:
        loader = KernelLoader(cuda_driver(), source_folder(), manifest, CubinCache(cache_folder()))
        loader.load(variant, torch.cuda.current_device(), "sm_90a", False)

    start = time.perf_counter()
    with ThreadPoolExecutor() as pool:
        list(pool.map(compile_one, variants))
    print(f"{len(variants)} kernels ready after {time.perf_counter() - start:.1f} s")


def make_inputs(shape: BenchmarkShape) -> AttentionCall:
    """Normal Q, K and V; K with a bias for each head, as diffusion models have it."""
    generator = torch.Generator("cuda").manual_seed(0)

    def normal(length: int) -> Tensor:
        return torch.randn(shape.batch, shape.heads, length, shape.head_dim, generator=generator, device="cuda")

    q, k, v = normal(shape.length), normal(shape.length).add_(normal(1), alpha=2), normal(shape.length)
    return make_call(
        *(x.bfloat16() for x in (q, k, v)), None, shape.is_causal, None, False, None, "BHND", "int8", False, False
    )


def run_once(shape: BenchmarkShape, candidates: list[Candidate]) -> None:
    """One call of each candidate."""
    call = make_inputs(shape)
    for candidate in candidates:
        kernel = Int8Sm90Kernel((candidate.form,), candidate.turns)
        kernel.run(kernel.prepare(call))
    torch.cuda.synchronize()


def time_shape(shape: BenchmarkShape, candidates: list[Candidate], seconds: float, rounds: int) -> None:
    """Print a row for cuDNN and one for each candidate."""
    call = make_inputs(shape)
    q, k, v = call.query, call.key, call.value
    kernels = [Int8Sm90Kernel((candidate.form,), candidate.turns) for candidate in candidates]
    states = [kernel.prepare(call) for kernel in kernels]

    def cudnn() -> Tensor:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=shape.is_causal)

    measured: list[list[list[float]]] = [[[], []] for _ in kernels]
    baseline = []
    for _ in range(rounds):
        baseline.append(milliseconds(cudnn, seconds))
        for kernel, state, times in zip(kernels, states, measured, strict=True):
            times[0].append(milliseconds(lambda kernel=kernel, state=state: kernel.run(state), seconds))
            times[1].append(milliseconds(lambda kernel=kernel: kernel.run(kernel.prepare(call)), seconds))
    speed = shape.flops / 1e9 / statistics.median(baseline)
    print(f"{shape.name:12} {'cuDNN':18} {' ' * 12}whole {speed:5.0f} TFLOP/s", flush=True)
    for candidate, kernel, state, times in zip(candidates, kernels, states, measured, strict=True):
        alone, whole = (statistics.median(values) for values in times)
        prepare = milliseconds(lambda kernel=kernel: kernel.prepare(call), seconds / 4)
        host = host_microseconds(lambda kernel=kernel: kernel.run(kernel.prepare(call)))
        print(
            f"{shape.name:12} {candidate.name:18} kernel {shape.flops / 1e9 / alone:5.0f}, whole "
            f"{shape.flops / 1e9 / whole:5.0f} TFLOP/s; ms: kernel {alone:8.3f}, prepare {prepare:6.3f}, "
            f"whole {whole:8.3f}; host {host:3.0f} us; rel L1 {error(call, kernel.run(state)[0]):.4f}",
            flush=True,
        )


def milliseconds(function: Callable[[], object], seconds: float) -> float:
    """Median on the GPU's clock of calls that follow each other without a pause."""
    function()
    torch.cuda.synchronize()
    start = time.perf_counter()
    function()
    torch.cuda.synchronize()
    repetitions = max(2, min(100, int(seconds / (time.perf_counter() - start))))
    events = [torch.cuda.Event(enable_timing=True) for _ in range(repetitions + 1)]
    events[0].record()
    for event in events[1:]:
        function()
        event.record()
    torch.cuda.synchronize()
    return statistics.median(a.elapsed_time(b) for a, b in itertools.pairwise(events))


def host_microseconds(function: Callable[[], object]) -> float:
    """Median time until a call returns, which is before the GPU is done."""
    times = []
    for _ in range(5):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    torch.cuda.synchronize()
    return statistics.median(times) * 1e6


def error(call: AttentionCall, output: Tensor) -> float:
    """Relative L1 of the last rows of two heads against float32."""
    rows = min(128, call.query_length)
    positions = torch.arange(call.query_length - rows, call.query_length, device=call.device)
    mask = torch.arange(call.key_length, device=call.device) <= positions[:, None] if call.is_causal else None
    exact, _ = attention_fp32(call.query[:, :2, -rows:], call.key[:, :2], call.value[:, :2], attn_mask=mask)
    return ((output[:, :2, -rows:].float() - exact).abs().sum() / exact.abs().sum()).item()


if __name__ == "__main__":
    main()
