"""Decoding from the FP4 cache against torch's kernels on a bfloat16 cache, and against the time its bytes take.

    PYTHONPATH=sage_kernels/src python sage_kernels/benchmarks/kv_decode.py

One query token of each sequence, 32 query heads on 8 key heads of 128. Calls are replayed from a CUDA graph that goes
around several caches, so that none is in the L2 cache from the call before. The floor is the bytes of codes and scales
over the bandwidth of reading, which is above that of a copy (bytes read and written both counted). torch's kernels
get the query heads of a key head as rows of one head (the same numbers), or as they are with enable_gqa; the fastest
counts. `ms` is that; `call_ms` is a call from Python, one after the other, the longer of the host's and the GPU's time.
Appending is timed likewise: one token to each sequence, and all keys at once to an empty cache.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from result_file import add_commit_option, describe
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from sage_kernels.evidence import write_json
from sage_kernels.kv_cache import KVCache

RESULTS = Path(__file__).parent / "results"
HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128
SHAPES = [(1, 4096), (1, 32768), (1, 131072), (8, 4096), (8, 32768), (8, 131072), (32, 4096), (32, 32768)]
BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}
CACHED_BYTES = 160 << 20  # of one method's caches in all: several times the L2 cache
MAX_SETS = 16
Inputs = tuple[Tensor, Tensor, Tensor]


def main() -> None:
    """Measure all shapes, print the table, write the result file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=[f"{b}x{n}" for b, n in SHAPES], help="as BATCHxKEYS")
    parser.add_argument("--replays", type=int, default=15, help="of which the median counts")
    parser.add_argument("--out", type=Path, default=RESULTS / "kv_decode.json")
    add_commit_option(parser)
    options = parser.parse_args()
    about = describe("kv_decode.py", commit=options.commit)
    if not torch.cuda.is_available():
        parser.error("there is no CUDA GPU here")
    bandwidth = copy_bandwidth()
    copy = bandwidth
    bandwidth = max(copy, read_bandwidth())
    print(f"copy: {copy / 1e12:.2f} TB/s, reading: {bandwidth / 1e12:.2f} TB/s")
    rows = []
    for shape in options.shapes:
        batch, keys = map(int, shape.split("x"))
        rows += measure(batch, keys, options.replays, bandwidth)
    bandwidths = {"copy_bytes_per_second": copy, "read_bytes_per_second": bandwidth}
    write_json(options.out, {**about, **bandwidths, "rows": rows})


def copy_bandwidth() -> float:
    """Bytes a second of a device-to-device copy, reads and writes counted."""
    source = torch.randint(0, 255, (1 << 30,), dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() / (graph_ms([lambda: target.copy_(source)], 9) / 1000)


def read_bandwidth() -> float:
    """Bytes a second of a reduction over a large tensor."""
    source = torch.randn(1 << 29, device="cuda")
    return 4 * source.numel() / (graph_ms([source.sum], 9) / 1000)


def measure(batch: int, keys: int, replays: int, bandwidth: float) -> list[dict[str, Any]]:
    """Rows of one shape: what the cache takes with each group size, and every backend of torch."""
    bytes_16 = 4 * batch * KV_HEADS * keys * HEAD_DIM
    sets = max(1, min(MAX_SETS, CACHED_BYTES // (bytes_16 // 4)))
    generator = torch.Generator("cuda").manual_seed(keys + batch)
    inputs = [make_inputs(batch, keys, generator) for _ in range(max(1, min(sets, (24 << 30) // bytes_16)))]
    exact = exact_output(*inputs[0])
    rows: list[dict[str, Any]] = []

    def add(method: str, calls: list[Callable[[], Tensor]], moved: int) -> None:
        try:
            error = ((calls[0]().float() - exact).abs().sum() / exact.abs().sum()).item()
            ms, call_ms = graph_ms(calls, replays), whole_call_ms(calls)
        except (RuntimeError, ValueError) as reason:  # a backend that doesn't take the shape
            print(f"{batch}x{keys}: no {method}: {str(reason).splitlines()[0][:100]}")
            return
        floor = moved / bandwidth * 1000
        row = {"benchmark": "kv_decode", "shape": f"{batch}x{keys}", "method": method, "ms": ms, "rel_l1": error,
               "call_ms": call_ms}  # fmt: skip
        rows.append({**row, "bytes": moved, "floor_ms": floor, "share_of_floor": floor / ms, "extra_bytes": 0})
        print(f"{batch:3} x {keys:6} {method:18} {ms * 1000:8.1f} us, {floor / ms:4.0%} of the floor, L1 {error:.4f}, "
              f"a call from Python {call_ms * 1000:.1f} us", flush=True)  # fmt: skip

    for group in (16, 32):
        caches = [filled(k, v, group) for _, k, v in inputs]
        calls = [partial(cache.attend, q) for cache, (q, _, _) in zip(caches, inputs, strict=True)]
        add(f"fp4_cache_{group}", calls, cache_bytes(batch, keys, group))
    for name, backend in BACKENDS.items():
        add(f"sdpa_{name}", [partial(packed_sdpa, x, backend) for x in inputs], bytes_16)
    add("sdpa_flash_gqa", [partial(grouped_sdpa, x) for x in inputs], bytes_16)
    best = min((row for row in rows if row["method"].startswith("sdpa")), key=lambda row: row["ms"])
    for row in rows:
        row["speedup"] = best["ms"] / row["ms"]
    print(f"          fp4_cache_16 is {rows[0]['speedup']:.2f} x {best['method']}")
    return rows + appending(batch, keys, inputs[0], replays)


def appending(batch: int, keys: int, inputs: Inputs, replays: int) -> list[dict[str, Any]]:
    """Rows of one shape: a token more to each sequence, and all tokens at once."""
    _, k, v = inputs
    cache = KVCache(batch, KV_HEADS, keys, HEAD_DIM, rolling=True)
    rows = []
    for method, count in (("append_one", 1), ("append_all", keys)):
        new, begins_anew = (k[:, :, :count], v[:, :, :count]), count == keys

        def append(new: tuple[Tensor, Tensor] = new, begins_anew: bool = begins_anew) -> None:
            if begins_anew:
                cache.reset()
            cache.append(*new)

        ms, call_ms = graph_ms([append] * (1 if begins_anew else MAX_SETS), replays), whole_call_ms([append])
        rows.append({"benchmark": "kv_append", "shape": f"{batch}x{keys}", "method": method, "ms": ms,
                     "call_ms": call_ms})  # fmt: skip
        print(f"{batch:3} x {keys:6} {method:18} {ms * 1000:8.1f} us, a call from Python {call_ms * 1000:.1f} us")
    return rows


def cache_bytes(batch: int, keys: int, group: int) -> int:
    """Codes and scales of keys and values."""
    return 2 * batch * KV_HEADS * keys * (HEAD_DIM // 2 + HEAD_DIM // group)


def make_inputs(batch: int, keys: int, generator: torch.Generator) -> Inputs:
    """Normal Q, K and V in bfloat16; K and V with a bias for each head and channel, as trained models have."""

    def normal(heads: int, length: int) -> Tensor:
        shape = (batch, heads, length, HEAD_DIM)
        return torch.randn(shape, generator=generator, device="cuda", dtype=torch.bfloat16)

    key = normal(KV_HEADS, keys).add_(normal(KV_HEADS, 1), alpha=2)
    return normal(HEADS, 1), key, normal(KV_HEADS, keys).add_(normal(KV_HEADS, 1), alpha=0.25)


def filled(k: Tensor, v: Tensor, group: int) -> KVCache:
    """A cache that holds k and v."""
    cache = KVCache(k.shape[0], KV_HEADS, k.shape[2], HEAD_DIM, group=group)
    cache.append(k, v)
    return cache


def exact_output(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Float32 attention on the unquantised operands."""
    outputs = []
    for index in range(q.shape[0]):
        query = q[index].float().reshape(KV_HEADS, HEADS // KV_HEADS, HEAD_DIM)
        scores = query @ k[index].float().transpose(-1, -2) * HEAD_DIM**-0.5
        outputs.append((scores.softmax(-1) @ v[index].float()).reshape(HEADS, 1, HEAD_DIM))
    return torch.stack(outputs)


def packed_sdpa(inputs: Inputs, backend: SDPBackend) -> Tensor:
    """The query heads that share a key head as rows of one head."""
    q, k, v = inputs
    rows = q.view(q.shape[0], KV_HEADS, HEADS // KV_HEADS, HEAD_DIM)
    with sdpa_kernel(backend):
        return torch.nn.functional.scaled_dot_product_attention(rows, k, v).view(q.shape)


def grouped_sdpa(inputs: Inputs) -> Tensor:
    """torch's own grouped-query attention."""
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return torch.nn.functional.scaled_dot_product_attention(*inputs, enable_gqa=True)


def whole_call_ms(calls: list[Callable[[], object]], repeats: int = 50) -> float:
    """Milliseconds of one of many calls in a row from Python."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    for index in range(repeats):
        calls[index % len(calls)]()
    torch.cuda.synchronize()
    return (time.perf_counter() - start) / repeats * 1000


def graph_ms(calls: list[Callable[[], object]], replays: int) -> float:
    """Median milliseconds of one call, from replays of a graph that makes all of them."""
    for call in calls[:2]:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    times = []
    for _ in range(replays + 1):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / len(calls))
    return statistics.median(times[1:])


if __name__ == "__main__":
    main()
