"""What a user loses: the demo model's videos at every precision, scored, and compared with the 16-bit run.

    PYTHONPATH=sage_kernels/src python sage_kernels/benchmarks/end_to_end.py            # 560 clips, on a GPU
    PYTHONPATH=sage_kernels/src python sage_kernels/benchmarks/end_to_end.py --short    # 2 clips of 4 steps, on a CPU

or in two processes side by side, with `--methods A B --out X`, `--methods C D --out Y` and then `--join X Y`.

Every digit in every direction, from seven seeds, is drawn once per method. Scores: the share of clips whose digit a
classifier trained on real digits reads right, and whose direction is the one asked for; on real clips of digits that
the classifier never saw the same judge says how good the judge is. PSNR and SSIM are against the 16-bit run of the
same clip. Self-attention is quantised; cross-attention to the eight conditioning tokens stays in 16 bit. FP4 and FP8
attention is computed by the quantised reference, on a GPU with its inner loop in one kernel (recipe_emulator.py), which
is checked against it first; INT8 by its own kernels where there are any, as the result file says.
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from result_file import add_commit_option, describe
from torch import Tensor, nn
from tqdm import tqdm

sys.path.append(str(Path(__file__).resolve().parents[1]))
import sage_kernels
from demo.conditioning import conditioning_table
from demo.evaluation import ClipJudge
from demo.glyphs import load_glyphs
from demo.latents import decode
from demo.moving_digits import NUM_DIGITS, NUM_DIRECTIONS, render_clips
from demo.sampling import DEFAULT_STEPS, sample, simple_sigmas
from demo.wan_checkpoint import load_transformer
from sage_kernels.block_overrides import BlockId
from sage_kernels.diffusers import FLOW_TIMESTEPS, AttentionRouter, SdpaCall
from sage_kernels.evidence import write_json
from sage_kernels.precision_policy import PrecisionPolicy
from sage_kernels.recipes import RECIPES, SAGE_ATTENTION_3_PUBLISHED, Recipe
from sage_kernels.reference import quantize_operands, quantized_attention

RESULTS = Path(__file__).parent / "results"
SEEDS = 7
COMBINATIONS = NUM_DIGITS * NUM_DIRECTIONS
EMULATOR_BOUND = 2e-3  # relative L1: sums in another order carry some weights across a rounding boundary
_SSIM_WINDOW = 7


@dataclass(frozen=True)
class Method:
    """One way to draw: a recipe of the reference, or a precision with kernels, and the blocks kept in 16 bit."""

    name: str
    recipe: Recipe | None = None
    precision: str = "fp16"
    fp16_blocks: str = ""


def main() -> None:
    """Draw, score, print the table, write the result file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="2 clips of 4 steps: whether it works, not a result")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--methods", nargs="+", help="only these (fp16 always); rows that the result file has of others are kept"
    )
    parser.add_argument("--out", type=Path, help="default: results/end_to_end.json; with --short nothing is written")
    parser.add_argument("--join", nargs="+", type=Path, metavar="FILE", help="draw nothing, put these files in one")
    add_commit_option(parser)
    options = parser.parse_args()
    if options.join:
        write_json(options.out or RESULTS / "end_to_end.json", join(options.join))
        return
    device = torch.device(options.device)
    glyphs, labels = load_glyphs(device)
    judge = ClipJudge(glyphs, labels)
    steps = 4 if options.short else DEFAULT_STEPS
    rows: list[dict[str, Any]] = [real_clips(judge, glyphs, labels, 80 if options.short else SEEDS * COMBINATIONS)]
    print_row(rows[0])
    studio = Studio(device, steps, options.short)
    expected: list[Tensor] | None = None
    out = options.out or (None if options.short else RESULTS / "end_to_end.json")
    before = json.loads(out.read_text(encoding="utf-8"))["rows"] if options.methods and out and out.exists() else []
    for method in methods():
        if options.methods and method.name not in ["fp16", *options.methods]:
            continue
        start = time.perf_counter()
        clips = studio.draw(method)
        expected = expected or clips
        rows.append(score(method, judge, studio, clips, expected) | {"seconds": time.perf_counter() - start})
        rows[-1]["emulator_error"] = studio.emulator_errors.get(method.name)
        rows[-1]["kernel"] = studio.kernels.get(method.name)
        print_row(rows[-1])
        if out is not None:
            note = {"steps": steps, "clips": sum(map(len, clips))}
            kept = [row for row in before if row["method"] not in {x["method"] for x in rows}]
            write_json(out, {**describe("end_to_end.py", device, options.commit), **note, "rows": rows + kept})


def join(files: Sequence[Path]) -> dict[str, Any]:
    """One result of several that hold other methods each, drawn side by side to save time.

    Raises:
        SystemExit: they differ in anything but their rows.
    """
    results = [json.loads(file.read_text(encoding="utf-8")) for file in files]
    abouts = [{key: value for key, value in result.items() if key != "rows"} for result in results]
    differing = sorted(key for key in abouts[0] if any(each.get(key) != abouts[0][key] for each in abouts))
    if differing:
        raise SystemExit(f"these files are not of one run: they differ in {', '.join(differing)}")
    rows = {row["method"]: row for result in reversed(results) for row in result["rows"]}
    order = ["real_clips", *(method.name for method in methods())]
    return {**abouts[0], "rows": [rows[name] for name in order if name in rows]}


def methods() -> list[Method]:
    """16 bit first: the others are compared with it."""
    fp4 = RECIPES["fp4"]
    found = [
        Method("fp16"),
        Method("int8", precision="int8"),
        Method("fp4", fp4),
        Method("sageattention3_plain", SAGE_ATTENTION_3_PUBLISHED),
        Method("fp8_fp4", RECIPES["fp8_fp4"]),
        Method("int8_fp16", precision="int8_fp16"),
    ]
    calibrated = json.loads((RESULTS / "calibration.json").read_text(encoding="utf-8"))["rows"]
    for budget in (0.2, 0.4):
        text = next(x["fp16_blocks"] for x in calibrated if (x["method"], x["fp16_work"]) == ("calibrated", budget))
        found.append(Method(f"fp4_calibrated_{budget:.0%}_fp16", fp4, fp16_blocks=text))
    return found


class Studio:
    """The demo model with its self-attention handed to a method."""

    def __init__(self, device: torch.device, steps: int, short: bool) -> None:
        self.device, self.steps = device, steps
        self._dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self._transformer: nn.Module = load_transformer(device=device, dtype=self._dtype)
        self._contexts = conditioning_table(device)
        chosen = torch.arange(COMBINATIONS)
        self.digits, self.directions = chosen // NUM_DIRECTIONS, chosen % NUM_DIRECTIONS
        if short:
            self.digits, self.directions = self.digits[::40], self.directions[::40]
        self.seeds = 1 if short else SEEDS
        self.emulator_errors: dict[str, float] = {}
        self.kernels: dict[str, str | None] = {}  # that computed precisions without a recipe

    def draw(self, method: Method) -> list[Tensor]:
        """Clips [80, 1, 8, 128, 128] in -1..1 of each seed."""
        sigma: list[float] = [1.0]
        schedule = tuple(simple_sigmas(self.steps).tolist())

        def read_sigma(arguments: dict[str, Any]) -> None:
            sigma[0] = float(arguments["timestep"].flatten()[0]) / FLOW_TIMESTEPS

        def handle(block: BlockId | None, call: SdpaCall) -> Tensor:
            if method.name == "fp16" or block is None or call.query.shape[2] != call.key.shape[2]:
                return call.default()
            tokens = call.query.shape[2]
            choice = policy.choose(block, sigma=sigma[0], schedule=schedule, query_tokens=tokens, key_tokens=tokens)
            return call.default() if choice.precision == "fp16" else self._attend(method, call)

        router = AttentionRouter(self._transformer, handle, read_sigma)
        clips = []
        try:
            policy = PrecisionPolicy.for_model(router.layout, "fp4", method.fp16_blocks)
            context = self._contexts[self.digits, self.directions]
            for seed in tqdm(range(self.seeds), desc=method.name, mininterval=0):
                options = {"seed": seed, "steps": self.steps, "device": self.device, "dtype": self._dtype}
                clips.append(decode(sample(self._transformer, context, **options)).clamp(-1, 1))
        finally:
            router.remove()
        return clips

    def _attend(self, method: Method, call: SdpaCall) -> Tensor:
        if method.recipe is None:
            operands = call.query, call.key, call.value
            options = {"scale": call.scale, "precision": method.precision, "allow_emulation": True}
            if method.name not in self.kernels:
                self.kernels[method.name] = sage_kernels.explain(*operands, **options).kernel
            output = sage_kernels.attention(*operands, **options)
            assert isinstance(output, Tensor)
            return output
        q, k, v = (x.bfloat16() for x in (call.query, call.key, call.value))
        scale = q.shape[-1] ** -0.5 if call.scale is None else call.scale
        if self.device.type != "cuda":
            return quantized_attention(q, k, v, method.recipe, scale=scale)[0].to(call.query.dtype)
        from recipe_emulator import emulate  # noqa: PLC0415 needs Triton

        output = emulate(quantize_operands(q, k, v, method.recipe), method.recipe, scale, k.shape[2])
        if method.name not in self.emulator_errors:
            expected = quantized_attention(q[:2], k[:2], v[:2], method.recipe, scale=scale)[0]
            error = ((output[:2] - expected).abs().sum() / expected.abs().sum()).item()
            self.emulator_errors[method.name] = error
            if not error < EMULATOR_BOUND:
                raise RuntimeError(f"the emulator is {error:.2g} from the reference at {method.name}")
        return output.to(call.query.dtype)


def real_clips(judge: ClipJudge, glyphs: Tensor, labels: Tensor, count: int) -> dict[str, Any]:
    """The judge on clips of real digits that its classifier wasn't trained on."""
    order = torch.randperm(len(glyphs), generator=torch.Generator().manual_seed(0))  # as ClipJudge holds them out
    chosen = order[: len(glyphs) // 5].repeat(2)[:count].to(glyphs.device)
    directions = torch.arange(len(chosen), device=glyphs.device) % NUM_DIRECTIONS
    clips = render_clips(glyphs[chosen], directions, torch.Generator(glyphs.device).manual_seed(1))
    return {"method": "real_clips", **judge.metrics(clips, labels[chosen], directions)}


def score(
    method: Method, judge: ClipJudge, studio: Studio, clips: list[Tensor], expected: list[Tensor]
) -> dict[str, Any]:
    """One row: the judge's metrics, and how far the clips are from the 16-bit ones."""
    repeats = len(clips)
    metrics = judge.metrics(torch.cat(clips), studio.digits.repeat(repeats), studio.directions.repeat(repeats))
    row = {"method": method.name, "fp16_blocks": method.fp16_blocks, **metrics, "psnr": None, "ssim": 1.0, "l1": 0.0}
    if clips is not expected:
        pairs = [(to_levels(a), to_levels(b)) for a, b in zip(clips, expected, strict=True)]
        row["psnr"] = float(torch.cat([psnr(a, b) for a, b in pairs]).mean())
        row["ssim"] = float(torch.cat([ssim(a, b) for a, b in pairs]).mean())
        row["l1"] = sum(float((a - b).abs().sum()) for a, b in pairs) / sum(float(b.abs().sum()) for _, b in pairs)
    return row


def to_levels(clips: Tensor) -> Tensor:
    """Pixels in -1..1 to the grey levels 0..255 of a saved picture, [B, 8, 128, 128] float64."""
    return ((clips.squeeze(1) + 1) * 127.5).byte().double()


def psnr(levels: Tensor, expected: Tensor) -> Tensor:
    """dB of each clip [B]."""
    error = (levels - expected).square().flatten(1).mean(dim=1).clamp_min(1e-12)
    return 10 * torch.log10(255**2 / error)


def ssim(levels: Tensor, expected: Tensor) -> Tensor:
    """Mean structural similarity of each frame [B * T]: 7 x 7 windows, as skimage.metrics computes it by default."""
    a, b = (x.flatten(0, 1).unsqueeze(1) for x in (levels, expected))

    def mean(x: Tensor) -> Tensor:
        return torch.nn.functional.avg_pool2d(x, _SSIM_WINDOW, stride=1)

    unbiased = _SSIM_WINDOW**2 / (_SSIM_WINDOW**2 - 1)
    mean_a, mean_b = mean(a), mean(b)
    var_a, var_b = (mean(a * a) - mean_a**2) * unbiased, (mean(b * b) - mean_b**2) * unbiased
    covariance = (mean(a * b) - mean_a * mean_b) * unbiased
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    similarity = (2 * mean_a * mean_b + c1) * (2 * covariance + c2)
    similarity /= (mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2)
    return similarity.flatten(1).mean(dim=1)


def print_row(row: dict[str, Any]) -> None:
    """One line of the table."""
    quality = f"PSNR {row['psnr']:.2f} dB, SSIM {row['ssim']:.4f}, L1 {row['l1']:.4f}" if row.get("psnr") else ""
    print(
        f"{row['method']:26} digit {row['digit_accuracy_clip']:6.1%} direction {row['direction_accuracy']:6.1%} "
        f"speed error {row['speed_error_px_per_frame']:.3f} px {quality} {row.get('seconds', 0):.0f} s",
        flush=True,
    )


if __name__ == "__main__":
    main()
