"""The demo: one video with 16-bit attention, with FP4, and with FP4 but the three worst blocks in 16 bit.

Writes an animated picture of each, a contact sheet, the error of every block at every step, report.html and
summary.json to the output folder.
"""

import argparse
import contextlib
import sys
import time
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from sage_kernels import UnsupportedAttention

from .attention_study import ABLATION, ShadowAttention, ablate, removed_energy
from .comfyui_client import ComfyUIError
from .comfyui_server import ComfyServerError
from .comfyui_workflow import WorkflowError
from .comparison import tensor_errors, video_errors
from .drawing import ComfyUIStudio, DiffusersStudio, Drawing, Studio, sample_demo
from .moving_digits import DIRECTION_NAMES
from .pictures import write_animation, write_contact_sheet, write_heat_map
from .report import Report, Run
from .sampling import DEFAULT_STEPS
from .wan_checkpoint import DEFAULT_WEIGHTS, CheckpointError, load_transformer

WORST_BLOCKS = 3
ERRORS = (CheckpointError, UnsupportedAttention, ComfyUIError, ComfyServerError, WorkflowError, ValueError, OSError)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    options = _parse(arguments)
    try:
        report = run_demo(options)
    except KeyboardInterrupt:
        print("\nInterrupted; the files that were written are complete.", file=sys.stderr)
        return 130
    except ERRORS as error:
        print(f"demo: {error}", file=sys.stderr)
        return 1
    for run in report.runs:
        print(f"{run.name:16} {run.quality()}; attention calls: {run.coverage}")
    print(f"{report.seconds:.0f} s in all. Open {options.out / 'report.html'}")
    return 0


def run_demo(options: argparse.Namespace) -> Report:
    """Study the attention of the 16-bit run, draw the three videos, write everything."""
    start = time.monotonic()
    device = torch.device(options.device)
    transformer = load_transformer(
        options.weights, device=device, dtype=torch.bfloat16 if device.type == "cuda" else torch.float32
    )
    options.out.mkdir(parents=True, exist_ok=True)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    drawings: dict[str, Drawing] = {}
    with contextlib.ExitStack() as stack:
        studio: Studio = DiffusersStudio(transformer, options)
        studies_own_run = options.comfyui_root is None
        if not studies_own_run:
            studio = stack.enter_context(ComfyUIStudio(options))
        report = Report(studio.host, studio.values, name, options.digit, options.direction, options.seed, options.steps)
        report.captured_steps = tuple(sorted({options.steps * quarter // 4 for quarter in (1, 2, 3)}))
        sampled = (3 if studies_own_run else 4) * options.steps
        progress = stack.enter_context(tqdm(total=sampled + len(ABLATION), unit="step", desc="study"))

        def draw(run: str, precision: str, fp16_blocks: str = "") -> None:
            progress.set_description(run)
            drawing = drawings[run] = studio.draw(precision, fp16_blocks, progress.update)
            write_animation(drawing.frames, options.out / f"{run}.webp")
            report.runs.append(compare(run, fp16_blocks, drawing, drawings["fp16"]))

        with ShadowAttention(transformer, report.captured_steps) as shadow:
            if studies_own_run:
                draw("fp16", "fp16")
            else:
                sample_demo(transformer, options, progress.update)
        if not studies_own_run:
            draw("fp16", "fp16")
        worst = write_study(shadow, report, options.out)
        draw("fp4", "fp4")
        draw("fp4_worst3_fp16", "fp4", ", ".join(f"{block}: 1" for block in worst))
        write_contact_sheet(
            {run: drawing.frames for run, drawing in drawings.items()}, options.out / "contact_sheet.png"
        )
        progress.set_description("ablation")
        report.removed_energy = removed_energy(shadow.captured)
        for row in ablate(shadow.captured):
            report.ablation.append(row)
            progress.update()
    report.seconds = time.monotonic() - start
    report.write(options.out)
    return report


def write_study(shadow: ShadowAttention, report: Report, folder: Path) -> list[int]:
    """Put the errors of the blocks into the report and a heat map; returns the blocks with the largest mean error."""
    blocks = sorted({block for block, _ in shadow.errors})
    errors = np.array([[shadow.errors[block, step] for step in range(report.steps)] for block in blocks])
    report.blocks = [
        {"block": str(block), "step": step, "l1": float(errors[row, step])}
        for row, block in enumerate(blocks)
        for step in range(report.steps)
    ]
    write_heat_map(errors, [str(block) for block in blocks], folder / "block_errors.png")
    return sorted(int(row) for row in np.argsort(errors.mean(axis=1))[-WORST_BLOCKS:])


def compare(name: str, fp16_blocks: str, drawing: Drawing, expected: Drawing) -> Run:
    """How far a drawing is from the 16-bit one."""
    video = video_errors(drawing.frames, expected.frames)
    tensor = tensor_errors(drawing.values, expected.values)
    return Run(
        name=name,
        fp16_blocks="all" if name == "fp16" else fp16_blocks,
        seconds=drawing.seconds,
        calls=drawing.calls,
        coverage=drawing.coverage,
        psnr=None if np.isinf(video["psnr"]) else video["psnr"],
        ssim=video["ssim"],
        cosine=tensor["cosine"],
        l1=tensor["l1"],
    )


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="dev.py demo", description=__doc__)
    parser.add_argument("--device", default="cpu", help="cpu, or cuda to use the GPU's kernels")
    parser.add_argument("--comfyui-root", type=Path, help="a ComfyUI checkout: draw by the shipped workflow through it")
    parser.add_argument(
        "--comfyui-python", help="the Python that has ComfyUI's requirements; default: the checkout's own"
    )
    parser.add_argument("--digit", type=int, default=3, choices=range(10), help="which digit to draw")
    parser.add_argument("--direction", default="right", choices=DIRECTION_NAMES, help="where it goes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=DEFAULT_STEPS, help="sampling steps, at least 4")
    parser.add_argument("--out", type=Path, default=Path("demo_output"), help="folder for the results")
    parser.add_argument("--weights", type=Path, default=DEFAULT_WEIGHTS, help="weights of the demo model, Wan layout")
    options = parser.parse_args(arguments)
    if options.steps < 4:
        parser.error(f"--steps must be at least 4, got {options.steps}")
    if options.device not in ("cpu", "cuda") and not options.device.startswith("cuda:"):
        parser.error(f"--device must be cpu, cuda or cuda:N, got {options.device!r}")
    if options.device != "cpu" and not torch.cuda.is_available():
        parser.error(
            f"--device {options.device}: torch {torch.__version__} sees no CUDA GPU here; leave the option out"
        )
    return options


if __name__ == "__main__":
    raise SystemExit(main())
