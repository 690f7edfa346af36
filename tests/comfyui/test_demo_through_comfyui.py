"""`python dev.py demo --comfyui-root` in a short form, as a user runs it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.comfyui

DEV = Path(__file__).parents[2] / "dev.py"
STEPS = 4
CALLS_PER_BLOCK = 2 * STEPS  # self- and cross-attention


def test_demo_draws_its_three_videos_through_comfyui(comfyui_root, comfyui_python, comfyui_environment, tmp_path):
    command = [sys.executable, DEV, "--no-venv", "demo", "--comfyui-root", comfyui_root]
    command += ["--comfyui-python", comfyui_python, "--steps", STEPS, "--out", tmp_path]
    done = subprocess.run(
        [str(part) for part in command],
        env={**os.environ, **comfyui_environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    fp16, fp4, mixed = json.loads((tmp_path / "summary.json").read_text())["runs"]
    assert fp16["calls"] == {"fp16": 5 * CALLS_PER_BLOCK}
    assert fp4["calls"] == {"fp4_emulated": 5 * CALLS_PER_BLOCK}
    assert mixed["calls"] == {"fp16": 3 * CALLS_PER_BLOCK, "fp4_emulated": 2 * CALLS_PER_BLOCK}
    assert fp4["psnr"] < mixed["psnr"]
    for run in (fp16, fp4, mixed):
        assert (tmp_path / f"{run['name']}.webp").stat().st_size > 0
