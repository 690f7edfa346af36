"""Scenarios of Sage3Calibrate and the profile nodes inside a real ComfyUI; see scenarios.py."""

import json
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.utils
import folder_paths
import torch
from scenarios import ALL_FP4, OVERRIDE_KEY, Nodes, count_hooks, patch
from tiny_models import TinyModel, build

STEPS = 6
DEMO_STEPS = 8


def calibrate(nodes: Nodes, model: TinyModel, **settings: Any) -> tuple[Any, ...]:
    """What the node gives for a tiny model: MODEL, heat map, profile, fp16_blocks."""
    latent = {"samples": torch.zeros_like(model.noise)}
    values = {
        "seed": 1, "steps": STEPS, "cfg": 2.0, "sampler_name": "euler", "scheduler": "simple", "precision": "fp4",
        "goal": "max_slowdown", "goal_value": 90.0, "calibration_steps": 3, "rows": 256, "min_tokens": 0,
        "allow_emulation": True,
    }  # fmt: skip
    node = nodes["Sage3Calibrate"]
    return node.execute(model.patcher, model.positive, model.negative, latent, **{**values, **settings}).args


def calibrated(nodes: Nodes, family: str, sampler: str) -> dict[str, Any]:
    """A calibration, and what the MODEL that it gives does."""
    model = build(family)
    before = model.sample(steps=STEPS)
    announced: list[tuple[int, int]] = []
    comfy.utils.set_progress_bar_global_hook(lambda value, total, *_, **__: announced.append((value, total)))
    patched, picture, profile, text = calibrate(nodes, model, sampler_name=sampler)
    comfy.utils.set_progress_bar_global_hook(None)
    model.sample(patched, steps=STEPS)
    kernels = patched.model_options["transformer_options"][OVERRIDE_KEY].coverage.by_kernel()
    profile.check(model.patcher)
    return {
        "text": text,
        "fp16_part_of_calls": kernels.get("fp16", 0) / sum(kernels.values()),
        "picture": list(picture.shape),
        "picture_range": [float(picture.min()), float(picture.max())],
        "blocks": [str(block) for block in profile.layout],
        "all_measured": bool((profile.sensitivity > 0).all()) and min(profile.heads) > 0,
        "largest_error": float(profile.errors.max()),
        "hooks_left": count_hooks(model),
        "untouched": torch.equal(model.sample(steps=STEPS), before)
        and OVERRIDE_KEY not in model.patcher.model_options["transformer_options"],
        "progress": announced[-1],
    }


def full_error(nodes: Nodes) -> dict[str, Any]:
    """The profile's error with everything in low precision, and that of Sage3Attention with the same noise."""
    model = build("wan")
    profile = calibrate(nodes, model)[2]
    low = patch(nodes, model.patcher, **ALL_FP4)
    noise = comfy.sample.prepare_noise(torch.zeros_like(model.noise), 1)
    model.noise = noise
    expected = model.sample(steps=STEPS)
    error = (model.sample(low, steps=STEPS) - expected).abs().sum() / expected.abs().sum()
    return {"profile": float(profile.full_error[0]), "measured": float(error)}


def interrupted(nodes: Nodes, evaluation: int) -> dict[str, Any]:
    """A calibration that the user cancels, and the model after it."""
    model = build("wan")
    before = model.sample(steps=STEPS)
    evaluations: list[int] = []

    def cancel(*_: Any) -> None:
        evaluations.append(1)
        if len(evaluations) == evaluation:
            comfy.model_management.interrupt_current_processing(True)

    handle = model.diffusion_model.register_forward_pre_hook(cancel)
    cancelled = False
    try:
        calibrate(nodes, model)
    except comfy.model_management.InterruptProcessingException:
        cancelled = True
    handle.remove()
    return {
        "cancelled": cancelled,
        "evaluations": len(evaluations),
        "hooks_left": count_hooks(model),
        "next_run_is_identical": torch.equal(model.sample(steps=STEPS), before),
        "can_be_calibrated": bool(calibrate(nodes, model)[3]),
    }


def profile_files(nodes: Nodes) -> dict[str, Any]:
    """Profiles saved twice, listed, loaded, and checked against two models."""
    model = build("wan")
    profile = calibrate(nodes, model, calibration_steps=1)[2]
    save, load = nodes["Sage3ProfileSave"], nodes["Sage3ProfileLoad"]
    names = [save.execute(profile, "sage3/test").args[0] for _ in range(2)]
    (listed,) = [item for item in load.define_schema().inputs if item.id == "file"]
    loaded = load.execute(names[0], model.patcher).args[0]
    output = folder_paths.get_output_directory()
    Path(output, "broken.sage3.safetensors").write_bytes(b"no profile")
    return {
        "names": names,
        "listed": [name in listed.options for name in names],
        "same": torch.equal(loaded.errors, profile.errors),
        "errors": {
            "wrong_model": _error(load.execute, names[0], build("flux").patcher),
            "broken": _error(load.execute, "broken.sage3.safetensors [output]"),
            "traversal": _error(load.execute, "../secret.sage3.safetensors [output]"),
            "absolute": _error(load.execute, f"{output}/../secret.sage3.safetensors [output]"),
            "unlabelled": _error(load.execute, "/etc/passwd"),
            "other_file": _error(load.execute, "picture.png [output]"),
            "save_traversal": _error(save.execute, profile, "../../evil"),
            "save_absolute": _error(save.execute, profile, "/tmp/evil"),
            "save_nothing": _error(save.execute, profile, " "),
        },
        "changed": load.fingerprint_inputs(names[0]) != load.fingerprint_inputs("broken.sage3.safetensors [output]"),
    }


def calibrated_demo(nodes: Nodes, max_error: float) -> dict[str, Any]:
    """The trained demo model with a goal for its error, and first and last blocks in FP16 for at least as much work."""
    core = __import__("nodes")
    model = core.UNETLoader().load_unet("wan_digits_fp16.safetensors", "default")[0]
    conditioning = nodes["Sage3DemoConditioning"].execute(digit=3, direction="right").args[0]
    latent = {"samples": torch.zeros(1, 16, 8, 32, 32)}
    run = {"seed": 1, "steps": DEMO_STEPS, "cfg": 1.0, "sampler_name": "euler", "scheduler": "simple"}
    model = __import__("comfy_extras.nodes_model_advanced", fromlist=["x"]).ModelSamplingSD3().patch(model, 8.0)[0]
    output = nodes["Sage3Calibrate"].execute(
        model, conditioning, conditioning, latent, **run, precision="fp4", goal="max_error",
        goal_value=100 * max_error, calibration_steps=2, rows=256, min_tokens=0, allow_emulation=True,
    )  # fmt: skip
    patched, _, profile, text = output.args

    def draw(which: Any) -> torch.Tensor:
        return core.common_ksampler(which, *run.values(), conditioning, conditioning, {"samples": latent["samples"]})[
            0
        ]["samples"]

    expected = draw(model)

    def error(which: Any) -> float:
        return float((draw(which) - expected).abs().sum() / expected.abs().sum())

    kernels = {}
    calibrated_error = error(patched)
    kernels = patched.model_options["transformer_options"][OVERRIDE_KEY].coverage.by_kernel()
    work = kernels.get("fp16", 0) / sum(kernels.values())
    share = min(1.0, work * 5 / 2)  # of the steps, for two of the five blocks
    ends = {
        end: patch(nodes, model, **ALL_FP4, fp16_blocks=f"0: {share}{end}, 4: {share}{end}") for end in ("", " low")
    }
    return {
        "text": text,
        "work": work,
        "error": calibrated_error,
        "first_and_last": min(error(each) for each in ends.values()),
        "full_error": float(profile.full_error[0]),
        "report": json.dumps(output.ui),
    }


def _error(function: Any, *arguments: Any) -> str | None:
    try:
        function(*arguments)
    except ValueError as error:
        return str(error)
    return None
