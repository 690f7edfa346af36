"""The names of the tensors of ComfyUI's own models tell the same blocks as their modules."""

import pytest

pytestmark = pytest.mark.comfyui


@pytest.mark.parametrize("family", ["wan", "flux", "sdxl"])
def test_tensors_and_modules_agree(run_scenario, family):
    layouts = run_scenario("layouts", family=family)
    assert layouts["tensors"] == layouts["modules"]
