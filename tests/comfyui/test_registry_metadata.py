"""pyproject.toml as ComfyUI and its Registry read it."""

import re

import pytest

pytestmark = pytest.mark.comfyui


@pytest.fixture(scope="module")
def metadata(run_scenario):
    return run_scenario("registry_metadata")


def test_the_name_follows_the_registry_rules(metadata):
    name = metadata["project"]["name"]
    assert re.fullmatch(r"[a-z](?:[._-]?[a-z0-9]+)*", name)
    assert len(name) < 100
    assert "comfyui" not in name
    assert re.fullmatch(r"\d+\.\d+\.\d+", metadata["project"]["version"])


def test_publisher_and_requirements_are_understood(metadata):
    assert metadata["tool_comfy"]["publisher_id"]
    assert metadata["tool_comfy"]["display_name"] == "Sage3 Attention"
    assert metadata["project"]["license"]["file"] == "LICENSE"
    assert metadata["project"]["supported_os"] == ["OS Independent"]
    assert metadata["project"]["supported_accelerators"] == ["GPU :: NVIDIA CUDA"]
    assert metadata["project"]["supported_comfyui_version"] == ">=0.3.64"
