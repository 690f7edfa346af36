"""LoRA fine-tuning of a diffusers video model with INT8 attention: the demo model learns dark digits.

    pip install "sage-kernels[lora]"
    export PYTHONPATH=sage_kernels/src
    python sage_kernels/examples/lora_fine_tuning.py                        # 300 steps on a GPU
    python sage_kernels/examples/lora_fine_tuning.py --steps 3 --batch 1    # on a CPU, by the slow reference

Only two lines differ from any other LoRA training: add_adapter() comes from diffusers, patch_training() is ours. Writes
the adapter, as diffusers loads it, and loss.json to --out, and prints the loss on clips that are not trained on.
"""

import argparse
import json
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from torch import Tensor
from tqdm import tqdm

sys.path.append(str(Path(__file__).resolve().parents[1]))
from demo.conditioning import conditioning_table
from demo.glyphs import load_glyphs
from demo.latents import encode
from demo.moving_digits import random_batch
from demo.sampling import TIMESTEPS, shift_sigma
from demo.wan_checkpoint import load_transformer
from sage_kernels.diffusers_training import patch_training

TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]
NOISE_SHIFT = 3.0
MIN_TOKENS = 64  # cross-attention to eight conditioning tokens stays in 16 bit


def main() -> None:
    """Train, write adapter and losses, say what it brought."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--attention", choices=["int8", "fp8", "bf16"], default="int8")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--checkpointing", action="store_true", help="recompute blocks in the backward pass")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=Path("lora_output"))
    options = parser.parse_args()
    transformer, result = train(options)
    transformer.save_lora_adapter(options.out)
    (options.out / "loss.json").write_text(json.dumps(result), encoding="utf-8")
    print(f"{result['trained_parameters']:,} parameters, {options.steps} steps in {result['seconds']:.1f} s")
    print(f"attention: {result['coverage']}")
    print(
        f"loss on held-out clips: {result['held_out_before']:.4f} before, {result['held_out_after']:.4f} after; "
        f"adapter and losses are in {options.out}"
    )


def train(options: argparse.Namespace) -> tuple[torch.nn.Module, dict[str, Any]]:
    """The transformer with its trained adapter, and what the training was like."""
    device = torch.device(options.device)
    torch.manual_seed(0)
    transformer = load_transformer(device=device).train()
    transformer.add_adapter(LoraConfig(r=options.rank, lora_alpha=options.rank, target_modules=TARGETS))
    if options.checkpointing:
        transformer.enable_gradient_checkpointing()
    weights = [parameter for parameter in transformer.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=options.learning_rate, weight_decay=0.0)
    clips, held_out = Clips(device, seed=1), Clips(device, seed=2).draw(options.batch)

    patched = nullcontext() if options.attention == "bf16" else patch_training(
        transformer, precision=options.attention, min_tokens=MIN_TOKENS, emulate=device.type == "cpu"
    )  # fmt: skip
    losses, start = [], time.perf_counter()
    with patched as patch:
        before = evaluate(transformer, held_out)
        for step in tqdm(range(options.steps), desc=f"LoRA, {options.attention}", mininterval=1):
            for group in optimizer.param_groups:
                group["lr"] = options.learning_rate * min(1.0, (step + 1) / 20)
            loss = flow_matching_loss(transformer, *clips.draw(options.batch))
            loss.backward()
            torch.nn.utils.clip_grad_norm_(weights, 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            losses.append(loss.detach())
        after = evaluate(transformer, held_out)
    seconds = time.perf_counter() - start

    return transformer, {
        "attention": options.attention,
        "coverage": "torch's attention" if patch is None else str(patch.coverage),
        "trained_parameters": sum(parameter.numel() for parameter in weights),
        "held_out_before": before,
        "held_out_after": after,
        "seconds": seconds,
        "losses": torch.stack(losses).tolist(),
    }


class Clips:
    """Moving digits with black and white exchanged, as the model's latents, with noise to take off."""

    def __init__(self, device: torch.device, seed: int) -> None:
        self._glyphs, self._labels = load_glyphs(device)
        self._contexts = conditioning_table(device)
        self._generator = torch.Generator(device).manual_seed(seed)

    def draw(self, batch: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Latents and noise [B, 16, 8, 32, 32], noise levels [B] in 0..1 and contexts [B, 8, 4096]."""
        clips, digits, directions = random_batch(self._glyphs, self._labels, batch, self._generator)
        latents = encode(-clips)
        noise = torch.randn(latents.shape, device=latents.device, generator=self._generator)
        uniform = torch.rand(batch, device=latents.device, generator=self._generator)
        return latents, noise, shift_sigma(uniform, NOISE_SHIFT), self._contexts[digits, directions]


def flow_matching_loss(
    transformer: torch.nn.Module, latents: Tensor, noise: Tensor, sigma: Tensor, context: Tensor
) -> Tensor:
    """Mean square error of the predicted velocity."""
    level = sigma.view(-1, 1, 1, 1, 1)
    with torch.autocast("cuda", torch.bfloat16, enabled=latents.is_cuda):
        noisy = (1 - level) * latents + level * noise
        velocity = transformer(noisy, sigma * TIMESTEPS, context, return_dict=False)[0]
    return torch.nn.functional.mse_loss(velocity.float(), noise - latents)


@torch.no_grad()
def evaluate(transformer: torch.nn.Module, clips: tuple[Tensor, Tensor, Tensor, Tensor]) -> float:
    """Loss on given clips."""
    return float(flow_matching_loss(transformer, *clips))


if __name__ == "__main__":
    main()
