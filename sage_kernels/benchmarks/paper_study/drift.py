"""Errors that accumulate from layer to layer, with and without the most sensitive layers in 16 bit."""

from typing import Any

import torch
from torch import Tensor, nn

from demo.conditioning import conditioning
from demo.sampling import DEFAULT_STEPS, TIMESTEPS, sample, simple_sigmas
from demo.wan_checkpoint import load_transformer
from paper_study.tensor_sets import DEMO_CLIP, SdpaTap, load_sentence_model
from sage_kernels.block_overrides import BlockId
from sage_kernels.diffusers import AttentionRouter, SdpaCall
from sage_kernels.recipes import RECIPES, SAGE_ATTENTION_3_PUBLISHED, Recipe
from sage_kernels.reference import quantized_attention

RECIPES_COMPARED: dict[str, Recipe] = {"SageAttention3": SAGE_ATTENTION_3_PUBLISHED, "ours: fp4": RECIPES["fp4"]}


def demo_drift(device: torch.device, steps: tuple[int, ...], kept: tuple[int, ...]) -> list[dict[str, Any]]:
    """Relative L1 of the hidden state behind every block of the demo model, mean over `steps` of a 16-bit run."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model = load_transformer(device=device, dtype=dtype)
    digit, direction, seed = DEMO_CLIP
    context = conditioning(digit, direction)
    latents: dict[int, Tensor] = {}

    def keep(done: int, x: Tensor) -> None:
        if done in steps:
            latents[done] = x.clone()

    last = max(steps)
    sample(model, context, seed=seed, steps=DEFAULT_STEPS, device=device, dtype=dtype, on_step=keep)
    sigmas = simple_sigmas(DEFAULT_STEPS)
    assert last < DEFAULT_STEPS

    def forward(step: int) -> None:
        timestep = (sigmas[step] * TIMESTEPS).reshape(1).to(device)
        model(latents[step].to(dtype), timestep, context[None].to(device, dtype), return_dict=False)

    def run(step: int, recipe: Recipe | None, kept_blocks: set[int]) -> list[Tensor]:
        def handle(block: BlockId | None, call: SdpaCall) -> Tensor:
            quantized = recipe is not None and block is not None and call.query.shape[2] == call.key.shape[2]
            if recipe is None or block is None or not quantized or block.index in kept_blocks:
                return call.default()
            operands = (x.bfloat16() for x in (call.query, call.key, call.value))
            return quantized_attention(*operands, recipe, scale=call.scale)[0].to(call.query.dtype)

        router = AttentionRouter(model, handle)
        try:
            with torch.inference_mode():
                return states_behind(model.blocks, lambda: forward(step))
        finally:
            router.remove()

    return _rows("trained_model", steps, len(model.blocks), run, kept)


def sentence_drift(device: torch.device, kept: tuple[int, ...]) -> list[dict[str, Any]]:
    """The same for the sentence model; raises ImportError where it isn't installed."""
    model, batch = load_sentence_model(device)

    def run(_: int, recipe: Recipe | None, kept_blocks: set[int]) -> list[Tensor]:
        def handle(layer: int, q: Tensor, k: Tensor, v: Tensor, default: Any) -> Tensor:
            if recipe is None or layer in kept_blocks:
                return default()
            return quantized_attention(*(x.bfloat16() for x in (q, k, v)), recipe)[0].to(q.dtype)

        with torch.inference_mode(), SdpaTap(handle):
            return states_behind(model.encoder.layer, lambda: model(**batch))

    return _rows("sentence_model", (0,), len(model.encoder.layer), run, kept)


def states_behind(blocks: nn.ModuleList, forward: Any) -> list[Tensor]:
    """Outputs of all blocks during one forward."""
    states: list[Tensor] = []

    def note(_module: nn.Module, _args: Any, output: Any) -> None:
        states.append((output[0] if isinstance(output, tuple) else output).float())

    handles = [block.register_forward_hook(note) for block in blocks]
    try:
        forward()
    finally:
        for handle in handles:
            handle.remove()
    return states


def _rows(name: str, steps: tuple[int, ...], count: int, run: Any, kept: tuple[int, ...]) -> list[dict[str, Any]]:
    """For each recipe: errors behind each layer, and with so many layers of the largest growth in 16 bit."""
    exact = {step: run(step, None, set()) for step in steps}

    def mean_errors(recipe: Recipe, blocks: set[int]) -> list[float]:
        totals = [0.0] * count
        for step in steps:
            for layer, (a, b) in enumerate(zip(run(step, recipe, blocks), exact[step], strict=True)):
                totals[layer] += ((a - b).abs().sum() / b.abs().sum()).item() / len(steps)
        return totals

    rows = []
    for method, recipe in RECIPES_COMPARED.items():
        direct = mean_errors(recipe, set())
        growth = [error - before for error, before in zip(direct, [0.0, *direct], strict=False)]
        by_growth = sorted(range(count), key=lambda layer: growth[layer])
        for number in (0, *kept):
            blocks = set(by_growth[count - number :])
            values = mean_errors(recipe, blocks) if blocks else direct
            rows.append({"set": name, "method": method, "kept": sorted(blocks), "rel_l1": values})
    return rows
