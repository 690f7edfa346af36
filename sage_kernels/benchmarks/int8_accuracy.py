"""Error of the 8-bit rungs, and of sageattention where installed, on random tensors and on those of the trained model.

    PYTHONPATH=sage_kernels/src python sage_kernels/benchmarks/int8_accuracy.py

Random Q, K and V are normal in bfloat16, K with a bias for each head and channel. The demo model's are those of all its
blocks at three of twenty steps. Relative L1 to exact attention in float32, over all tensors of a set.
"""

import argparse
import importlib
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from result_file import ROOT, add_commit_option, describe
from torch import Tensor

import sage_kernels
from sage_kernels.evidence import write_json
from sage_kernels.reference import attention_fp32

RUNGS = ("fp16", "int8", "int8_fp16")
RANDOM_SHAPES = ((1, 8, 8192, 128), (1, 8, 8192, 64))
CAPTURED_STEPS = (5, 10, 15)
Inputs = tuple[Tensor, Tensor, Tensor]


def main() -> None:
    """Measure, print the table, write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "int8_accuracy.json")
    add_commit_option(parser)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("there is no CUDA GPU here")
    device = torch.device("cuda", torch.cuda.current_device())
    sets = {f"random_d{shape[3]}": [random_inputs(shape, device)] for shape in RANDOM_SHAPES}
    sets["demo"] = demo_inputs(device)
    rows = [
        {"benchmark": "numerics", "shape": name, "method": method, "rel_l1": error}
        for name, inputs in sets.items()
        for method, error in errors(inputs).items()
    ]
    for row in rows:
        print(f"{row['shape']:12} {row['method']:20} relative L1 {row['rel_l1']:.5f}")
    write_json(options.out, {**describe("int8_accuracy.py", device, options.commit), "rows": rows})


def errors(inputs: list[Inputs]) -> dict[str, float]:
    """By method, sum|output - exact| / sum|exact| over all inputs."""
    methods: dict[str, Callable[..., Any]] = {name: rung(name) for name in RUNGS}
    try:
        sageattn = importlib.import_module("sageattention").sageattn
        # That package subtracts K's mean in place.
        methods[f"sageattention_{metadata.version('sageattention')}"] = lambda q, k, v: sageattn(q, k.clone(), v)
    except ImportError:
        print("sageattention is not installed: left out")
    off, size = dict.fromkeys(methods, 0.0), 0.0
    for operands in inputs:
        exact, _ = attention_fp32(*operands)
        size += float(exact.abs().sum())
        for name, method in methods.items():
            off[name] += float((method(*operands).float() - exact).abs().sum())
    return {name: value / size for name, value in off.items()}


def rung(precision: str) -> Callable[..., Any]:
    """attention() of this package."""
    return lambda q, k, v: sage_kernels.attention(q, k, v, precision=precision)


def random_inputs(shape: tuple[int, int, int, int], device: torch.device) -> Inputs:
    """Q, K and V of shape [B, H, N, D]."""
    generator = torch.Generator(device).manual_seed(0)
    q, k, v = (torch.randn(shape, generator=generator, device=device, dtype=torch.bfloat16) for _ in range(3))
    bias = torch.randn((*shape[:2], 1, shape[3]), generator=generator, device=device, dtype=torch.bfloat16)
    return q, k.add_(bias, alpha=2), v


@torch.inference_mode()
def demo_inputs(device: torch.device) -> list[Inputs]:
    """Q, K and V of the trained demo model's self-attention while it draws one clip."""
    sys.path.insert(0, str(ROOT / "sage_kernels"))
    conditioning = importlib.import_module("demo.conditioning").conditioning
    sample = importlib.import_module("demo.sampling").sample
    checkpoint = importlib.import_module("demo.wan_checkpoint")
    router = importlib.import_module("sage_kernels.diffusers").AttentionRouter
    transformer = checkpoint.load_transformer(checkpoint.DEFAULT_WEIGHTS, device=device, dtype=torch.bfloat16)
    captured: list[Inputs] = []
    step = -1

    def next_step(_arguments: object) -> None:
        nonlocal step
        step += 1

    def attend(_block: object, call: Any) -> Tensor:
        if step in CAPTURED_STEPS and call.query.shape[2] == call.key.shape[2]:
            captured.append((call.query.contiguous(), call.key.contiguous(), call.value.contiguous()))
        output: Tensor = call.default()
        return output

    hooks = router(transformer, attend, next_step)
    sample(transformer, conditioning(3, 0), seed=0, device=device, dtype=torch.bfloat16)
    hooks.remove()
    return captured


if __name__ == "__main__":
    main()
