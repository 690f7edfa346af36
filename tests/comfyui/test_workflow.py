"""The shipped workflows through a real ComfyUI's HTTP API, that of the demo model run."""

import copy
import json
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load

pytestmark = pytest.mark.comfyui

FOLDER = Path(__file__).parents[2] / "workflows"
WORKFLOWS = sorted(path.stem for path in FOLDER.glob("*.json"))
WORKFLOW = FOLDER / "sage3_demo.json"
MODEL_FILES = {"unet_name", "clip_name", "clip_name1", "clip_name2", "vae_name"}
STEPS = 3
SEED = 7
BLOCKS = 5
CALLS = BLOCKS * 2 * STEPS  # self- and cross-attention
BYPASSED = 4


@pytest.fixture(scope="session")
def workflow():
    return json.loads(WORKFLOW.read_text(encoding="utf-8"))


@pytest.fixture(scope="session")
def run(demo, server):
    def run_workflow(workflow, on_progress=None, **attention):
        overrides = {"KSampler": {"steps": STEPS, "seed": SEED}}
        if attention:
            overrides["Sage3Attention"] = attention
        return demo("comfyui_client").run_workflow(server.url, workflow, overrides, on_progress)

    return run_workflow


@pytest.fixture(scope="session")
def fp16(run, workflow):
    return run(with_saved_latent(workflow), precision="fp16")


@pytest.fixture(scope="session")
def fp4(run, workflow):
    return run(with_saved_latent(workflow), precision="fp4", allow_emulation=True)


def with_saved_latent(workflow):
    """The workflow with a SaveLatent node behind KSampler."""
    extended = copy.deepcopy(workflow)
    sampler = next(node for node in extended["nodes"] if node["type"] == "KSampler")
    save = {"id": 100, "type": "SaveLatent", "mode": 0, "widgets_values": ["sage3"], "outputs": []}
    save["inputs"] = [{"name": "samples", "type": "LATENT", "link": 100}]
    extended["nodes"].append(save)
    extended["links"].append([100, sampler["id"], 0, save["id"], 0, "LATENT"])
    return extended


def pixels(result):
    """Frames as [T, H, W, 3] float64 in 0..255."""
    return np.stack([np.asarray(frame) for frame in result.frames]).astype(np.float64)


@pytest.fixture
def model_latents(demo, server):
    """The model's latents [1, 16, 8, 32, 32] that a run saved."""

    def fetch(result):
        content = demo("comfyui_client").fetch(server.url, result.outputs["100"]["latents"][0])
        return demo("latents").from_wan21_latent(load(content)["latent_tensor"])

    return fetch


def test_workflow_gives_frames_and_says_which_kernels_ran(fp16, fp4):
    assert pixels(fp16).shape == pixels(fp4).shape == (8, 128, 128, 3)
    assert fp16.calls == {"fp16": CALLS}
    assert fp4.calls == {"fp4_emulated": CALLS}
    assert "fp4_emulated" in fp4.coverage


def test_fp4_is_close_to_fp16_but_not_equal(fp16, fp4, model_latents):
    expected, actual = model_latents(fp16), model_latents(fp4)
    relative_l1 = ((actual - expected).abs().mean() / expected.abs().mean()).item()
    assert 1e-3 < relative_l1 < 0.2


def test_fp16_agrees_with_the_demo_sampler_on_diffusers(demo, fp16, workflow, model_latents):
    node = next(node for node in workflow["nodes"] if node.get("title") == "Positive")
    digit, direction = node["widgets_values"]
    context = demo("conditioning").conditioning(digit, demo("moving_digits").DIRECTION_NAMES.index(direction))
    transformer = demo("wan_checkpoint").load_transformer()
    expected = demo("sampling").sample(transformer, context, seed=SEED, steps=STEPS)
    # Both compute in float32; they differ in the order of sums. The latents are about 1, at most 4.
    assert (model_latents(fp16) - expected).abs().max() < 1e-4


def test_bypassed_node_gives_the_same_latents_as_fp16(run, workflow, fp16, model_latents):
    bypassed = with_saved_latent(workflow)
    next(node for node in bypassed["nodes"] if node["type"] == "Sage3Attention")["mode"] = BYPASSED
    result = run(bypassed)
    assert result.calls == {}
    assert torch.equal(model_latents(result), model_latents(fp16))


def test_blocks_kept_in_fp16_are_reported(run, workflow):
    result = run(workflow, precision="fp4", allow_emulation=True, fp16_blocks="0-1: 1")
    assert result.calls == {"fp4_emulated": CALLS * 3 // 5, "fp16": CALLS * 2 // 5}


def test_progress_counts_the_steps(run, workflow):
    seen = []
    run(workflow, on_progress=lambda done, total: seen.append((done, total)), precision="fp16", min_tokens=1)
    assert seen == [(step, STEPS) for step in range(1, STEPS + 1)]


def test_comfyui_lists_the_workflow_as_a_template(server):
    with urllib.request.urlopen(f"{server.url}/workflow_templates") as response:
        assert {pack: sorted(names) for pack, names in json.load(response).items()} == {"sage3-attention": WORKFLOWS}


@pytest.mark.parametrize("name", WORKFLOWS)
def test_comfyui_finds_nothing_wrong_with_a_workflow_but_missing_model_files(server, demo, name):
    workflow = json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))
    with urllib.request.urlopen(f"{server.url}/object_info") as response:
        prompt = demo("comfyui_workflow").to_prompt(workflow, json.load(response))
    for node in prompt.values():
        if node["class_type"] == "UNETLoader":
            node["inputs"]["unet_name"] = "missing"  # so that nothing is run where all files are there
    request = urllib.request.Request(f"{server.url}/prompt", json.dumps({"prompt": prompt}).encode())
    with pytest.raises(urllib.error.HTTPError) as rejected:
        urllib.request.urlopen(request)
    errors = [error for node in json.load(rejected.value)["node_errors"].values() for error in node["errors"]]
    found = {(error["type"], error["extra_info"]["input_name"]) for error in errors}
    assert ("value_not_in_list", "unet_name") in found
    assert found <= {("value_not_in_list", file) for file in MODEL_FILES}


@pytest.mark.parametrize("text", ["3-1: 2", "9: 1"])
def test_a_bad_block_string_fails_the_run_in_one_line(run, workflow, demo, text):
    with pytest.raises(demo("comfyui_client").ComfyUIError, match="Sage3Attention") as failure:
        run(workflow, precision="fp4", allow_emulation=True, fp16_blocks=text)
    assert "\n" not in str(failure.value)
