"""The names of the tensors of ComfyUI's own models tell the same blocks as their modules."""

import pytest

from .test_families import CALLS_BY_BLOCK_TYPE

pytestmark = pytest.mark.comfyui


@pytest.mark.parametrize("family", CALLS_BY_BLOCK_TYPE)
def test_tensors_and_modules_agree(run_scenario, family):
    layouts = run_scenario("layouts", family=family)
    if "missing" in layouts:
        pytest.skip(layouts["missing"])
    assert layouts["tensors"] == layouts["modules"]
