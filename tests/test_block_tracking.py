"""Which block and which noise level an attention call sees while a model runs."""

import threading
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from sage_kernels.block_overrides import BlockId

DEPTH = 3


@pytest.fixture
def tracking(pack_module):
    return pack_module("block_tracking")


class Block(nn.Module):
    """Calls back where a real block would call attention."""

    def __init__(self, attend):
        super().__init__()
        self.attend = attend

    def forward(self, x, options):
        self.attend(options)
        return x


class WanModel(nn.Module):
    """Main blocks with a VACE block beside them, refiners before and a face adapter after; core's keys as in Wan."""

    def __init__(self, attend, native_keys=True):
        super().__init__()
        self.attend, self.native_keys = attend, native_keys
        self.blocks = nn.ModuleList(Block(attend) for _ in range(DEPTH))
        self.vace_blocks = nn.ModuleList([Block(attend)])

    def forward(self, x, options):
        self.attend(options)
        for index, block in enumerate(self.blocks):
            if self.native_keys:
                options.update(block_type="double", block_index=index)
            x = block(x, options)
            if index == 1:
                x = self.vace_blocks[0](x, options)
        self.attend(options)
        return x


WAN_CALLS = [None, BlockId("double", 0), BlockId("double", 1), BlockId("vace", 0), BlockId("double", 2), None]


def evaluate(tracker, model, sigma=0.5, sample_sigmas=None, run=None):
    """What core's apply_model does with one wrapper."""
    base_model = SimpleNamespace(diffusion_model=model, model_sampling="the model's sampling")
    options = {"sigmas": torch.tensor([sigma, sigma]), "sample_sigmas": sample_sigmas}
    executor = SimpleNamespace(class_obj=base_model)
    run = run or (lambda *args: model(args[0], dict(args[5])))
    return tracker(_Executor(run, executor.class_obj), torch.zeros(1), options["sigmas"], None, None, None, options)


class _Executor:
    def __init__(self, run, class_obj):
        self.run, self.class_obj = run, class_obj

    def __call__(self, *args, **kwargs):
        return self.run(*args, **kwargs)


def hook_count(model):
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


@pytest.fixture
def seen(tracking):
    """Blocks that attention calls saw, in order; seen.attend is what models call."""
    calls = []

    def attend(options):
        calls.append(tracking.running_block(tracking.current_evaluation(), NATIVE_BLOCKS, options))

    return SimpleNamespace(calls=calls, attend=attend)


NATIVE_BLOCKS = {("double", index): BlockId("double", index) for index in range(DEPTH)}


# --- blocks -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("native_keys", [True, False])
def test_every_call_sees_its_block_and_none_outside_the_blocks(tracking, seen, native_keys):
    model = WanModel(seen.attend, native_keys)
    evaluate(tracking.BlockTracker(False), model)
    assert seen.calls == WAN_CALLS


def test_nothing_is_left_on_the_model(tracking, seen):
    model = WanModel(seen.attend)
    evaluate(tracking.BlockTracker(False), model)
    assert hook_count(model) == 0
    assert tracking.current_evaluation() is None
    assert evaluate(tracking.BlockTracker(False), model) is not None
    assert seen.calls == WAN_CALLS * 2


def test_nothing_is_left_after_an_error(tracking):
    def fail(options):
        raise RuntimeError("out of memory")

    model = WanModel(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        evaluate(tracking.BlockTracker(False), model)
    assert hook_count(model) == 0
    assert tracking.current_evaluation() is None


def test_a_block_that_fails_and_is_caught_is_over(tracking, seen):
    model = WanModel(seen.attend)

    def fail(options):
        raise RuntimeError("retry with less memory")

    model.blocks[0].attend = fail

    def run(*args):
        with pytest.raises(RuntimeError, match="retry"):
            model.blocks[0](args[0], {})
        model.attend({})

    evaluate(tracking.BlockTracker(False), model, run=run)
    assert seen.calls == [None]


def test_core_is_believed_where_no_hook_fires(tracking, seen):
    model = WanModel(seen.attend)

    def run_blocks_without_calling_them(*args):
        for index, block in enumerate(model.blocks):
            block.forward(args[0], {"block_type": "double", "block_index": index})
        model.attend({"block_type": "unheard of", "block_index": 0})

    evaluate(tracking.BlockTracker(False), model, run=run_blocks_without_calling_them)
    assert seen.calls == [*NATIVE_BLOCKS.values(), None]


def test_core_is_believed_without_an_evaluation(tracking):
    assert tracking.running_block(None, NATIVE_BLOCKS, {"block_type": "double", "block_index": 1}) == BlockId(
        "double", 1
    )
    assert tracking.running_block(None, NATIVE_BLOCKS, {}) is None


def test_two_models_one_inside_the_other_do_not_mix(tracking, seen):
    inner, outer = WanModel(seen.attend), WanModel(seen.attend)

    def attend_and_run_another_model(options):
        evaluate(tracking.BlockTracker(False), inner)
        seen.attend(options)

    outer.blocks[1].attend = attend_and_run_another_model
    evaluate(tracking.BlockTracker(False), outer)
    assert seen.calls == [*WAN_CALLS[:2], *WAN_CALLS, *WAN_CALLS[2:]]


def test_two_threads_in_one_model_do_not_mix(tracking):
    """Both install their hooks on the same blocks, and one removes its own while the other is inside a block."""
    seen = {0.25: [], 0.75: []}
    inside = {sigma: threading.Event() for sigma in seen}
    first_done = threading.Event()

    def attend(options):
        evaluation = tracking.current_evaluation()
        block = tracking.running_block(evaluation, {}, options)
        seen[evaluation.sigma].append(block)
        if block == BlockId("double", 1):
            inside[evaluation.sigma].set()
            assert all(event.wait(10) for event in inside.values())
            if evaluation.sigma == 0.75:
                assert first_done.wait(10)

    model = WanModel(attend)

    def sample(sigma):
        evaluate(tracking.BlockTracker(True), model, sigma)
        first_done.set()

    threads = [threading.Thread(target=sample, args=[sigma]) for sigma in seen]
    threads[0].start()
    assert inside[0.25].wait(10), "the first to start is also the first to finish: the two are not nested"
    threads[1].start()
    for thread in threads:
        thread.join()
    assert seen == {0.25: WAN_CALLS, 0.75: WAN_CALLS}
    assert hook_count(model) == 0


def test_blocks_of_a_compiled_model_are_tracked_by_hooks_that_are_not_compiled(tracking, seen, monkeypatch):
    compiling = []

    class Evaluation(tracking.ModelEvaluation):
        def enter(self, module):
            compiling.append(torch.compiler.is_compiling())
            super().enter(module)

    monkeypatch.setattr(tracking, "ModelEvaluation", Evaluation)
    model = WanModel(torch.compiler.disable(seen.attend), native_keys=False)
    compiled = torch.compile(model, backend="eager")
    for _ in range(2):
        evaluate(tracking.BlockTracker(False), compiled, run=lambda *args: compiled(args[0], {}))
    assert seen.calls == WAN_CALLS * 2
    assert compiling == [False] * 2 * (DEPTH + 1)


# --- noise level ------------------------------------------------------------------------------------------------------


class Sigmas:
    """A tensor that counts how often it is read."""

    def __init__(self, *values):
        self.values, self.reads = values, 0

    def flatten(self):
        self.reads += 1
        return torch.tensor(self.values)


def evaluations(tracking, tracker, sample_sigmas, sigma=0.5, times=1):
    found = []
    model = WanModel(lambda options: found.append(tracking.current_evaluation()))
    for _ in range(times):
        evaluate(tracker, model, sigma, sample_sigmas)
    return found


def test_noise_level_and_schedule_are_the_samplers(tracking):
    schedule = Sigmas(1.0, 0.5, 0.0)
    for evaluation in evaluations(tracking, tracking.BlockTracker(True), schedule):
        assert (evaluation.sigma, evaluation.schedule) == (0.5, (1.0, 0.5, 0.0))
        assert evaluation.model_sampling == "the model's sampling"


def test_schedule_is_read_once_per_sampling_run(tracking):
    tracker, first, second = tracking.BlockTracker(True), Sigmas(1.0, 0.0), Sigmas(0.5, 0.0)
    evaluations(tracking, tracker, first, times=3)
    assert [e.schedule for e in evaluations(tracking, tracker, second, times=2)][-1] == (0.5, 0.0)
    assert (first.reads, second.reads) == (1, 1)


def test_nothing_is_read_when_nobody_needs_the_noise_level(tracking):
    schedule = Sigmas(1.0, 0.0)
    [evaluation, *_] = evaluations(tracking, tracking.BlockTracker(False), schedule)
    assert (evaluation.sigma, evaluation.schedule, schedule.reads) == (None, None, 0)


def test_without_a_schedule_the_noise_level_comes_from_the_call(tracking):
    model = WanModel(lambda options: found.append(tracking.current_evaluation()))
    found = []
    executor = _Executor(
        lambda x, t, transformer_options=None: model(x, {}), SimpleNamespace(diffusion_model=model, model_sampling=None)
    )
    tracking.BlockTracker(True)(executor, torch.zeros(1), torch.tensor([0.25]), transformer_options={})
    assert (found[0].sigma, found[0].schedule) == (0.25, None)
