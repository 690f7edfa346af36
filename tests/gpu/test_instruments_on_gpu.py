"""What the instruments do differently on a GPU: times by events, numbers read once."""

import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA GPU"),
]

TOKENS, REPEATS = 4096, 40


def attend(q):
    return torch.nn.functional.scaled_dot_product_attention(q, q, q)


def test_times_by_events_are_those_of_a_clock_around_many_calls(pack_module):
    timing = pack_module("attention_timing")
    q = torch.randn(1, 16, TOKENS, 128, device="cuda", dtype=torch.bfloat16)
    shape = timing.CallShape(q.shape, q.shape, "BHND", False, q.dtype, q.device)
    timer = timing.AttentionTimer()
    attend(q)
    torch.cuda.synchronize()
    start = timing.time.perf_counter()
    for _ in range(REPEATS):
        timer.run("fp4", shape, lambda: attend(q))
    torch.cuda.synchronize()
    by_clock = timing.time.perf_counter() - start
    assert timer.read().seconds["fp4"] == pytest.approx(by_clock, rel=0.3)


def test_timing_and_watching_do_not_wait_for_the_gpu(pack_module):
    timing, sentinel = pack_module("attention_timing"), pack_module("sentinel")
    q = torch.randn(1, 2, 256, 64, device="cuda", dtype=torch.float16)
    shape = timing.CallShape(q.shape, q.shape, "BHND", False, q.dtype, q.device)
    timer, watch = timing.AttentionTimer(), sentinel.EvaluationWatch(sees_calls=True)
    torch.cuda.set_sync_debug_mode("error")  # any wait that torch knows of raises
    try:
        for _ in range(3):
            watch.record(None, timer.run("fp4", shape, lambda: attend(q)), by_kernel=True)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert watch.bad_calls() == []
    watch.record(None, attend(q * float("nan")), by_kernel=True)
    assert watch.bad_calls() == [None]
