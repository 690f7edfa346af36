"""The demo in a short form, as a user runs it."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
STEPS = 4
RUNS = ["fp16", "fp4", "fp4_worst3_fp16"]
PICTURES = [*(f"{run}.webp" for run in RUNS), "contact_sheet.png", "block_errors.png"]


def demo_command(out, *options):
    return [
        sys.executable,
        str(ROOT / "dev.py"),
        "--no-venv",
        "demo",
        "--out",
        str(out),
        "--steps",
        str(STEPS),
        *options,
    ]


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo")
    done = subprocess.run(demo_command(out), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return out, json.loads((out / "summary.json").read_text()), done


def test_summary_has_every_run_with_its_calls(demo):
    _, summary, _ = demo
    assert [run["name"] for run in summary["runs"]] == RUNS
    blocks = 5
    calls = [run["calls"] for run in summary["runs"]]
    evaluations = blocks * 2 * STEPS  # self- and cross-attention
    assert calls[0] == {"fp16": evaluations}
    assert calls[1] == {"fp4_emulated": evaluations}
    assert calls[2] == {"fp16": 3 * 2 * STEPS, "fp4_emulated": 2 * 2 * STEPS}
    assert summary["steps"] == STEPS
    assert summary["seconds"] > 0


def test_keeping_the_worst_blocks_in_16_bit_lowers_the_error(demo):
    _, summary, _ = demo
    fp16, fp4, mixed = summary["runs"]
    assert (fp16["psnr"], fp16["ssim"], fp16["l1"]) == (None, 1.0, 0.0)
    assert 0 < mixed["l1"] < fp4["l1"] < 0.3
    assert mixed["psnr"] > fp4["psnr"] > 15
    assert mixed["cosine"] > fp4["cosine"] > 0.9


def test_every_block_has_an_error_at_every_step(demo):
    _, summary, _ = demo
    found = {(row["block"], row["step"]) for row in summary["blocks"]}
    assert found == {(f"block.{block}", step) for block in range(5) for step in range(STEPS)}
    assert all(0 < row["l1"] < 1 for row in summary["blocks"])
    errors = {block: sum(row["l1"] for row in summary["blocks"] if row["block"] == block) for block, _ in found}
    worst = sorted(errors, key=errors.get)[-3:]
    assert summary["runs"][2]["fp16_blocks"] == ", ".join(f"{name.split('.')[1]}: 1" for name in sorted(worst))


def test_ablation_is_ordered_as_the_parts_are_added(demo):
    _, summary, _ = demo
    l1 = {(row["smoothing"], row["qk"], row["pv"]): row["l1"] for row in summary["ablation"]}
    both = l1["q+k", "fp4", "fp4"]
    assert both < min(l1["k", "fp4", "fp4"], l1["q", "fp4", "fp4"]) < l1["none", "fp4", "fp4"]
    assert max(l1["q+k", "fp4", "fp32"], l1["q+k", "fp32", "fp4"]) < both
    assert l1["q+k+v", "fp4", "fp4"] < both
    assert all(math.isfinite(row[key]) for row in summary["ablation"] for key in ("cosine", "l1", "rmse"))


def test_pictures_and_page_are_there(demo):
    out, _, _ = demo
    for run in RUNS:
        with Image.open(out / f"{run}.webp") as video:
            assert (video.n_frames, video.size) == (8, (256, 256))
    page = (out / "report.html").read_text()
    for picture in PICTURES:
        assert f'src="{picture}"' in page
        assert np.asarray(Image.open(out / picture)).std() > 0
    assert {path.name for path in out.iterdir()} == {*PICTURES, "summary.json", "report.html"}
    assert "plain PyTorch reference" in page


def test_progress_and_result_are_printed(demo):
    _, _, done = demo
    assert "fp4_worst3_fp16" in done.stdout
    assert "100%" in done.stderr


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGINT for one child process")
def test_an_interruption_leaves_only_whole_files(tmp_path):
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job ignores it, its children too
    process = subprocess.Popen(demo_command(tmp_path), stderr=subprocess.PIPE, text=True)
    signal.signal(signal.SIGINT, before)
    deadline = time.monotonic() + 120
    while not (tmp_path / "fp16.webp").exists():
        assert time.monotonic() < deadline
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Interrupted" in errors
    assert "Traceback" not in errors
    for path in tmp_path.iterdir():
        assert path.suffix in (".webp", ".png")
        Image.open(path).load()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--weights", str(ROOT / "README.md")], "is not a readable safetensors file"),
        (["--weights", "missing.safetensors"], "no weights file"),
        (["--comfyui-root", str(ROOT / "tests")], "no ComfyUI checkout"),
        (["--steps", "2"], "at least 4"),
        (["--direction", "sideways"], "invalid choice"),
        (["--device", "tpu"], "must be cpu, cuda"),
    ],
)
def test_bad_options_are_named_without_a_traceback(tmp_path, options, message):
    done = subprocess.run(demo_command(tmp_path / "out", *options), capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_a_python_that_lacks_modules_is_told_which(tmp_path):
    command = [sys.executable, "-I", "-S", str(ROOT / "dev.py"), "--no-venv", "demo"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "lacks torch, diffusers" in done.stderr
    assert "pip install -e" in done.stderr
