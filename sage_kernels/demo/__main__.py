"""The demo: one video with 16-bit attention, with FP4, and with FP4 but the three worst blocks in 16 bit.

Writes an animated picture of each, a contact sheet, the error of every block at every step, report.html and
summary.json to the output folder.
"""

import argparse
import sys
import time
from pathlib import Path

import numpy as np
import torch
from sage_kernels import UnsupportedAttention
from sage_kernels.diffusers import patch
from tqdm import tqdm

from .attention_study import ABLATION, ShadowAttention, ablate
from .comparison import tensor_errors, video_errors
from .conditioning import conditioning
from .latents import decode
from .moving_digits import DIRECTION_NAMES
from .pictures import write_animation, write_contact_sheet, write_heat_map
from .report import Report, Run
from .sampling import DEFAULT_STEPS, sample
from .wan_checkpoint import DEFAULT_WEIGHTS, CheckpointError, load_transformer

WORST_BLOCKS = 3


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    options = _parse(arguments)
    try:
        if options.comfyui_root is not None:
            from .comfyui_demo import run_in_comfyui  # noqa: PLC0415  (only this way needs a ComfyUI)

            report = run_in_comfyui(options)
        else:
            report = run_in_diffusers(options)
    except KeyboardInterrupt:
        print("\nInterrupted; files already written are complete.", file=sys.stderr)
        return 130
    except (CheckpointError, UnsupportedAttention, ValueError, OSError) as error:
        print(f"demo: {error}", file=sys.stderr)
        return 1
    for run in report.runs:
        quality = "reference" if run.name == "fp16" else f"PSNR {run.psnr:.2f} dB, SSIM {run.ssim:.4f}, L1 {run.l1:.4f}"
        print(f"{run.name:16} {quality}; {run.coverage}")
    print(f"{report.seconds:.0f} s. Open {options.out / 'report.html'}")
    return 0


def run_in_diffusers(options: argparse.Namespace) -> Report:
    """The three runs with diffusers' own Wan transformer."""
    start = time.monotonic()
    device = torch.device(options.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    transformer = load_transformer(options.weights, device=device, dtype=dtype)
    context = conditioning(options.digit, DIRECTION_NAMES.index(options.direction))
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    report = Report("diffusers", name, options.digit, options.direction, options.seed, options.steps)
    options.out.mkdir(parents=True, exist_ok=True)
    latents: dict[str, torch.Tensor] = {}
    videos: dict[str, np.ndarray] = {}
    progress = tqdm(total=3 * options.steps + len(ABLATION), unit="step", desc="fp16")

    def draw(run: str, fp16_blocks: str, precision: str) -> None:
        progress.set_description(run)
        begun = time.monotonic()
        with patch(transformer, precision=precision, fp16_blocks=fp16_blocks, allow_emulation=True) as patched:
            latents[run] = sample(
                transformer, context, seed=options.seed, steps=options.steps, device=device, dtype=dtype,
                on_step=lambda *_: progress.update(),
            )  # fmt: skip
        coverage = patched.coverage
        report.runs.append(Run(run, fp16_blocks, time.monotonic() - begun, coverage.by_kernel(), str(coverage)))
        videos[run] = to_frames(decode(latents[run]))
        write_animation(videos[run], options.out / f"{run}.webp")
        if run != "fp16":
            compare(report.runs[-1], latents[run], latents["fp16"], videos[run], videos["fp16"])

    report.captured_steps = tuple(sorted({options.steps // 4, options.steps // 2, options.steps * 3 // 4}))
    with ShadowAttention(transformer, report.captured_steps) as shadow:
        draw("fp16", "", "fp16")
    blocks = sorted({block for block, _ in shadow.errors}, key=lambda block: block.index)
    errors = np.array([[shadow.errors[block, step] for step in range(options.steps)] for block in blocks])
    report.blocks = [
        {"block": str(block), "step": step, "l1": errors[row, step]}
        for row, block in enumerate(blocks)
        for step in range(options.steps)
    ]
    write_heat_map(errors, [str(block) for block in blocks], options.out / "block_errors.png")

    draw("fp4", "", "fp4")
    worst = sorted(np.argsort(errors.mean(axis=1))[-WORST_BLOCKS:])
    draw("fp4_worst3_fp16", ", ".join(f"{blocks[row].index}: 1" for row in worst), "fp4")
    write_contact_sheet(videos, options.out / "contact_sheet.png")

    progress.set_description("ablation")
    for row in ablate(shadow.captured):
        report.ablation.append(row)
        progress.update()
    progress.close()
    report.seconds = time.monotonic() - start
    report.write(options.out)
    return report


def to_frames(pixels: torch.Tensor) -> np.ndarray:
    """Pixels [1, 1, T, H, W] in [-1, 1] to uint8 frames [T, H, W]."""
    return ((pixels[0, 0].clamp(-1, 1) + 1) * 127.5).round().byte().cpu().numpy()


def compare(
    run: Run, latents: torch.Tensor, expected_latents: torch.Tensor, frames: np.ndarray, expected_frames: np.ndarray
) -> None:
    """Fill in how far a run is from the 16-bit one."""
    video, tensor = video_errors(frames, expected_frames), tensor_errors(latents, expected_latents)
    run.psnr = None if np.isinf(video["psnr"]) else video["psnr"]
    run.ssim, run.cosine, run.l1 = video["ssim"], tensor["cosine"], tensor["l1"]


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="dev.py demo", description=__doc__)
    parser.add_argument("--device", default="cpu", help="cpu, or cuda to use the GPU's kernels")
    parser.add_argument(
        "--comfyui-root", type=Path, help="a ComfyUI checkout: run the shipped workflow through it instead"
    )
    parser.add_argument("--digit", type=int, default=3, choices=range(10), help="which digit to draw")
    parser.add_argument("--direction", default="right", choices=DIRECTION_NAMES, help="where it goes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=DEFAULT_STEPS)
    parser.add_argument("--out", type=Path, default=Path("demo_output"), help="folder for the results")
    parser.add_argument("--weights", type=Path, default=DEFAULT_WEIGHTS, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error(
            f"--device {options.device}: torch {torch.__version__} sees no CUDA GPU here; leave the option away"
        )
    return options


if __name__ == "__main__":
    raise SystemExit(main())
