"""What the browser gets from the nodes: texts on nodes, reports, pictures; on the demo model."""

import json
import urllib.request
from pathlib import Path

import pytest

from sage_kernels.precision import PRECISIONS

from .prompts_over_http import get, node_id, post, run

pytestmark = pytest.mark.comfyui

WORKFLOW = Path(__file__).parents[2] / "workflows" / "sage3_demo.json"
STEPS = 3
CALLS = 5 * 2 * STEPS  # blocks, self- and cross-attention, steps


@pytest.fixture
def prompt(demo, server):
    """The shipped workflow as ComfyUI's API takes it."""
    workflow = json.loads(WORKFLOW.read_text(encoding="utf-8"))
    conversion = demo("comfyui_workflow")
    prompt = conversion.to_prompt(workflow, get(server, "/object_info"))
    overrides = {"KSampler": {"steps": STEPS}, "Sage3Attention": {"precision": "fp4", "allow_emulation": True}}
    return conversion.override_inputs(prompt, overrides)


def test_coverage_is_shown_on_the_node_after_each_sampling(server, prompt):
    ours = node_id(prompt, "Sage3Attention")
    prompt[ours]["inputs"] |= {"fp16_blocks": "0: 1", "verbose": True}
    first = run(server, prompt)
    assert first.end == "execution_success", first.data
    ((text,),) = first.texts.values()
    assert list(first.texts) == [ours]
    fp4, fp16, speed = text.splitlines()
    assert fp4.startswith(f"fp4_emulated {CALLS * 4 // 5} (")
    assert fp16.startswith(f"fp16 {CALLS // 5} (")
    assert fp16.endswith("): block override.")
    assert f"x the speed of the model's own attention, measured ({CALLS * 4 // 5} calls)" in speed
    assert speed.endswith("no prediction: emulation")
    prompt[node_id(prompt, "KSampler")]["inputs"]["seed"] += 1
    second = run(server, prompt)
    assert second.texts[ours][0].startswith(f"fp4_emulated {CALLS * 4 // 5} ("), "each sampling is counted anew"


def test_the_browser_is_told_the_blocks_of_the_model(server, prompt):
    ours = node_id(prompt, "Sage3Attention")
    prompt[ours]["inputs"]["fp16_blocks"] = "1: 1"
    (message,) = run(server, prompt).outputs[ours]["sage3"]
    assert message["family"] == "Wan"
    assert message["blocks"] == [{"name": str(i), "type": "double", "index": i} for i in range(5)]
    assert message["sensitivity"] is None


def test_a_run_can_be_cancelled_and_queued_again(server, prompt):
    prompt[node_id(prompt, "KSampler")]["inputs"] |= {"steps": 40, "seed": 11}
    cancelled = run(server, prompt, on_progress=lambda: post(server, "/interrupt"))
    assert cancelled.end == "execution_interrupted"
    counted = int(cancelled.texts[node_id(prompt, "Sage3Attention")][0].split()[1])
    assert 0 < counted < 5 * 2 * 40
    prompt[node_id(prompt, "KSampler")]["inputs"]["steps"] = STEPS
    again = run(server, prompt)
    assert again.end == "execution_success", again.data
    assert again.texts[node_id(prompt, "Sage3Attention")][0].startswith(f"fp4_emulated {CALLS} (")


@pytest.fixture
def compare_prompt(prompt):
    """The workflow with Sage3Compare in place of KSampler: the plain model against the patched one."""
    sampler = node_id(prompt, "KSampler")
    inputs = prompt[sampler]["inputs"]
    model_b = inputs.pop("model")
    model_a = prompt[model_b[0]]["inputs"]["model"]
    prompt[sampler] = {
        "class_type": "Sage3Compare",
        "inputs": {**inputs, "model_a": model_a, "model_b": model_b, "mode": "both"},
    }
    decode = node_id(prompt, "Sage3DemoDecode")
    prompt[decode]["inputs"]["samples"] = [sampler, 3]
    prompt["900"] = {"class_type": "SaveImage", "inputs": {"images": [sampler, 0], "filename_prefix": "compared"}}
    return prompt


def test_compare_reports_quality_and_time_of_the_demo_model(server, compare_prompt):
    steps = []
    result = run(server, compare_prompt, on_progress=lambda: steps.append(1))
    assert result.end == "execution_success", result.data
    (text,) = result.outputs[node_id(compare_prompt, "Sage3Compare")]["text"]
    a, b, speed, latents = text.splitlines()
    assert "without Sage3 Attention" in a
    assert f"attention: fp4_emulated {CALLS}" in b
    assert speed.startswith("B took ")
    relative_l1 = float(latents.split("relative L1 ")[1].split(",")[0])
    assert 1e-3 < relative_l1 < 0.3
    assert len(result.outputs["900"]["images"]) == 8
    assert len(steps) >= 2 * STEPS


def test_compare_can_be_cancelled(server, compare_prompt):
    sampler = node_id(compare_prompt, "Sage3Compare")
    compare_prompt[sampler]["inputs"] |= {"steps": 40, "seed": 5}
    assert run(server, compare_prompt, on_progress=lambda: post(server, "/interrupt")).end == "execution_interrupted"


def test_doctor_runs_anew_each_time_and_survives_a_workflow_without_a_model(server):
    prompt = {"1": {"class_type": "Sage3Doctor", "inputs": {}}}
    for _ in range(2):
        result = run(server, prompt)
        (text,) = result.outputs["1"]["text"]
        assert "== Versions" in text
        assert "cpu fp4_emulated: ok" in text


def test_nodes_are_found_by_other_names_and_have_help(server):
    nodes = get(server, "/object_info")
    for name in ("Sage3Attention", "Sage3Doctor", "Sage3Compare"):
        aliases = nodes[name].get("search_aliases")
        assert aliases is None or "attention" in " ".join(aliases)
        with urllib.request.urlopen(f"{server.url}/extensions/sage3-attention/docs/{name}.md") as response:
            assert response.read().startswith(b"# Sage3")


@pytest.mark.parametrize(("name", "expected"), [("Sage3Attention", PRECISIONS), ("Sage3Calibrate", PRECISIONS[1:-1])])
def test_precisions_on_offer_are_those_of_the_package(server, name, expected):
    kind, options = get(server, f"/object_info/{name}")[name]["input"]["required"]["precision"]
    assert (kind if isinstance(kind, list) else options["options"]) == list(expected)
