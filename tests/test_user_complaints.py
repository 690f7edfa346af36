"""What users of other attention packages complain of most, where no other test pins it down."""

import importlib.util
import subprocess
import sys

import pytest
import torch

from sage_kernels import dispatch
from sage_kernels.architectures import ARCHITECTURES
from sage_kernels.attention_call import make_call

INT8 = ("int8_triton", "int8_fp16_triton")
OPTIONAL = ("triton", "cuda", "cupy", "sageattention", "xformers", "flash_attn")


@pytest.fixture
def on_gpu(monkeypatch):
    """Decisions as on a GPU of an architecture."""

    def on_gpu(architecture):
        monkeypatch.setattr(dispatch, "device_architecture", lambda device: architecture)

    return on_gpu


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=lambda row: row.name)
def test_without_triton_a_call_runs_all_the_same_and_says_what_is_missing(on_gpu, monkeypatch, architecture):
    """Complaint 2: Triton is missing on Windows, and the sampling dies of it."""
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *args: None if name == "triton" else find_spec(name, *args)
    )
    on_gpu(architecture)
    x = torch.zeros(1, 24, 9000, 128, dtype=torch.bfloat16)
    decision = dispatch.decide(make_call(x, x, x, None, False, None, False, None, "BHND", "auto", False, False))
    assert decision.kernel is not None
    assert "triton" not in decision.kernel
    reasons = [refusal.reason for refusal in decision.refusals if refusal.kernel in INT8]
    assert all("Triton" in reason for reason in reasons)
    assert reasons or not {"int8", "int8_fp16"}.intersection(architecture.runnable) or decision.precision != "fp16"


def test_the_package_needs_nothing_but_torch():
    """Complaint 1: an import that fails for a missing or mismatched package takes the whole pack with it."""
    program = f"""
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {OPTIONAL!r}:
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Refuse())
import torch, sage_kernels
x = torch.randn(1, 2, 70, 64)
assert torch.isfinite(sage_kernels.attention(x, x, x)).all()
assert torch.isfinite(sage_kernels.attention(x, x, x, precision="fp4", allow_emulation=True)).all()
print(sage_kernels.explain(x, x, x, precision="int8"))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "needs a CUDA GPU" in done.stdout
