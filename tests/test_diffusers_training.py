"""Training diffusers' transformers with 8-bit attention; the reference stands in for the kernels."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import WanTransformer3DModel

from sage_kernels.diffusers_training import patch_training

ROOT = Path(__file__).resolve().parent.parent
BLOCKS = 2
EXAMPLE_NEEDS = ("peft", "sklearn")


@pytest.fixture
def wan():
    torch.manual_seed(0)
    return WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, text_dim=8, freq_dim=16,
        ffn_dim=32, num_layers=BLOCKS, rope_max_seq_len=32,
    )  # fmt: skip


def gradients(model):
    """Of a loss, for every weight of the model."""
    model.zero_grad()
    generator = torch.Generator().manual_seed(1)
    latents, context = torch.randn(1, 4, 2, 8, 8, generator=generator), torch.randn(1, 6, 8, generator=generator)
    output = model(latents, torch.tensor([500.0]), context, return_dict=False)[0]
    output.square().mean().backward()
    return {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}


def relative_l1(found, wanted):
    difference = sum(float((found[name] - wanted[name]).abs().sum()) for name in wanted)
    return difference / sum(float(x.abs().sum()) for x in wanted.values())


def test_gradients_of_all_weights_come_through_8_bit_attention(wan):
    wanted = gradients(wan)
    with patch_training(wan, emulate=True) as patched:
        found = gradients(wan)
    assert patched.coverage.by_kernel() == {"sagebwd_int8_emulated": 2 * BLOCKS}
    assert found.keys() == wanted.keys()
    assert 0 < relative_l1(found, wanted) < 0.03
    again = gradients(wan)
    assert all(torch.equal(again[name], wanted[name]) for name in wanted)


def test_checkpointed_blocks_are_recomputed_in_8_bits_too(wan):
    with patch_training(wan, emulate=True) as patched:
        wanted = gradients(wan)
        wan.enable_gradient_checkpointing()
        patched.coverage.reset()
        found = gradients(wan)
        assert patched.coverage.by_kernel() == {"sagebwd_int8_emulated": 2 * 2 * BLOCKS}  # forward, and once more
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    x = torch.randn(1, 1, 4, 8)
    torch.nn.functional.scaled_dot_product_attention(x, x, x)
    assert patched.coverage.by_kernel() == {"sagebwd_int8_emulated": 2 * 2 * BLOCKS}  # nothing was left behind


def test_what_cannot_train_in_8_bits_stays_in_16_and_says_why(wan):
    wanted = gradients(wan)
    with patch_training(wan) as patched:
        found = gradients(wan)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert patched.coverage.reasons() == {"fp16": {"needs a CUDA GPU": 2 * BLOCKS}}
    with patch_training(wan, emulate=True, min_tokens=8) as patched:
        gradients(wan)
    assert patched.coverage.by_kernel() == {"sagebwd_int8_emulated": BLOCKS, "fp16": BLOCKS}
    assert patched.coverage.reasons() == {"fp16": {"fewer than 8 tokens": BLOCKS}}


def test_an_unknown_precision_is_refused(wan):
    with pytest.raises(ValueError, match="must be one of int8, fp8, got 'fp4'"):
        patch_training(wan, precision="fp4")


@pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in EXAMPLE_NEEDS),
    reason='the LoRA example needs pip install "sage-kernels[lora]"',
)
def test_the_lora_example_trains_and_saves_an_adapter(tmp_path):
    script = ROOT / "sage_kernels" / "examples" / "lora_fine_tuning.py"
    options = ["--steps", "2", "--batch", "1", "--device", "cpu", "--out", str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(
        [sys.executable, str(script), *options], capture_output=True, text=True, check=False, env=environment
    )
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "loss.json").read_text(encoding="utf-8"))
    assert "sagebwd_int8_emulated" in result["coverage"]
    assert len(result["losses"]) == 2
    assert (tmp_path / "pytorch_lora_weights.safetensors").exists()
