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
    methods = {name: [lambda tag=f"{name}{i}": calls.append(tag) for i in range(2)] for name in "abcd"}
    times = gpu_timing.time_in_turns(methods, 0.0, torch.device("cpu"))
    assert times == dict.fromkeys("abcd", 2.0)
    rounds = [calls[start : start + 8] for start in range(0, len(calls), 8)]
    assert len(rounds) == 4  # one to warm up, at least three that count
    for each in rounds:
        assert sorted(each) == sorted(f"{name}{i}" for name in "abcd" for i in range(2))
        assert [tag[0] for tag in each[::2]] == [tag[0] for tag in each[1::2]]  # a method's calls in a row


def test_no_method_always_follows_the_same_one(calls):
    methods = {name: [lambda name=name: calls.append(name)] for name in "abcd"}
    gpu_timing.time_in_turns(methods, 1.0, torch.device("cpu"))
    rounds = ["".join(calls[start : start + 4]) for start in range(0, len(calls), 4)]
    assert len(set(rounds)) > 2


def test_more_time_gives_more_rounds(calls):
    gpu_timing.time_in_turns({"a": [lambda: calls.append("a")]}, 0.02, torch.device("cpu"))
    assert len(calls) == 1 + 10
