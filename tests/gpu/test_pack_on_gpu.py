"""What the node pack does on a CUDA GPU: timing by events, the sentinel's sums, the live kernel test."""

from pathlib import Path

import pytest
import torch

import sage_kernels
from sage_kernels.block_overrides import BlockId

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA GPU"),
]


def test_attention_is_timed_by_events(pack_module):
    timing = pack_module("attention_timing")
    x = torch.randn(1, 16, 4096, 128, device="cuda", dtype=torch.bfloat16)
    shape = timing.CallShape(tuple(x.shape), tuple(x.shape), "BHND", False, x.dtype, x.device)
    timer = timing.AttentionTimer()

    def attend(times):
        for _ in range(times):
            torch.nn.functional.scaled_dot_product_attention(x, x, x)

    for _ in range(20):
        timer.run("fp16", shape, lambda: attend(1))
        timer.run("slow_kernel", shape, lambda: attend(4))
    read = timer.read()
    assert read.compared_calls == 20
    # The kernel does four times the work of the 16-bit call.
    assert 0.15 < read.speedup < 0.4
    assert 0 < read.seconds["fp16"] < read.seconds["slow_kernel"] < 1


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
    assert any(result["case"] == "cuda:0 fp16" and result["state"] == "ok" for result in results)


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
