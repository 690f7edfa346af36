"""The template sage3_calibrate_compare on the demo model, run in a short form through a real ComfyUI."""

import re
from pathlib import Path

import pytest

pytestmark = pytest.mark.comfyui

TEMPLATE = Path(__file__).parents[2] / "workflows" / "sage3_calibrate_compare.json"
STEPS = 4
GOAL_PERCENT = 3.0


@pytest.fixture(scope="module")
def result(demo, server):
    overrides = {
        "Sage3Calibrate": {"steps": STEPS, "calibration_steps": 1, "rows": 128, "goal_value": GOAL_PERCENT},
        "Sage3Compare": {"steps": STEPS},
    }
    return demo("comfyui_client").run_workflow(server.url, TEMPLATE, overrides)


def test_every_output_of_the_template_is_there(result):
    shown = [key for output in result.outputs.values() for key in output]
    assert shown.count("animated") == 2
    assert {"images", "text"} <= set(shown)


def test_the_report_says_that_the_calibrated_model_keeps_its_goal(result):
    report = next(
        text for output in result.outputs.values() for text in output.get("text", ()) if "relative L1" in text
    )
    relative_l1 = float(re.search(r"relative L1 ([\d.]+)", report)[1])
    assert 0 < relative_l1 <= GOAL_PERCENT / 100
