"""Non-finite numbers: seen without a wait per call, computed again in 16 bit, and blamed on the right block only."""

import logging
import math

import pytest
import torch

from sage_kernels.block_overrides import BlockId, BlockLayout

LAYOUT = BlockLayout({"double": 4})


@pytest.fixture
def module(pack_module):
    return pack_module("sentinel")


@pytest.fixture
def sentinel(module):
    sentinel = module.Sentinel(LAYOUT)
    sentinel.start()
    return sentinel


class Model:
    """apply_model with one attention call per block.

    Args:
        low: block -> what its attention gives in low precision, 1.0 where not said.
        own: the same for 16 bit.
        kernels: whether kernels take the calls where they may.
    """

    def __init__(self, module, low=None, own=None, kernels=True):
        self.module, self.low, self.own, self.kernels = module, low or {}, own or {}, kernels
        self.evaluations = []
        self.sentinel = None

    def __call__(self, x, *args, **kwargs):
        watch = self.module.current_watch()
        in_fp16 = not self.kernels or (watch is not None and watch.in_fp16)
        self.evaluations.append(("fp16" if in_fp16 else "low", watch is not None and watch.sees_calls))
        for block in LAYOUT:
            by_kernel = not in_fp16 and block not in self.sentinel.bad_blocks
            output = torch.full((2,), (self.low if by_kernel else self.own).get(block.index, 1.0)) + x
            if watch is not None:
                watch.record(block, output, by_kernel=by_kernel)
            x = output
        return x

    def evaluate(self, sentinel, times=1):
        self.sentinel = sentinel
        for _ in range(times):
            result = sentinel(self, torch.zeros(2))
        return result


def test_a_bad_block_is_computed_again_named_once_and_kept_in_fp16(module, sentinel, caplog):
    model = Model(module, low={2: math.nan})
    assert model.evaluate(sentinel, 4).tolist() == [4.0, 4.0]
    assert sentinel.bad_blocks == {BlockId("double", 2)}
    assert [mode for mode, _ in model.evaluations] == ["low", "fp16", "low", "low", "low"]
    assert [message for message in caplog.messages if "block 2" in message] == caplog.messages
    assert len(caplog.messages) == 1


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_every_kind_of_non_finite_number_is_seen(module, sentinel, value):
    assert Model(module, low={0: value}).evaluate(sentinel).isfinite().all()


def test_each_bad_block_is_found_in_its_turn(module, sentinel):
    model = Model(module, low={1: math.nan, 3: math.inf})
    assert model.evaluate(sentinel, 3).isfinite().all()
    assert sentinel.bad_blocks == {BlockId("double", 1), BlockId("double", 3)}


def test_a_failure_at_a_later_step_passes_no_bad_result_though_no_call_is_watched(module, sentinel):
    model = Model(module)
    model.evaluate(sentinel, 4)
    assert [watched for _, watched in model.evaluations] == [True, True, False, False]
    model.low = {1: math.nan}
    assert model.evaluate(sentinel).isfinite().all()
    assert model.evaluations[4:] == [("low", False), ("low", True), ("fp16", True)]
    assert sentinel.bad_blocks == {BlockId("double", 1)}


def test_calls_are_watched_at_first_and_then_on_every_eighth_evaluation(module, sentinel):
    model = Model(module)
    model.evaluate(sentinel, 20)
    assert [number for number, (_, watched) in enumerate(model.evaluations) if watched] == [0, 1, 8, 16]


def test_a_model_that_fails_in_16_bit_too_is_not_blamed_and_not_looped_over(module, sentinel, caplog):
    model = Model(module, low={1: math.nan}, own={1: math.nan})
    assert model.evaluate(sentinel, 5).isnan().all()
    assert sentinel.bad_blocks == frozenset()
    assert [mode for mode, _ in model.evaluations] == ["low", "fp16", "low", "low", "low", "low"]
    assert [message for message in caplog.messages if "in 16 bit too" in message] == caplog.messages
    assert len(caplog.messages) == 1
    sentinel.start()
    model.low = {2: math.nan}
    model.own = {}
    assert model.evaluate(sentinel).isfinite().all(), "the next sampling is looked at again"


def test_a_bad_result_whose_attention_is_finite_is_computed_again_and_no_block_is_blamed(module, sentinel, caplog):
    model = Model(module)
    model.sentinel = sentinel

    def overflows_after_attention(x):
        low = not module.current_watch().in_fp16
        return model(x) + (math.inf if low else 0.0)

    for _ in range(2):
        assert sentinel(overflows_after_attention, torch.zeros(2)).isfinite().all()
    assert sentinel.bad_blocks == frozenset()
    assert len(caplog.messages) == 1
    assert "no block can be named" in caplog.messages[0]


def test_an_evaluation_without_kernels_is_none_of_its_business(module, sentinel, caplog):
    caplog.set_level(logging.INFO)
    model = Model(module, own={0: math.nan}, kernels=False)
    assert model.evaluate(sentinel).isnan().all()
    assert len(model.evaluations) == 1
    assert caplog.messages == []


@pytest.mark.parametrize("by_keyword", [False, True])
def test_controlnet_outputs_are_there_for_the_second_evaluation_too(module, sentinel, by_keyword):
    """UNets pop them off their lists as they use them."""
    model = Model(module, low={0: math.nan})
    model.sentinel = sentinel
    seen = []

    def unet(x, *args, **kwargs):
        control = kwargs["control"] if by_keyword else args[3]
        seen.append(control["input"].pop())
        return model(x)

    control = {"input": ["residual"], "type": "plain"}
    if by_keyword:
        sentinel(unet, torch.zeros(2), control=control)
    else:
        sentinel(unet, torch.zeros(2), None, None, None, control, {})
    assert seen == ["residual", "residual"]
    assert control["input"] == ["residual"]


def test_watching_a_call_does_not_read_it(module):
    """Meta tensors have no data: reading any, which on a GPU would wait for it, raises."""
    watch = module.EvaluationWatch(sees_calls=True)
    watch.record(BlockId("double", 0), torch.zeros(2, device="meta"), by_kernel=True)
    assert watch.kernel_calls == 1


def test_large_float16_outputs_are_not_taken_for_infinite_ones(module):
    watch = module.EvaluationWatch(sees_calls=True)
    watch.record(None, torch.full((1024, 1024), 60000.0, dtype=torch.float16), by_kernel=True)
    assert watch.bad_calls() == []
