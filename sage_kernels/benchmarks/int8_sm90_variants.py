"""Compile variants of the sm_90a INT8 kernel, check each against the quantised reference and time them in one run.

Run on a Hopper GPU, with nvcc on the PATH, from the repository root:
    PYTHONPATH=sage_kernels/src python3 sage_kernels/benchmarks/int8_sm90_variants.py
"""

import argparse
import ctypes
import dataclasses
import faulthandler
import itertools
import statistics
import subprocess
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from sage_kernels.recipes import Recipe
from sage_kernels.reference import attend, attention_fp32, quantize_operands
from sage_kernels.score_mask import ScoreMask, valid_tokens

CSRC = Path(__file__).parents[1] / "csrc"
MAX_DYNAMIC_SHARED = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
CUDA = ctypes.CDLL("libcuda.so.1")

SHAPES = {
    "flux": (1, 24, 4608, 128, False),
    "wan480p": (1, 40, 32760, 128, False),
    "wan720p": (1, 40, 75600, 128, False),
    "cogvideox2b": (1, 30, 17776, 64, False),
    "sdxl": (2, 10, 4096, 64, False),
    "llm32k": (1, 32, 32768, 128, True),
    "hunyuan": (1, 24, 65536, 128, False),
}


class AttentionParams(ctypes.Structure):
    _fields_ = [
        *(
            (name, ctypes.c_uint64)
            for name in ["query", "key", "value", "query_scale", "key_scale", "value_scale", "value_mean"]
        ),
        *((name, ctypes.c_uint64) for name in ["value_error", "lse_shift", "key_lengths", "output", "lse"]),
        ("output_strides", ctypes.c_int64 * 3),
        *((name, ctypes.c_int32) for name in ["batch", "heads", "kv_heads", "query_length", "key_length", "head_dim"]),
        *((name, ctypes.c_int32) for name in ["query_rows", "key_blocks", "is_causal", "is_bfloat16"]),
    ]


class QuantizeParams(ctypes.Structure):
    _fields_ = [
        *(
            (name, ctypes.c_uint64)
            for name in ["query", "key", "value", "key_lengths", "query_codes", "key_codes", "value_codes"]
        ),
        *((name, ctypes.c_uint64) for name in ["query_scale", "key_scale", "key_mean", "value_scale", "value_mean"]),
        *((name, ctypes.c_uint64) for name in ["value_error", "lse_shift"]),
        *((name, ctypes.c_int64 * 3) for name in ["query_strides", "key_strides", "value_strides"]),
        *((name, ctypes.c_int32) for name in ["batch", "heads", "kv_heads", "query_length", "key_length", "head_dim"]),
        *((name, ctypes.c_int32) for name in ["query_rows", "key_blocks"]),
        ("softmax_scale", ctypes.c_float),
    ]


@dataclasses.dataclass(frozen=True)
class Variant:
    name: str
    head_dim: int
    keys: int = 128
    warpgroups: int = 2
    stages: int = 5
    pingpong: int = 1
    promote: int = 1
    magic: int = 1
    poly: int = 0
    persistent: bool = True

    @property
    def defines(self) -> tuple[str, ...]:
        names = ("head_dim", "keys", "warpgroups", "stages", "pingpong", "promote", "magic", "poly")
        return tuple(f"-D{name.upper()}={getattr(self, name)}" for name in names)

    @property
    def threads(self) -> int:
        return 128 * (self.warpgroups + 1)

    @property
    def shared_bytes(self) -> int:
        tiles = 64 * self.warpgroups * self.head_dim + 2 * self.stages * self.keys * self.head_dim
        return tiles + 8 * (4 * self.stages + 2 * self.warpgroups)


def check(code: int) -> None:
    if code:
        text = ctypes.c_char_p()
        CUDA.cuGetErrorString(code, ctypes.byref(text))
        raise RuntimeError(f"CUDA error {code}: {(text.value or b'?').decode()}")


def compile_cubin(source: str, defines: tuple[str, ...], directory: Path) -> tuple[bytes, str]:
    output = directory / f"{abs(hash((source, defines)))}.cubin"
    command = ["nvcc", "-cubin", "-std=c++17", "-O3", "-gencode=arch=compute_90a,code=sm_90a", "-Xptxas", "-v"]
    result = subprocess.run(
        [*command, *defines, str(CSRC / source), "-o", str(output)], capture_output=True, text=True, check=False
    )
    if result.returncode:
        raise RuntimeError(result.stderr)
    lines = [line for line in result.stderr.splitlines() if "spill" in line or "Used" in line or "warning" in line]
    return output.read_bytes(), " ".join(line.replace("ptxas info    :", "").strip() for line in lines)


def load(cubin: bytes, *entries: str) -> list[ctypes.c_void_p]:
    module, functions = ctypes.c_void_p(), []
    check(CUDA.cuModuleLoadData(ctypes.byref(module), cubin))
    for entry in entries:
        function = ctypes.c_void_p()
        check(CUDA.cuModuleGetFunction(ctypes.byref(function), module, entry.encode()))
        functions.append(function)
    return functions


def launch(function: ctypes.c_void_p, grid: tuple[int, int, int], threads: int, params, shared: int = 0) -> None:
    arguments = (ctypes.c_void_p * 1)(ctypes.addressof(params))
    stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
    check(CUDA.cuLaunchKernel(function, *grid, threads, 1, 1, shared, stream, arguments, None))


class Kernel:
    """One variant, compiled."""

    def __init__(self, variant: Variant, attention: bytes, quantizers: dict[int, bytes]) -> None:
        self.variant = variant
        (self.attention,) = load(attention, "int8_sm90_attention")
        check(CUDA.cuFuncSetAttribute(self.attention, MAX_DYNAMIC_SHARED, variant.shared_bytes))
        self.quantizers = {
            bfloat16: load(cubin, "int8_sm90_statistics", "int8_sm90_quantize")
            for bfloat16, cubin in quantizers.items()
        }

    def prepare(self, q, k, v, *, scale=None, causal=False, key_lengths=None, lse=False):
        batch, heads, rows, head_dim = q.shape
        kv_heads, keys = k.shape[1], k.shape[2]
        variant, padded = self.variant, self.variant.head_dim
        tile = 64 * variant.warpgroups
        query_rows, key_blocks = -(-rows // tile) * tile, -(-keys // variant.keys)

        def empty(shape, dtype):
            return torch.empty(shape, dtype=dtype, device=q.device)

        buffers = {
            "query": empty((batch, heads, query_rows, padded), torch.uint8),
            "key": empty((batch, kv_heads, key_blocks * variant.keys, padded), torch.uint8),
            "value": empty((batch, kv_heads, key_blocks * variant.keys, padded), torch.uint8),
            "query_scale": empty((batch, heads, query_rows), torch.float32),
            "key_scale": empty((batch, kv_heads, key_blocks), torch.float32),
            "key_mean": empty((batch, kv_heads, padded), torch.float32),
            "value_scale": empty((batch, kv_heads, padded), torch.float32),
            "value_mean": empty((batch, kv_heads, padded), torch.float32),
            "value_error": empty((batch, kv_heads, padded), torch.int32),
            "lse_shift": empty((batch, heads, query_rows), torch.float32) if lse else None,
        }
        address = {name: 0 if buffer is None else buffer.data_ptr() for name, buffer in buffers.items()}
        sizes = (batch, heads, kv_heads, rows, keys, head_dim, query_rows, key_blocks)
        lengths = 0 if key_lengths is None else key_lengths.data_ptr()
        parameters = QuantizeParams(
            *(x.data_ptr() for x in (q, k, v)),
            lengths,
            *(address[name] for name in ("query", "key", "value", "query_scale", "key_scale", "key_mean")),
            *(address[name] for name in ("value_scale", "value_mean", "value_error", "lse_shift")),
            *((ctypes.c_int64 * 3)(*x.stride()[:3]) for x in (q, k, v)),
            *sizes,
            head_dim**-0.5 if scale is None else scale,
        )
        statistics_kernel, quantize_kernel = self.quantizers[q.dtype == torch.bfloat16]
        blocks = max(-(-query_rows // variant.keys), key_blocks)
        launch(statistics_kernel, (8, kv_heads, batch), 256, parameters)
        launch(quantize_kernel, (blocks, heads + 2 * kv_heads, batch), 256, parameters)
        return buffers, address, sizes, lengths, q.dtype, causal

    def run(self, state, poison: bool = False) -> tuple[Tensor, Tensor | None]:
        _, address, sizes, lengths, dtype, causal = state
        batch, heads, _, rows, _, head_dim = sizes[:6]
        output = torch.empty((batch, heads, rows, head_dim), dtype=dtype, device="cuda")
        lse = torch.empty((batch, heads, rows), dtype=torch.float32, device="cuda") if address["lse_shift"] else None
        if poison:
            output.fill_(torch.nan)
        parameters = AttentionParams(
            *(address[name] for name in ("query", "key", "value", "query_scale", "key_scale", "value_scale")),
            *(address[name] for name in ("value_mean", "value_error", "lse_shift")),
            lengths,
            output.data_ptr(),
            0 if lse is None else lse.data_ptr(),
            (ctypes.c_int64 * 3)(*output.stride()[:3]),
            *sizes,
            int(causal),
            int(dtype == torch.bfloat16),
        )
        tiles = batch * heads * -(-rows // (64 * self.variant.warpgroups))
        sms = torch.cuda.get_device_properties(0).multi_processor_count
        grid = min(tiles, sms) if self.variant.persistent else tiles
        launch(self.attention, (grid, 1, 1), self.variant.threads, parameters, self.variant.shared_bytes)
        return output, lse


def oracle(q, k, v, keys: int, *, causal=False, key_lengths=None, scale=None) -> tuple[Tensor, Tensor]:
    """The reference with this kernel's granularity; V's mean quantisation error is added back with V's mean."""
    recipe = Recipe(qk="int8", pv="fp8", smooth_v=True, key_block=keys, int8_rows=(1, keys))
    operands = quantize_operands(q, k, v, recipe, key_lengths=key_lengths)
    values = v.float()
    count = torch.full((q.shape[0], 1, 1, 1), k.shape[2], device=q.device)
    if key_lengths is not None:
        values = values.where(valid_tokens(key_lengths, k.shape[2]), 0.0)
        count = key_lengths.clamp(min=1)[:, None, None, None]
    mean = (values.sum(2, keepdim=True) - operands.value.sum(2, keepdim=True)) / count
    operands = dataclasses.replace(operands, value_mean=mean)
    return attend(
        operands,
        ScoreMask(None, causal, key_lengths, k.shape[2]),
        recipe,
        q.shape[-1] ** -0.5 if scale is None else scale,
    )


def rel_l1(x: Tensor, reference: Tensor) -> float:
    return ((x.float() - reference).abs().sum() / reference.abs().sum()).item()


def tensors(batch, heads, kv_heads, rows, keys, head_dim, dtype, seed=0, strided=False):
    generator = torch.Generator("cuda").manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator, device="cuda", dtype=torch.float32)

    q = normal(batch, heads, rows, head_dim)
    k = normal(batch, kv_heads, keys, head_dim) + 2 * normal(1, kv_heads, 1, head_dim)
    v = normal(batch, kv_heads, keys, head_dim)
    out = [x.to(dtype) for x in (q, k, v)]
    return [x.transpose(1, 2).contiguous().transpose(1, 2) if strided else x for x in out]


CASES = [  # batch, heads, kv_heads, rows, keys, options
    (1, 2, 2, 128, 128, {}),
    (1, 2, 2, 512, 1024, {}),
    (2, 4, 2, 333, 777, {"lse": True}),
    (1, 2, 1, 300, 300, {"causal": True, "lse": True}),
    (1, 2, 2, 1000, 517, {"causal": True, "strided": True}),
    (1, 2, 2, 200, 1400, {"causal": True}),
    (3, 2, 2, 70, 600, {"lengths": (600, 131, 0), "lse": True}),
    (1, 150, 150, 257, 260, {"dtype": torch.float16, "scale": -0.2}),
    (1, 2, 2, 256, 512, {"head_dim_step": -24}),
    (1, 1, 1, 1, 1, {"lse": True}),
]


def check_case(kernel: Kernel, case) -> tuple[float, float]:
    batch, heads, kv_heads, rows, keys, options = case
    head_dim = kernel.variant.head_dim + options.get("head_dim_step", 0)
    dtype = options.get("dtype", torch.bfloat16)
    q, k, v = tensors(batch, heads, kv_heads, rows, keys, head_dim, dtype, 1, options.get("strided", False))
    lengths = options.get("lengths")
    key_lengths = None if lengths is None else torch.tensor(lengths, dtype=torch.int32, device="cuda")
    shared = {"causal": options.get("causal", False), "key_lengths": key_lengths, "scale": options.get("scale")}
    state = kernel.prepare(q, k, v, lse=options.get("lse", False), **shared)
    output, lse = kernel.run(state, poison=True)
    expected, expected_lse = oracle(q, k, v, kernel.variant.keys, **shared)
    error = rel_l1(output, expected)
    lse_error = 0.0
    if lse is not None:
        finite = expected_lse.isfinite()
        assert torch.equal(finite, lse.isfinite()), "LSE is -inf at other rows than the reference's"
        lse_error = (lse - expected_lse)[finite].abs().max().item()
    return error, lse_error


def milliseconds(function, seconds: float) -> float:
    function()
    torch.cuda.synchronize()
    start = time.perf_counter()
    function()
    torch.cuda.synchronize()
    repeats = max(3, min(200, int(seconds / (time.perf_counter() - start))))
    events = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    events[0].record()
    for event in events[1:]:
        function()
        event.record()
    torch.cuda.synchronize()
    return statistics.median(a.elapsed_time(b) for a, b in itertools.pairwise(events))


def time_shape(name: str, kernels: list[Kernel], seconds: float) -> None:
    batch, heads, length, head_dim, causal = SHAPES[name]
    q, k, v = tensors(batch, heads, heads, length, length, head_dim, torch.bfloat16)
    flops = 4 * batch * heads * length**2 * head_dim / (2 if causal else 1) / 1e9
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        sdpa = milliseconds(
            lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal), seconds
        )
    rows = slice(length - 128, length)
    exact = attention_fp32(q[:, :2, rows], k[:, :2], v[:, :2])[0] if not causal else None
    print(f"{name:12} cudnn {flops / sdpa:6.0f}", flush=True)
    for kernel in kernels:
        state = kernel.prepare(q, k, v, causal=causal)
        error = rel_l1(kernel.run(state)[0][:, :2, rows], exact) if exact is not None else float("nan")
        alone = milliseconds(lambda kernel=kernel, state=state: kernel.run(state), seconds)
        prepared = milliseconds(lambda kernel=kernel: kernel.prepare(q, k, v, causal=causal), seconds / 4)
        whole = milliseconds(lambda kernel=kernel: kernel.run(kernel.prepare(q, k, v, causal=causal)), seconds)
        print(
            f"{name:12} {kernel.variant.name:22} kernel {flops / alone:6.0f} whole {flops / whole:6.0f} TFLOP/s"
            f"  {alone:8.3f} ms, prepare {prepared * 1e3:6.0f} us  rel L1 {error:.4f}",
            flush=True,
        )


VARIANTS = [
    Variant("base", 128),
    Variant("no pingpong", 128, pingpong=0),
    Variant("no promotion", 128, promote=0),
    Variant("int to float", 128, magic=0),
    Variant("poly 3/16", 128, poly=3),
    Variant("poly 5/16", 128, poly=5),
    Variant("plain grid", 128, persistent=False),
    Variant("base", 64, stages=8),
    Variant("no pingpong", 64, stages=8, pingpong=0),
    Variant("no pp poly 4/16", 64, stages=8, pingpong=0, poly=4),
    Variant("3x64 keys 96", 64, keys=96, warpgroups=3, stages=8, pingpong=0),
    Variant("3x64 keys 96 poly 4", 64, keys=96, warpgroups=3, stages=8, pingpong=0, poly=4),
    Variant("3x64 keys 128 no prom", 64, warpgroups=3, stages=8, pingpong=0, promote=0),
    Variant("3x64 keys 64", 64, keys=64, warpgroups=3, stages=8, pingpong=0),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=0.25, help="time per measurement")
    parser.add_argument("--shapes", default=",".join(SHAPES), help="comma-separated")
    options = parser.parse_args()
    faulthandler.dump_traceback_later(200, exit=True)  # a kernel that hangs must not hold the machine
    torch.zeros(1, device="cuda")
    quantizer_keys = {(variant.head_dim, variant.keys) for variant in VARIANTS}
    jobs = {variant: ("int8_sm90_attention.cu", variant.defines) for variant in VARIANTS}
    for head_dim, keys in quantizer_keys:
        for bfloat16 in (0, 1):
            defines = (f"-DHEAD_DIM={head_dim}", f"-DKEYS={keys}", f"-DBFLOAT16={bfloat16}")
            jobs[head_dim, keys, bfloat16] = ("int8_sm90_quantize.cu", defines)
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as directory, ThreadPoolExecutor(16) as pool:
        compiled = dict(
            zip(jobs, pool.map(lambda job: compile_cubin(*job, Path(directory)), jobs.values()), strict=True)
        )
    print(f"compiled {len(jobs)} in {time.perf_counter() - start:.0f} s")
    kernels = []
    for variant in VARIANTS:
        cubin, report = compiled[variant]
        print(f"D{variant.head_dim} {variant.name:22} {report}")
        quantizers = {b: compiled[variant.head_dim, variant.keys, b][0] for b in (0, 1)}
        kernels.append(Kernel(variant, cubin, quantizers))
    good = []
    for kernel in kernels:
        errors = [check_case(kernel, case) for case in CASES]
        text = " ".join(f"{error:.4f}" for error, _ in errors)
        fine = all(error < 0.02 for error, _ in errors) and max(lse for _, lse in errors) < 0.01
        lse = max(lse for _, lse in errors)
        print(f"D{kernel.variant.head_dim} {kernel.variant.name:22} {text} lse {lse:.5f} {'' if fine else 'WRONG'}")
        good.append(kernel)
    for name in options.shapes.split(","):
        time_shape(name, [kernel for kernel in good if kernel.variant.head_dim == SHAPES[name][3]], options.seconds)


if __name__ == "__main__":
    main()
