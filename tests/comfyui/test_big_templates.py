"""The templates of the big models, run as they are shipped on small random models of the same architectures."""

import json
import re
from pathlib import Path

import pytest

from .prompts_over_http import get, run

pytestmark = pytest.mark.comfyui

HERE = Path(__file__).parent
WORKFLOWS = HERE.parents[1] / "workflows"
SMALL_VIDEO = {"EmptyHunyuanLatentVideo": {"width": 32, "height": 32, "length": 5}}
# Template -> what is smaller than shipped, attention calls of a block in a step, blocks, of these in FP16.
TEMPLATES = {
    "wan22_t2v_fp4": (SMALL_VIDEO, 2, 40, 2),
    "flux_fp4": ({"EmptySD3LatentImage": {"width": 64, "height": 64}}, 1, 57, 2),
    "hunyuan_video_fp4": (SMALL_VIDEO, 1, 60, 2),
}
STEPS = 20


@pytest.fixture(scope="module")
def server(demo, comfyui_root, comfyui_python, comfyui_environment):
    """A server of its own, with the pack that loads small text encoders."""
    options = {"python": comfyui_python, "environment": comfyui_environment}
    module = demo("comfyui_server")
    with module.ComfyServer(comfyui_root, further_packs=[HERE / "stand_in_pack"], **options) as running:
        yield running


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_big_template_runs_on_stand_ins_for_its_files(server, demo, run_scenario, name):
    smaller, calls_a_step, blocks, in_fp16 = TEMPLATES[name]
    unknown = run_scenario("stand_ins.write_stand_ins", template=name, folder=str(server.base / "models"))
    if unknown:
        pytest.skip(f"this ComfyUI takes every model of the family for a full-size one: {', '.join(unknown)}")
    workflow = json.loads((WORKFLOWS / f"{name}.json").read_text(encoding="utf-8"))
    conversion = demo("comfyui_workflow")
    prompt = conversion.to_prompt(workflow, get(server, "/object_info"))
    emulated = {"Sage3Attention": {"allow_emulation": True, "min_tokens": 0}}
    result = run(server, conversion.override_inputs(prompt, {**smaller, **emulated}))
    assert result.end == "execution_success", f"{result.data['node_type']}: {result.data['exception_message']}"
    ours = [id_ for id_, node in prompt.items() if node["class_type"] == "Sage3Attention"]
    assert set(result.texts) == set(ours)
    steps = STEPS // len(ours)  # two experts share the schedule
    for node in ours:
        (text,) = result.texts[node]
        calls = {kernel: int(count) for kernel, count in re.findall(r"^(\w+) (\d+) \(", text, re.MULTILINE)}
        kept = in_fp16 * calls_a_step * steps
        assert calls["fp4_emulated"] == (blocks - in_fp16) * calls_a_step * steps
        assert re.search(rf"block override \({kept}\)|^fp16 {kept} \(.*\): block override", text, re.MULTILINE), text
        assert "gave non-finite" not in text
    saved = [output["images"] for output in result.outputs.values() if output.get("images")]
    assert saved, "nothing was drawn"
