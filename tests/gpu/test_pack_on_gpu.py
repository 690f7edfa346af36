"""What the node pack does on a CUDA GPU: the sentinel's sums, the live kernel test, decisions without a wait."""

from pathlib import Path

import pytest
import torch

import sage_kernels
from sage_kernels.block_overrides import BlockId
from sage_kernels.kernels import KERNELS

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA GPU"),
]


def test_sentinel_finds_the_bad_block_without_waiting_per_call(pack_module):
    watch = pack_module("sentinel").EvaluationWatch(sees_calls=True)
    good, bad = torch.full((2, 8, 64), 60000.0, device="cuda", dtype=torch.float16), torch.ones(3, device="cuda")
    bad[1] = torch.nan
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for index in range(50):
            watch.record(BlockId("double", index), bad if index == 7 else good, by_kernel=True)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert watch.bad_calls() == [BlockId("double", 7)]


def test_every_kernel_of_this_gpu_passes_the_live_test(pack_module):
    results = pack_module("kernel_check").check_kernels(Path(sage_kernels.__file__).parents[1])
    assert {result["state"] for result in results} <= {"ok", "not run"}, results
    found = {result["case"]: result["state"] for result in results if result["case"].startswith("cuda:0")}
    assert set(found) == {f"cuda:0 {kernel.name}" for kernel in KERNELS if not kernel.emulated}
    assert found["cuda:0 sdpa"] == "ok"
    if torch.cuda.get_device_capability() >= (8, 0):
        assert [case for case, state in found.items() if state == "ok" and case != "cuda:0 sdpa"]


def test_deciding_about_a_call_never_waits_for_the_gpu():
    x = torch.randn(1, 2, 64, 64, device="cuda", dtype=torch.bfloat16)
    sage_kernels.attention(x, x, x)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for precision in ("auto", "fp4", "int8", "fp16"):
            sage_kernels.explain(x, x, x, precision=precision)
        sage_kernels.attention(x, x, x)
    finally:
        torch.cuda.set_sync_debug_mode("default")
