"""Times of attention: what is measured, what is compared, and that nothing is claimed without a measurement."""

import pytest
import torch


@pytest.fixture
def timing(pack_module, monkeypatch):
    """The module with a clock that only moves when told."""
    module = pack_module("attention_timing")
    now = [0.0]
    monkeypatch.setattr(module.time, "perf_counter", lambda: now[0])
    module.now = now
    return module


@pytest.fixture
def calls(timing):
    """Runs calls of given seconds."""
    timer = timing.AttentionTimer()

    def calls(kernel, *seconds, tokens=512):
        shape = (1, 2, tokens, 64)
        shape = timing.CallShape(shape, shape, "BHND", False, torch.bfloat16, torch.device("cpu"))
        for each in seconds:

            def compute(each=each):
                timing.now[0] += each
                return "output"

            assert timer.run(kernel, shape, compute) == "output"
        return timer

    return calls


def test_seconds_are_the_mean_of_the_timed_calls_times_their_number(calls):
    timer = calls("fp4", 9.0, 1.0, 2.0, 3.0, *[2.0] * 6)
    assert timer.read().seconds == {"fp4": pytest.approx(2.0 * 10)}, "the first call is a warm-up"


def test_a_single_call_counts(calls):
    assert calls("fp4", 3.0).read().seconds == {"fp4": 3.0}


def test_only_some_of_many_calls_are_timed(calls, timing):
    timer = calls("fp4", *[1.0] * 100)
    (series,) = timer._series.values()
    assert series.calls == 100
    assert len(series.spans) == 4 + 6


def test_speedup_compares_calls_of_one_shape_only(calls):
    calls("fp4", 1.0, 1.0, 1.0)
    timer = calls("fp16", 3.0, 3.0, tokens=1024)
    assert timer.read().speedup is None
    calls("fp16", 2.0, 2.0)
    result = timer.read()
    assert result.speedup == pytest.approx(2.0)
    assert result.compared_calls == 3


def test_time_spent_on_the_comparison_is_not_counted_as_attention(calls, timing):
    calls("fp4", 1.0, 1.0)
    timer = calls(timing.BASELINE, 9.0, 4.0, 4.0)
    assert timer.read().seconds == {"fp4": 2.0}
    assert timer.read().speedup == pytest.approx(4.0)


def test_a_baseline_is_wanted_until_there_are_enough(calls, timing):
    shape = (1, 2, 512, 64)
    shape = timing.CallShape(shape, shape, "BHND", False, torch.bfloat16, torch.device("cpu"))
    assert calls("fp4", 1.0).wants_baseline(shape)
    assert calls(timing.BASELINE, 1.0, 1.0).wants_baseline(shape)
    assert not calls("fp16", 1.0).wants_baseline(shape)


def test_nothing_is_left_of_an_earlier_run(calls):
    timer = calls("fp4", 1.0)
    timer.reset()
    assert timer.read().seconds == {}
    assert timer.read().speedup is None


def shape_of(timing, tokens, masked=False):
    shape = (1, 2, tokens, 64)
    return timing.CallShape(shape, shape, "BHND", masked, torch.bfloat16, torch.device("cpu"))


def test_a_prediction_counts_each_call_with_the_time_of_its_shape(timing):
    timer = timing.AttentionTimer()
    for tokens, calls, seconds, in_16_bit in ((512, 3, 1.0, 1.5), (1024, 1, 4.0, 8.0)):
        for _ in range(calls):
            timer.run("fp4", shape_of(timing, tokens), lambda: None, timing.Prediction(seconds, in_16_bit))
    timer.run("fp16", shape_of(timing, 512), lambda: None)
    found = timer.read()
    assert found.predicted_speedup == pytest.approx((3 * 1.5 + 8) / (3 + 4))
    assert (found.predicted_calls, found.unpredicted) == (4, None)


@pytest.mark.parametrize(
    ("kernel", "masked", "reason"),
    [
        ("nvfp4_cuda", False, "no times of such calls are known for this device (cpu)"),
        ("nvfp4_cuda", True, "calls with a mask have no measured times"),
        ("fp4_emulated", False, "emulation"),
    ],
)
def test_what_has_no_prediction_says_why(timing, kernel, masked, reason):
    timer = timing.AttentionTimer()
    timer.run(kernel, shape_of(timing, 512, masked), lambda: None)
    found = timer.read()
    assert (found.predicted_speedup, found.predicted_calls, found.unpredicted) == (None, 0, reason)
    assert found.emulated == (kernel == "fp4_emulated")


def test_the_node_tells_prediction_and_measurement_apart(timing, pack_module):
    line = pack_module("sampling_report")._speed_line
    assert line(timing.Timing({}, 1.5, 8, 1.62, 8)) == (
        "1.50x the speed of the model's own attention, measured (8 calls); 1.62x predicted (8 calls)"
    )
    assert line(timing.Timing({}, None, 0, 1.62, 8, "emulation")) == (
        "speed-up not measured (verbose measures it); 1.62x predicted (8 calls); no prediction for the rest: emulation"
    )
    assert line(timing.Timing({}, None, 0, unpredicted="emulation")).endswith("; no prediction: emulation")
