"""Train the demo model by flow matching on clips drawn on the fly.

    python dev.py train --minutes 8 --out NEW_FOLDER         (with a CUDA GPU)

Writes the weights, the loss curve, metrics and a sheet of samples to --out. Needs scikit-learn and matplotlib.
"""

from __future__ import annotations

import argparse
import copy
import csv
import json
import math
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import WanTransformer3DModel
from matplotlib.figure import Figure
from PIL import Image
from tqdm import tqdm

from .atomic_file import replacing
from .conditioning import conditioning_table
from .evaluation import ClipJudge
from .glyphs import load_glyphs
from .latents import decode, encode
from .moving_digits import FRAMES, NUM_DIGITS, NUM_DIRECTIONS, random_batch
from .sampling import DEFAULT_STEPS, TIMESTEPS, sample, shift_sigma
from .wan_checkpoint import DEFAULT_WEIGHTS, build_transformer, load_transformer, save_wan_checkpoint

WARMUP_STEPS = 300
CALIBRATION_STEPS = 60
LOG_EVERY = 50
CHECKPOINT_EVERY = 2000
EMA_DECAY = 0.999
STROKE_SHIFT, LAYOUT_SHIFT = 3.0, 30.0


@dataclass(frozen=True)
class Options:
    """Command line of the training; a run is repeated by giving it the `steps` that it reports."""

    out: Path
    minutes: float
    steps: int | None
    batch: int
    learning_rate: float
    seed: int
    device: str
    compile: bool
    seeds_evaluated: int


class Trainer:
    """Model, its EMA, optimizer and data of one run."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self.device = torch.device(options.device)
        torch.manual_seed(options.seed)
        torch.set_float32_matmul_precision("high")
        self.model = build_transformer().to(self.device)
        torch.nn.init.zeros_(self.model.proj_out.weight)
        self.ema: WanTransformer3DModel = copy.deepcopy(self.model).eval().requires_grad_(False)
        self.forward = torch.compile(self.model) if options.compile else self.model
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(),
            lr=options.learning_rate,
            betas=(0.9, 0.99),
            weight_decay=0.01,
            fused=self.device.type == "cuda",
        )
        self.generator = torch.Generator(self.device).manual_seed(options.seed)
        self.glyphs, self.labels = load_glyphs(self.device)
        self.contexts = conditioning_table(self.device)
        self.loss_curve: list[tuple[int, float, float]] = []

    def step(self, index: int, total: int) -> torch.Tensor:
        """One optimizer step at step `index` of `total`; the loss as a scalar on the device."""
        clips, digits, directions = random_batch(self.glyphs, self.labels, self.options.batch, self.generator)
        data = encode(clips)
        noise = torch.randn(data.shape, device=self.device, generator=self.generator)
        sigma = self._noise_levels()
        sigma_5d = sigma.view(-1, 1, 1, 1, 1)
        noisy = (1 - sigma_5d) * data + sigma_5d * noise
        with torch.autocast(self.device.type, torch.bfloat16):
            velocity = self.forward(noisy, sigma * TIMESTEPS, self.contexts[digits, directions], return_dict=False)[0]
        loss = torch.nn.functional.mse_loss(velocity.float(), noise - data)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for group in self.optimizer.param_groups:
            group["lr"] = self.options.learning_rate * _schedule(index, total)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        decay = min(EMA_DECAY, (index + 1) / (index + 10))
        torch._foreach_lerp_(list(self.ema.parameters()), list(self.model.parameters()), 1 - decay)
        return loss.detach()

    def _noise_levels(self) -> torch.Tensor:
        """Stratified over the batch: half of it for the strokes, half for what is settled at high noise; [batch]."""
        batch = self.options.batch
        strata = torch.arange(batch, device=self.device)
        jitter = torch.rand(batch, device=self.device, generator=self.generator)
        uniform = (strata + 1 - jitter) / batch
        # Which digit and where it goes is settled while the noise is still some fifty times the signal, because the
        # digit's thousands of pixels agree with each other.
        return torch.where(strata % 2 == 0, shift_sigma(uniform, STROKE_SHIFT), shift_sigma(uniform, LAYOUT_SHIFT))

    def save(self, steps_done: int, seconds: float) -> None:
        """Write the EMA weights with how they came about."""
        metadata = {
            "title": "moving handwritten digits, Wan architecture",
            "data": "scikit-learn load_digits (UCI Optical Recognition of Handwritten Digits, CC BY 4.0)",
            "license": "Apache-2.0",
            "seed": str(self.options.seed),
            "steps": str(steps_done),
            "batch": str(self.options.batch),
            "seconds": f"{seconds:.0f}",
            "device": _device_name(self.device),
        }
        save_wan_checkpoint(self.ema, self.options.out / DEFAULT_WEIGHTS.name, metadata)


def _schedule(index: int, total: int) -> float:
    warmup = min(WARMUP_STEPS, max(1, total // 10))
    if index < warmup:
        return (index + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (index - warmup) / max(1, total - warmup)))


def train(options: Options) -> Trainer:
    """Train, with the weights written every few thousand steps and at the end.

    Without `steps`, the speed of the steps after compilation decides how many fit into `minutes`.

    Raises:
        FloatingPointError: the loss is no longer finite.
    """
    start = time.monotonic()
    trainer = Trainer(options)
    # A guess until measured: only the warm-up of the learning rate depends on it so early.
    total = options.steps or 10_000
    progress = tqdm(total=total, desc="training", unit="step", mininterval=5)
    losses: list[torch.Tensor] = []
    calibration_start = 0.0
    index = 0
    while index < total:
        losses.append(trainer.step(index, total))
        index += 1
        progress.update()
        if options.steps is None and index in (CALIBRATION_STEPS // 2, CALIBRATION_STEPS):
            _synchronize(trainer.device)
            if index == CALIBRATION_STEPS:
                seconds_a_step = (time.monotonic() - calibration_start) / (CALIBRATION_STEPS // 2)
                left = options.minutes * 60 - (time.monotonic() - start)
                total = index + max(0, int(0.97 * left / seconds_a_step))
                progress.total = total
                tqdm.write(f"{1 / seconds_a_step:.1f} steps/s: {total} steps fit into {options.minutes} min")
            calibration_start = time.monotonic()
        if index % LOG_EVERY == 0 or index == total:
            mean = float(torch.stack(losses).mean())
            losses.clear()
            if not math.isfinite(mean):
                raise FloatingPointError(f"loss is {mean} at step {index}; lower --learning-rate")
            trainer.loss_curve.append((index, mean, time.monotonic() - start))
            progress.set_postfix(loss=f"{mean:.4f}")
        if index % CHECKPOINT_EVERY == 0 or index == total:
            trainer.save(index, time.monotonic() - start)
        if time.monotonic() - start > options.minutes * 60 and options.steps is None and index < total:
            tqdm.write(f"time is up at step {index} of {total}")
            trainer.save(index, time.monotonic() - start)
            break
    progress.close()
    return trainer


@torch.inference_mode()
def evaluate(trainer: Trainer) -> dict[str, float]:
    """Sample every digit in every direction from the written file, judge the clips and write samples.png."""
    device, out = trainer.device, trainer.options.out
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    transformer = load_transformer(out / DEFAULT_WEIGHTS.name, device=device, dtype=dtype)
    digits = torch.arange(NUM_DIGITS).repeat_interleave(NUM_DIRECTIONS)
    directions = torch.arange(NUM_DIRECTIONS).repeat(NUM_DIGITS)
    context = trainer.contexts[digits, directions]
    batches = []
    for seed in range(trainer.options.seeds_evaluated):
        progress = tqdm(total=DEFAULT_STEPS, desc=f"sampling seed {seed}", unit="step")
        latents = sample(
            transformer, context, seed=seed, device=device, dtype=dtype, on_step=lambda *_, bar=progress: bar.update()
        )
        progress.close()
        batches.append(decode(latents))
    _write_sheet(batches[0], out / "samples.png")
    judge = ClipJudge(trainer.glyphs, trainer.labels)
    count = len(batches)
    metrics = judge.metrics(torch.cat(batches), digits.repeat(count), directions.repeat(count))
    return {key: round(value, 4) for key, value in metrics.items()}


def _write_sheet(clips: torch.Tensor, path: Path) -> None:
    """One row a digit, four directions a row, four frames a direction, from clips ordered by digit and direction."""
    frames = clips.squeeze(1).unflatten(0, (NUM_DIGITS, NUM_DIRECTIONS))
    # Even digits show the straight directions, odd digits the diagonal ones.
    shown = torch.stack([frames[digit, digit % 2 :: 2, :: FRAMES // 3] for digit in range(NUM_DIGITS)])
    sheet = shown.permute(0, 3, 1, 2, 4).flatten(2).flatten(0, 1)
    image = Image.fromarray(((sheet.clamp(-1, 1) + 1) * 127.5).round().byte().cpu().numpy())
    with replacing(path) as partial:
        image.resize((image.width // 2, image.height // 2), Image.Resampling.LANCZOS).save(partial, format="PNG")


def _write_loss_curve(curve: list[tuple[int, float, float]], out: Path) -> None:
    with replacing(out / "loss_curve.csv") as partial, partial.open("w", newline="") as table:
        writer = csv.writer(table, lineterminator="\n")
        writer.writerow(("step", "loss", "seconds"))
        writer.writerows((step, f"{loss:.5f}", f"{seconds:.1f}") for step, loss, seconds in curve)
    figure = Figure(figsize=(6, 3.5), layout="constrained")
    axes = figure.subplots()
    axes.loglog([row[0] for row in curve], [row[1] for row in curve])
    axes.set(xlabel="step", ylabel="flow matching loss (mean of 50 steps)")
    axes.grid(which="both", alpha=0.3)
    with replacing(out / "loss_curve.png") as partial:
        figure.savefig(partial, format="png", dpi=120)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _parse_options() -> Options:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=DEFAULT_WEIGHTS.parent, help="folder for all results")
    parser.add_argument("--minutes", type=float, default=7.0, help="training time, compilation included")
    parser.add_argument("--steps", type=int, help="train exactly so many steps instead, as to repeat a run")
    parser.add_argument("--batch", type=int, default=32, help="clips a step")
    parser.add_argument("--learning-rate", type=float, default=1e-3, help="peak")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--no-compile", dest="compile", action="store_false", help="run the model eagerly")
    parser.add_argument("--seeds-evaluated", type=int, default=4, help="sets of 80 clips that are judged")
    options = Options(**vars(parser.parse_args()))
    if options.seeds_evaluated < 1 or options.batch < 1 or (options.steps is not None and options.steps < 1):
        parser.error("--seeds-evaluated, --batch and --steps must be at least 1")
    return options


def main() -> None:
    """Run the command line."""
    options = _parse_options()
    options.out.mkdir(parents=True, exist_ok=True)
    trainer = train(options)
    _write_loss_curve(trainer.loss_curve, options.out)
    steps, loss, seconds = trainer.loss_curve[-1]
    metrics = {
        **evaluate(trainer),
        "steps": steps,
        "final_loss": round(loss, 5),
        "training_seconds": round(seconds, 1),
        "device": _device_name(trainer.device),
    }
    with replacing(options.out / "metrics.json") as partial:
        partial.write_text(json.dumps(metrics, indent=2) + "\n")
    print(json.dumps(metrics, indent=2))


if __name__ == "__main__":
    main()
