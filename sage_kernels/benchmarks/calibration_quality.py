"""Calibrated choice of FP16 blocks and steps against "first and last n blocks in FP16" at equal speed.

    python sage_kernels/benchmarks/calibration_quality.py --comfyui-root PATH/TO/ComfyUI

Runs inside ComfyUI's Python, on the CPU. The demo model is calibrated once, on one clip; the errors are those of other
clips (other seed, digit and direction), relative L1 of the final latents against the 16-bit run of the same clip.
Equal speed: an equal number of blocks times steps in FP16. Where that is less than whole blocks, the first and last
block are in FP16 for a part of the steps, at either end of the noise schedule, and the better of the two counts.
"""

import argparse
import asyncio
import importlib
import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from result_file import ROOT, add_commit_option, describe

PACK, DEMO = "sage3_pack", "_sage3_demo"
STEPS, SHIFT, CFG, SAMPLER, SCHEDULER = 20, 8.0, 1.0, "euler", "simple"  # as workflows/sage3_demo.json
CALIBRATION_CLIP = (1, 3, 0)  # seed, digit, direction
OTHER_CLIPS = ((2, 7, 3), (3, 0, 5), (4, 5, 6))
LATENT_SHAPE = (1, 16, 8, 32, 32)
LAST = 4
# Part of the block-steps in FP16 -> texts that spend it on the first and last blocks.
FIRST_AND_LAST = {
    0.2: (f"0: 0.5, {LAST}: 0.5", f"0: 0.5 low, {LAST}: 0.5 low"),
    0.4: (f"0: 1, {LAST}: 1",),
    0.6: (f"0: 1, 1: 0.5, {LAST - 1}: 0.5, {LAST}: 1", f"0: 1, 1: 0.5 low, {LAST - 1}: 0.5 low, {LAST}: 1"),
    0.8: (f"0-1: 1, {LAST - 1}-{LAST}: 1",),
}


def main() -> None:
    """Measure, print the table, write the result file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--comfyui-root", required=True, type=Path, help="ComfyUI checkout, 0.3.64 or newer")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "calibration.json")
    add_commit_option(parser)
    options = parser.parse_args()
    about = describe("calibration_quality.py --comfyui-root DIR", "cpu", options.commit)
    rows = measure(start_comfyui(options.comfyui_root))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n", encoding="utf-8")
    print_table(rows)


def start_comfyui(root: Path) -> Callable[[str], ModuleType]:
    """Import ComfyUI and the pack; returns a function that imports a module of the pack's nodes/."""
    sys.path.insert(0, str(root))
    sys.argv = ["main.py", "--cpu"]
    importlib.import_module("comfy.options").enable_args_parsing()
    spec = importlib.util.spec_from_file_location(PACK, ROOT / "__init__.py", submodule_search_locations=[str(ROOT)])
    assert spec is not None
    assert spec.loader is not None
    sys.modules[PACK] = pack = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(pack)
    asyncio.run(asyncio.run(pack.comfy_entrypoint()).get_node_list())
    return lambda name: importlib.import_module(f"{PACK}.nodes.{name}")


def measure(nodes: Callable[[str], ModuleType]) -> list[dict[str, Any]]:
    """One row per clip, budget and method."""
    model = load_model()
    kernels = nodes("kernel_package").import_sage_kernels()
    calibration, patching = nodes("calibration"), nodes("model_patching")
    settings = calibration.CalibrationSettings(allow_emulation=True)
    profile, _ = calibration.calibrate(model, lambda m: draw(m, CALIBRATION_CLIP), settings, kernels)
    print(f"calibrated; final errors by part of the schedule {profile.final_errors.tolist()}", flush=True)

    def error(clip: tuple[int, int, int], text: str, expected: Any) -> float:
        patched = patching.patch_model(model, patching.AttentionSettings("fp4", text, allow_emulation=True), kernels)
        return float(nodes("frame_metrics").relative_l1(draw(patched, clip), expected))

    rows = []
    for clip in OTHER_CLIPS:
        expected = draw(model, clip)
        texts = {(0.0, "fp4"): ("",)}
        for budget, others in FIRST_AND_LAST.items():
            choice = nodes("fp16_choice").choose_for_work(profile, "fp4", budget)
            texts[budget, "calibrated"] = (choice.text,)
            texts[budget, "first_and_last"] = others
        for (budget, method), candidates in texts.items():
            errors = {text: error(clip, text, expected) for text in candidates}
            best = min(errors, key=lambda text: errors[text])
            shape = f"seed {clip[0]}, digit {clip[1]}, direction {clip[2]}"
            row = {"benchmark": "calibration", "shape": shape, "method": method, "fp16_work": budget}
            rows.append({**row, "fp16_blocks": best, "rel_l1": errors[best]})
            print(rows[-1], flush=True)
    return rows


def load_model() -> Any:
    """The demo model as the shipped workflow loads it."""
    model = importlib.import_module("nodes").UNETLoader().load_unet("wan_digits_fp16.safetensors", "default")[0]
    return importlib.import_module("comfy_extras.nodes_model_advanced").ModelSamplingSD3().patch(model, SHIFT)[0]


def draw(model: Any, clip: tuple[int, int, int]) -> Any:
    """Final latents of a clip."""
    seed, digit, direction = clip
    context = importlib.import_module(f"{DEMO}.conditioning").conditioning(digit, direction)
    conditioning = [[context[None], {}]]
    sampling = importlib.import_module("comfy.sample")
    latents = importlib.import_module("torch").zeros(LATENT_SHAPE)
    noise = sampling.prepare_noise(latents, seed)
    return sampling.sample(
        *(model, noise, STEPS, CFG, SAMPLER, SCHEDULER, conditioning, conditioning, latents),
        disable_pbar=True,
        seed=seed,
    )


def print_table(rows: list[dict[str, Any]]) -> None:
    """Errors in percent, by clip and on average."""
    clips = list(dict.fromkeys(row["shape"] for row in rows))
    print(f"{'FP16':>5} {'method':16}" + "".join(f"{clip:>30}" for clip in clips) + f"{'mean':>8}")
    for budget, method in dict.fromkeys((row["fp16_work"], row["method"]) for row in rows):
        errors = [row["rel_l1"] for row in rows if (row["fp16_work"], row["method"]) == (budget, method)]
        cells = "".join(f"{error:30.2%}" for error in errors)
        print(f"{budget:5.0%} {method:16}{cells}{sum(errors) / len(errors):8.2%}")


if __name__ == "__main__":
    main()
