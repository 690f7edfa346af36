"""Accuracy of the gradients of 8-bit attention on tensors of trained models, and which matmul costs how much.

    export PYTHONPATH=sage_kernels/src
    python sage_kernels/benchmarks/training_gradients.py --device cuda          (seconds; on a CPU an hour)
    python sage_kernels/benchmarks/training_gradients.py --short                (two calls of each model, on a CPU)

Q, K, V of every layer and the gradient that reaches its output are taken, in bfloat16, from backward passes of the
training loss of two models: the demo's video model on clips that it drew itself, at several noise levels; and the
language model that fine_tuning.py starts from, on prose it never saw (causal). Each row is one recipe of the reference,
which defines what the kernels compute, against exact gradients in float32, over all tensors of a model together.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from importlib import import_module
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from result_file import ROOT, describe
from torch import Tensor
from tqdm import tqdm

sys.path.append(str(Path(__file__).resolve().parent))
from training_study.attention_methods import training_attention
from training_study.study import Study
from training_study.training_run import autocast

from sage_kernels.diffusers import AttentionRouter
from sage_kernels.evidence import write_json
from sage_kernels.training import sm90_backend
from sage_kernels.training.recipe import MATMULS, RECIPES, TrainingRecipe
from sage_kernels.training.reference import backward, forward

NOISE_LEVELS = {0.3: 1, 0.7: 4, 0.95: 7}  # and the digit that is drawn
NAMES = ("output", "dq", "dk", "dv")
SEQUENCES = 4  # of the language model
# What the paper's authors report for all layers of CogVideoX-2B, as L1 and cosine of dQ, dK and dV.
GOALS = {"dq": (0.0290, 0.9987), "dk": (0.0317, 0.9993), "dv": (0.0423, 0.9995)}
INT8 = RECIPES["int8"]


def recipes(number: str) -> dict[str, TrainingRecipe]:
    """The ablations of one number format by name."""
    base = RECIPES[number]
    every = replace(base, exact=frozenset())
    return {
        number: base,
        f"{number}, K not smoothed": replace(base, smooth_k=False),
        f"{number}, every matmul": every,
        f"{number}, every matmul, K not smoothed": replace(every, smooth_k=False),
        **{f"{number}, every matmul but {name}": replace(base, exact=frozenset({name})) for name in MATMULS},
        **{f"{number}, only {name}": replace(base, exact=frozenset(MATMULS) - {name}) for name in MATMULS},
    }


METHODS = {
    **recipes("int8"),
    **recipes("fp8"),
    "int8, as in CUDA on Hopper GPUs": sm90_backend.recipe(),
    "int8, one scale for each tile of K in dS K": replace(INT8, channel_keys=False),
    "int8, rowsum(dS) mean(k) added to dQ": replace(INT8, return_mean=True),
    "int8, tiles of 128 queries": replace(INT8, query_tile=128, backward_queries=128),
    "int8, 128 keys share a scale of dS in dS K": replace(INT8, backward_keys=128),
    "int8, 32 keys share a scale of dS in dS K": replace(INT8, backward_keys=32),
    "int8, 64 tokens share a scale of K and V": replace(INT8, key_tile=64),
    "int8, dp and dq in 16 bit": replace(INT8, exact=frozenset({"dp", "dq"})),
    "int8, dp and pv in 16 bit": replace(INT8, exact=frozenset({"dp", "pv"})),
    "int8, dp and forward pass in 16 bit": replace(INT8, exact=frozenset({"dp", "qk", "pv"})),
}


@dataclass(frozen=True, eq=False)
class Capture:
    """One call of attention in training: bfloat16 [B, H, N, D] each."""

    query: Tensor
    key: Tensor
    value: Tensor
    d_output: Tensor
    is_causal: bool


def main() -> None:
    """Capture, compute, print the table, write the result file after each model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=["wan_digits", "byte_lm"], default=["wan_digits", "byte_lm"])
    study, options = Study.from_command_line(parser)
    torch.set_float32_matmul_precision("highest")
    out = options.out or (None if study.short else Path(__file__).parent / "results" / "training_gradients.json")
    before = json.loads(out.read_text(encoding="utf-8")) if out is not None and out.exists() else {}
    kept, measured = before.get("rows", []), before.get("measured", {})
    for name in options.models:
        found = demo_captures(study.device) if name == "wan_digits" else language_captures(study)
        captures = list(islice(found, 2) if study.short else found)
        print(f"{name}: {len(captures)} calls of {tuple(captures[0].query.shape)}")
        exact = [exact_gradients(capture) for capture in captures]
        rows = [
            row
            for method, recipe in tqdm(METHODS.items(), desc=name, mininterval=2)
            for row in measure(name, method, recipe, captures, exact)
        ]
        kept = [row for row in kept if row["shape"] != name] + rows
        if out is not None:
            about = describe("training_gradients.py", study.device, options.commit)
            measured = measured | {name: about}
            write_json(out, {**about, "measured": measured, "rows": kept})
    print(json.dumps(GOALS), "are the authors' numbers for CogVideoX-2B, as L1 and cosine")


def demo_captures(device: str) -> Iterator[Capture]:
    """Every self-attention of the video model."""
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
        yield from (Capture(*tensors, is_causal=False) for tensors in found)


def language_captures(study: Study) -> Iterator[Capture]:
    """Every attention of the language model."""
    model = study.started_model("bf16")
    text = study.corpus("prose").held_out
    exact, found = training_attention("bf16"), list[list[Tensor]]()

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        tensors = [x.detach().bfloat16() for x in (q, k, v)]
        found.append(tensors)
        output = exact(q, k, v)
        output.register_hook(lambda gradient: tensors.append(gradient.detach().bfloat16()))
        return output

    model.attend = attend
    span = model.config.context
    rows = torch.stack([text[i * span : (i + 1) * span + 1] for i in range(1 if study.short else SEQUENCES)]).long()
    with autocast(study.torch_device.type == "cuda"):
        loss = model.loss(rows)
    loss.backward()
    yield from (Capture(*tensors, is_causal=True) for tensors in found)


def exact_gradients(capture: Capture) -> tuple[Tensor, ...]:
    """Output, dQ, dK and dV by autograd through attention in float32."""
    operands = [x.float().requires_grad_() for x in (capture.query, capture.key, capture.value)]
    scores = operands[0] @ operands[1].mT * capture.query.shape[-1] ** -0.5
    if capture.is_causal:
        hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
        scores = scores.masked_fill(hidden, -torch.inf)
    output = scores.softmax(-1) @ operands[2]
    output.backward(capture.d_output.float())
    return output.detach(), *(x.grad for x in operands if x.grad is not None)


def measure(
    model: str, method: str, recipe: TrainingRecipe, captures: list[Capture], exact: list[tuple[Tensor, ...]]
) -> list[dict[str, Any]]:
    """One row for the output and each gradient."""
    results = []
    for capture in captures:
        saved = forward(capture.query, capture.key, capture.value, recipe, is_causal=capture.is_causal)
        results.append((saved.output, *backward(saved, capture.d_output, recipe)))
    rows = []
    for index, tensor in enumerate(NAMES):
        x = torch.cat([result[index].double().flatten() for result in results])
        wanted = torch.cat([result[index].double().flatten() for result in exact])
        difference = x - wanted
        rows.append(
            {
                "benchmark": "gradients",
                "shape": model,
                "method": method,
                "tensor": tensor,
                "rel_l1": float(difference.abs().sum() / wanted.abs().sum()),
                "cosine": float(torch.nn.functional.cosine_similarity(x, wanted, dim=0)),
                "rmse": float(difference.square().mean().sqrt()),
            }
        )
    print(
        f"{method:40}",
        "  ".join(f"{row['tensor']} {row['rel_l1']:.4f} {row['cosine']:.5f}" for row in rows),
        flush=True,
    )
    return rows


if __name__ == "__main__":
    main()
