"""Sage3Calibrate and the profile nodes inside a real ComfyUI."""

import pytest

from sage_kernels.block_overrides import parse_block_overrides

pytestmark = pytest.mark.comfyui

BLOCKS = {"wan": 3, "flux": 5, "sdxl": 11}
STEPS, LOOKED_AT = 6, 3


@pytest.mark.parametrize(
    ("family", "sampler"), [("wan", "euler"), ("wan", "heun"), ("flux", "euler"), ("sdxl", "euler")]
)
def test_a_calibrated_model_runs_as_chosen_and_the_original_as_ever(run_scenario, family, sampler):
    result = run_scenario("calibration_scenarios.calibrated", family=family, sampler=sampler)
    assert len(result["blocks"]) == BLOCKS[family]
    assert result["all_measured"]
    assert 0 < result["largest_error"] < 1
    assert parse_block_overrides(result["text"])
    # 90 % slower at a cost of 4 is 30 % of the work; calls of small blocks count as much as those of large ones.
    assert 0 < result["fp16_part_of_calls"] <= (0.3 if family == "wan" else 0.75)
    assert result["picture"][0] == 1
    assert result["picture"][3] == 3
    assert result["picture_range"][0] >= 0
    assert 0.8 < result["picture_range"][1] <= 1
    assert result["hooks_left"] == 0
    assert result["untouched"]
    total = STEPS + LOOKED_AT * BLOCKS[family] + (LOOKED_AT + 1) * STEPS + STEPS
    assert result["progress"] == [total, total]


def test_the_full_error_is_that_of_the_node(run_scenario):
    result = run_scenario("calibration_scenarios.full_error")
    assert result["profile"] == pytest.approx(result["measured"], rel=1e-4)


@pytest.mark.parametrize("evaluation", [1, 3, 20])
def test_a_cancelled_calibration_leaves_the_model_clean(run_scenario, evaluation):
    result = run_scenario("calibration_scenarios.interrupted", evaluation=evaluation)
    assert result["cancelled"]
    assert result["evaluations"] == evaluation
    assert result["hooks_left"] == 0
    assert result["next_run_is_identical"]
    assert result["can_be_calibrated"]


def test_profiles_are_saved_numbered_and_loaded_only_where_they_fit(run_scenario):
    result = run_scenario("calibration_scenarios.profile_files")
    assert result["names"] == [f"sage3/test_{number:05}_.sage3.safetensors [output]" for number in (1, 2)]
    assert result["listed"] == [True, True]
    assert result["same"]
    assert result["changed"]
    parts = {
        "wrong_model": "measured on Wan, this is Flux",
        "broken": "no usable Sage3 profile",
        "traversal": "is no profile in the input or output folder",
        "absolute": "is no profile in the input or output folder",
        "unlabelled": "is no profile in the input or output folder",
        "other_file": "is no profile in the input or output folder",
        "save_traversal": "below the output folder",
        "save_absolute": "below the output folder",
        "save_nothing": "below the output folder",
    }
    assert result["errors"].keys() == parts.keys()
    for name, part in parts.items():
        assert part in (result["errors"][name] or "no error"), name
        assert "\n" not in result["errors"][name]


def test_the_demo_model_is_better_than_with_its_first_and_last_blocks_in_fp16(run_scenario):
    result = run_scenario("calibration_scenarios.calibrated_demo", max_error=0.03)
    assert result["error"] <= 0.03 < result["full_error"]
    assert result["error"] < result["first_and_last"]
    assert 0 < result["work"] < 0.5
    assert f"{result['error']:.2%}" in result["report"]
