"""Where the time of training one layer of a language model goes, with torch's attention and with ours.

    PYTHONPATH=sage_kernels/src python sage_kernels/benchmarks/layer_latency.py             # on a GPU
    PYTHONPATH=sage_kernels/src python sage_kernels/benchmarks/layer_latency.py --short     # tiny, on a CPU

One layer of Llama3.1-8B and of Qwen3-8B in bfloat16, batch 1, causal: forward and backward pass, random weights. The
parts are timed apart: FFN; projections of q, k, v and o; attention proper; others (norms, rotary positions,
residuals). "total" is the whole layer in one piece, with its peak of memory beyond weights and input. Methods take
turns on the same weights.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from result_file import add_commit_option, describe
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import rms_norm, scaled_dot_product_attention, silu
from tqdm import tqdm

sys.path.append(str(Path(__file__).resolve().parent))
from training_study.language_model import Attention, rotary_angles, rotate

from sage_kernels.evidence import write_json
from sage_kernels.gpu_timing import time_in_turns
from sage_kernels.training import emulated_attention, trainable_attention

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class LayerShape:
    """Sizes of one layer."""

    width: int
    heads: int
    key_heads: int
    head_dim: int
    hidden: int
    qk_norm: bool


MODELS = {
    "llama3.1-8b": LayerShape(4096, 32, 8, 128, 14336, qk_norm=False),
    "qwen3-8b": LayerShape(4096, 32, 8, 128, 12288, qk_norm=True),
}
TINY = LayerShape(128, 4, 2, 32, 256, qk_norm=True)
LENGTHS = (16384, 32768)


def sdpa(backend: SDPBackend) -> Attention:
    """torch's attention by one of its kernels, with its own grouping of heads."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    return attend


def sagebwd(precision: str, emulate: bool = False) -> Attention:
    """Ours."""
    attend = emulated_attention if emulate else trainable_attention
    return lambda q, k, v: attend(q, k, v, is_causal=True, enable_gqa=True, precision=precision)


class Layer(nn.Module):
    """A decoder layer, and its parts as functions of their inputs."""

    def __init__(self, shape: LayerShape, length: int) -> None:
        super().__init__()
        self.shape = shape
        width, inner = shape.width, shape.heads * shape.head_dim
        self.qkv = nn.Linear(width, inner + 2 * shape.key_heads * shape.head_dim, bias=False)
        self.output = nn.Linear(inner, width, bias=False)
        self.gate_up = nn.Linear(width, 2 * shape.hidden, bias=False)
        self.down = nn.Linear(shape.hidden, width, bias=False)
        self.attention_norm, self.feed_forward_norm = (nn.Parameter(torch.ones(width)) for _ in range(2))
        if shape.qk_norm:
            self.query_norm, self.key_norm = (nn.Parameter(torch.ones(shape.head_dim)) for _ in range(2))
        angles = rotary_angles(length, shape.head_dim)
        self.register_buffer("cosine", angles.cos())
        self.register_buffer("sine", angles.sin())

    def heads(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[1, N, (H + 2 Hkv) D] to q [1, N, H, D] and k, v [1, N, Hkv, D]."""
        parts = qkv.unflatten(-1, (-1, self.shape.head_dim))
        return parts.split([self.shape.heads, self.shape.key_heads, self.shape.key_heads], 2)

    def place(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Norms of heads, where the model has them, and rotary positions."""
        if self.shape.qk_norm:
            q, k = rms_norm(q, q.shape[-1:], self.query_norm), rms_norm(k, k.shape[-1:], self.key_norm)
        return rotate(q, self.cosine, self.sine), rotate(k, self.cosine, self.sine)

    def attention(self, q: Tensor, k: Tensor, v: Tensor, attend: Attention) -> Tensor:
        """[1, N, H, D] and [1, N, Hkv, D] to [1, N, H D]."""
        return attend(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2).flatten(2)

    def feed_forward(self, x: Tensor) -> Tensor:
        """SwiGLU."""
        gate, up = self.gate_up(x).chunk(2, -1)
        return self.down(silu(gate) * up)

    def forward(self, x: Tensor, attend: Attention) -> Tensor:
        """[1, N, width] to the same."""
        q, k, v = self.heads(self.qkv(rms_norm(x, x.shape[-1:], self.attention_norm)))
        x = x + self.output(self.attention(*self.place(q, k), v, attend))
        return x + self.feed_forward(rms_norm(x, x.shape[-1:], self.feed_forward_norm))


def main() -> None:
    """Measure, print, write after every shape."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="one tiny layer of 64 tokens, wherever it runs")
    parser.add_argument("--seconds", type=float, default=1.0, help="of measurements for each shape and part")
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--lengths", nargs="+", type=int, default=list(LENGTHS))
    add_commit_option(parser)
    parser.add_argument("--out", type=Path, help="default: results/layer_latency.json; with --short nothing is written")
    options = parser.parse_args()
    if not options.short and not torch.cuda.is_available():
        parser.error("there is no CUDA GPU here; --short runs anywhere")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    methods = {"sagebwd_int8": sagebwd("int8", emulate=device.type == "cpu")}
    if device.type == "cuda":
        backends = {"sdpa_flash": SDPBackend.FLASH_ATTENTION, "sdpa_cudnn": SDPBackend.CUDNN_ATTENTION}
        methods = {name: sdpa(backend) for name, backend in backends.items()} | methods
    shapes = [("tiny", TINY, 64)] if options.short else [
        (name, MODELS[name], length) for name in options.models for length in options.lengths
    ]  # fmt: skip
    rows: list[dict[str, Any]] = []
    out = options.out or (None if options.short else RESULTS / "layer_latency.json")
    for name, shape, length in tqdm(shapes, desc="shapes", mininterval=0):
        rows += measure(f"{name}_{length}", shape, length, methods, options.seconds, device)
        if out is not None:
            write_json(out, {**describe("layer_latency.py", device, options.commit), "rows": rows})


def measure(
    name: str, shape: LayerShape, length: int, methods: dict[str, Attention], seconds: float, device: torch.device
) -> list[dict[str, Any]]:
    """Rows of one shape: parts that attention doesn't touch once, attention and the whole layer for each method."""
    torch.manual_seed(0)
    layer = Layer(shape, length).to(device, torch.bfloat16)
    rows = [
        {"benchmark": "layer_fwd_bwd", "shape": name, "method": "all", "part": part, "ms": time_alone(call, seconds)}
        for part, call in shared_parts(layer, length, device).items()
    ]
    calls, totals, peaks = {}, {}, {}
    for method, attend in methods.items():
        try:
            calls[method] = attention_call(layer, length, attend, device)
            totals[method] = total_call(layer, length, attend, device)
            peaks[method] = {
                "attention": peak_bytes(calls[method], device), "total": peak_bytes(totals[method], device)
            }  # fmt: skip
        except (RuntimeError, ValueError) as reason:
            print(f"{name}: no {method}: {str(reason).splitlines()[0][:120]}")
            calls.pop(method, None)
            totals.pop(method, None)
    for part, group in (("attention", calls), ("total", totals)):
        times = in_turns(group, seconds, device)
        rows += [
            {"benchmark": "layer_fwd_bwd", "shape": name, "method": method, "part": part, "ms": times[method],
             "extra_bytes": peaks[method][part]}
            for method in group
        ]  # fmt: skip
    for row in rows:
        memory = f"{row['extra_bytes'] / 2**20:7.0f} MiB" if row.get("extra_bytes") is not None else ""
        print(f"{name:20} {row['part']:12} {row['method']:14} {row['ms']:8.2f} ms {memory}", flush=True)
    return rows


def both_passes(call: Callable[[], Sequence[Tensor]], inputs: list[Tensor]) -> Callable[[], object]:
    """Forward and backward pass; the gradients are let go."""
    with torch.no_grad():
        gradients = [torch.randn_like(output) for output in call()]
    return lambda: torch.autograd.grad(call(), inputs, gradients)


def shared_parts(layer: Layer, length: int, device: torch.device) -> dict[str, Callable[[], object]]:
    """FFN, projections and others, each on inputs of its own."""
    shape = layer.shape
    x = normal((1, length, shape.width), device)
    attended = normal((1, length, shape.heads * shape.head_dim), device)
    q = normal((1, length, shape.heads, shape.head_dim), device)
    k = normal((1, length, shape.key_heads, shape.head_dim), device)
    norms = [layer.attention_norm, layer.feed_forward_norm]
    if shape.qk_norm:
        norms += [layer.query_norm, layer.key_norm]

    def projections() -> Sequence[Tensor]:
        return layer.qkv(x), layer.output(attended)

    def others() -> Sequence[Tensor]:
        first = x + rms_norm(x, x.shape[-1:], layer.attention_norm)
        return first + rms_norm(first, x.shape[-1:], layer.feed_forward_norm), *layer.place(q, k)

    return {
        "ffn": both_passes(lambda: [layer.feed_forward(x)], [x, layer.gate_up.weight, layer.down.weight]),
        "projections": both_passes(projections, [x, attended, layer.qkv.weight, layer.output.weight]),
        "others": both_passes(others, [x, q, k, *norms]),
    }


def attention_call(layer: Layer, length: int, attend: Attention, device: torch.device) -> Callable[[], object]:
    """Attention alone."""
    shape = layer.shape
    q = normal((1, length, shape.heads, shape.head_dim), device)
    k, v = (normal((1, length, shape.key_heads, shape.head_dim), device) for _ in range(2))
    return both_passes(lambda: [layer.attention(q, k, v, attend)], [q, k, v])


def total_call(layer: Layer, length: int, attend: Attention, device: torch.device) -> Callable[[], object]:
    """The whole layer, with the gradients of its weights."""
    x = normal((1, length, layer.shape.width), device)
    return both_passes(lambda: [layer(x, attend)], [x, *layer.parameters()])


def normal(size: tuple[int, ...], device: torch.device) -> Tensor:
    """Random input that wants a gradient."""
    return torch.randn(size, device=device, dtype=torch.bfloat16).requires_grad_()


def time_alone(call: Callable[[], object], seconds: float) -> float | None:
    """Median ms, or None on a CPU."""
    return in_turns({"": call}, seconds, torch.device("cuda" if torch.cuda.is_available() else "cpu"))[""]


def in_turns(calls: dict[str, Callable[[], object]], seconds: float, device: torch.device) -> dict[str, float]:
    """Median ms of each."""
    if device.type != "cuda":
        for call in calls.values():
            call()
        return dict.fromkeys(calls, float("nan"))
    return time_in_turns({name: [call] for name, call in calls.items()}, seconds, device)


def peak_bytes(call: Callable[[], object], device: torch.device) -> int | None:
    """Most memory that both passes hold at once beyond what was there before, gradients included."""
    call()
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    call()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


if __name__ == "__main__":
    main()
