"""Accuracy of the gradients of 8-bit attention on the trained demo model's tensors, and which matmul costs how much.

    python sage_kernels/benchmarks/training_gradients.py --device cuda      (seconds; on a CPU some ten minutes)

Q, K, V of every block and the gradient that reaches its output are taken from backward passes of the model's training
loss on clips that it drew itself, at several noise levels, in bfloat16. Each row is one recipe of the reference, which
defines what the kernels compute, against exact gradients in float32, over all tensors together.
"""

import argparse
import json
import platform
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from datetime import date
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sage_kernels.diffusers import AttentionRouter
from sage_kernels.evidence import write_json
from sage_kernels.training.recipe import MATMULS, RECIPES, TrainingRecipe
from sage_kernels.training.reference import backward, forward

ROOT = Path(__file__).resolve().parents[2]
NOISE_LEVELS = {0.3: 1, 0.7: 4, 0.95: 7}  # and the digit that is drawn
NAMES = ("output", "dq", "dk", "dv")
# What the paper's authors report for all layers of CogVideoX-2B, as L1 and cosine of dQ, dK and dV.
GOALS = {"dq": (0.0290, 0.9987), "dk": (0.0317, 0.9993), "dv": (0.0423, 0.9995)}
INT8, FP8 = RECIPES["int8"], RECIPES["fp8"]
METHODS: dict[str, TrainingRecipe] = {
    "int8": INT8,
    "fp8": FP8,
    "int8, K not smoothed": replace(INT8, smooth_k=False),
    "fp8, K not smoothed": replace(FP8, smooth_k=False),
    "int8, one scale for each tile of K in dS K": replace(INT8, channel_keys=False),
    "int8, rowsum(dS) mean(k) added to dQ": replace(INT8, return_mean=True),
    "int8, tiles of 128 queries": replace(INT8, query_tile=128, backward_queries=128),
    "int8, every matmul": replace(INT8, exact=frozenset()),
    **{f"int8, every matmul but {name}": replace(INT8, exact=frozenset({name})) for name in MATMULS if name != "dp"},
    **{f"int8, only {name}": replace(INT8, exact=frozenset(MATMULS) - {name}) for name in MATMULS},
}
Capture = tuple[Tensor, Tensor, Tensor, Tensor]


def main() -> None:
    """Capture, compute, print the table, write the result file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "training_gradients.json")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    torch.set_float32_matmul_precision("highest")
    captures = list(captured_tensors(options.device))
    print(f"{len(captures)} calls of {tuple(captures[0][0].shape)}")
    exact = [exact_gradients(*capture) for capture in captures]
    rows = [row for name, recipe in METHODS.items() for row in measure(name, recipe, captures, exact)]
    write_json(
        options.out,
        {
            "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
            "gpu": torch.cuda.get_device_name() if options.device.startswith("cuda") else None,
            "torch": torch.__version__,
            "commit": subprocess.run(
                ["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
            ).stdout.strip(),
            "date": date.today().isoformat(),
            "command": f"python sage_kernels/benchmarks/training_gradients.py --device {options.device}",
            "rows": rows,
        },
    )
    print(json.dumps(GOALS), "are the authors' numbers for CogVideoX-2B, as L1 and cosine")


def captured_tensors(device: str) -> Iterator[Capture]:
    """Q, K, V [1, H, N, D] and the gradient of the output of every self-attention, in bfloat16."""
    sys.path.insert(0, str(ROOT / "sage_kernels"))
    checkpoint, sampling, conditioning = (
        import_module(f"demo.{name}") for name in ("wan_checkpoint", "sampling", "conditioning")
    )
    model = checkpoint.load_transformer(checkpoint.DEFAULT_WEIGHTS, device=device, dtype=torch.float32).train()
    model.requires_grad_(True)
    contexts = conditioning.conditioning_table(torch.device(device))
    generator = torch.Generator(device).manual_seed(0)
    for (sigma, digit), direction in zip(NOISE_LEVELS.items(), range(len(NOISE_LEVELS)), strict=True):
        context = contexts[digit, direction][None]
        data = sampling.sample(model, context, seed=digit, device=device).clone()
        noise = torch.randn(data.shape, device=device, generator=generator)
        found: list[list[Tensor]] = []

        def attend(block: Any, call: Any, found: list[list[Tensor]] = found) -> Tensor:
            output: Tensor = call.default()
            if call.query.shape[2] == call.key.shape[2]:
                tensors = [x.detach().bfloat16() for x in (call.query, call.key, call.value)]
                found.append(tensors)
                output.register_hook(lambda gradient, tensors=tensors: tensors.append(gradient.detach().bfloat16()))
            return output

        router = AttentionRouter(model, attend)
        timestep = torch.full((1,), sigma * 1000, device=device)
        velocity = model((1 - sigma) * data + sigma * noise, timestep, context, return_dict=False)[0]
        torch.nn.functional.mse_loss(velocity, noise - data).backward()
        router.remove()
        yield from (tuple(tensors) for tensors in found)  # type: ignore[misc]


def exact_gradients(q: Tensor, k: Tensor, v: Tensor, d_output: Tensor) -> tuple[Tensor, ...]:
    """Output, dQ, dK and dV by autograd through attention in float32."""
    operands = [x.float().requires_grad_() for x in (q, k, v)]
    scores = operands[0] @ operands[1].mT * q.shape[-1] ** -0.5
    output = scores.softmax(-1) @ operands[2]
    output.backward(d_output.float())
    return output.detach(), *(x.grad for x in operands if x.grad is not None)


def measure(
    name: str, recipe: TrainingRecipe, captures: list[Capture], exact: list[tuple[Tensor, ...]]
) -> list[dict[str, Any]]:
    """One row for the output and each gradient."""
    results = []
    for q, k, v, d_output in captures:
        saved = forward(q, k, v, recipe)
        results.append((saved.output, *backward(saved, d_output, recipe)))
    rows = []
    for index, tensor in enumerate(NAMES):
        x = torch.cat([result[index].double().flatten() for result in results])
        wanted = torch.cat([result[index].double().flatten() for result in exact])
        difference = x - wanted
        rows.append(
            {
                "benchmark": "gradients",
                "shape": "wan_digits",
                "method": name,
                "tensor": tensor,
                "rel_l1": float(difference.abs().sum() / wanted.abs().sum()),
                "cosine": float(torch.nn.functional.cosine_similarity(x, wanted, dim=0)),
                "rmse": float(difference.square().mean().sqrt()),
            }
        )
    print(
        f"{name:40}", "  ".join(f"{row['tensor']} {row['rel_l1']:.4f} {row['cosine']:.5f}" for row in rows), flush=True
    )
    return rows


if __name__ == "__main__":
    main()
