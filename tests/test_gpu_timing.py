"""Methods that are timed in turns, with a clock in place of a GPU."""

import contextlib

import pytest
import torch

from sage_kernels import gpu_timing


@pytest.fixture
def calls(monkeypatch):
    """Names of the calls in order; every measurement takes 2 ms for each call in it."""
    made = []

    def measure(call):
        before = len(made)
        call()
        return 2.0 * (len(made) - before)

    monkeypatch.setattr(gpu_timing, "_measure", measure)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    return made


def test_methods_take_turns_over_all_their_inputs(calls):
    methods = {name: [lambda tag=f"{name}{i}": calls.append(tag) for i in range(2)] for name in "ab"}
    times = gpu_timing.time_in_turns(methods, 0.0, torch.device("cpu"))
    assert times == {"a": 2.0, "b": 2.0}
    assert calls == ["a0", "a1", "b0", "b1"] * 4  # one round to warm up, at least three that count


def test_more_time_gives_more_rounds(calls):
    gpu_timing.time_in_turns({"a": [lambda: calls.append("a")]}, 0.02, torch.device("cpu"))
    assert len(calls) == 1 + 10
