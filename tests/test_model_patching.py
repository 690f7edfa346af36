"""What the node does to a MODEL: everything in the clone, nothing in the original."""

import copy
import functools
import logging
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import nn

import sage_kernels
from sage_kernels.block_overrides import BlockId, BlockOverrideError

DEPTH, HEADS = 3, 2


class WanModel(nn.Module):
    """Blocks that call attention as Wan does."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(DEPTH))

    def forward(self, x, transformer_options):
        for block in self.blocks:
            x = block(x, transformer_options)
        return x


class Block(nn.Module):
    context = None  # how many tokens it attends to; all

    def forward(self, x, transformer_options):
        override = transformer_options.get("optimized_attention_override")
        y = x[:, : self.context]
        if override is None:
            return core_attention(x, y, y, heads=HEADS)
        return override(core_attention, x, y, y, heads=HEADS, transformer_options=transformer_options)


def core_attention(q, k, v, heads, **kwargs):
    q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k, v))
    return torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class FakePatcher:
    """The part of core's ModelPatcher that a patch uses, and a sampling with its wrappers."""

    def __init__(self, diffusion_model):
        self.model = SimpleNamespace(diffusion_model=diffusion_model, model_sampling=self)
        self.model_options = {"transformer_options": {}}
        self.wrappers = {}

    def percent_to_sigma(self, percent):
        return 1.0 - percent

    def get_model_object(self, name):
        return getattr(self.model, name)

    def clone(self):
        other = FakePatcher(self.model.diffusion_model)
        other.model = self.model
        other.model_options = copy.deepcopy(self.model_options)
        other.wrappers = {kind: {key: list(w) for key, w in keys.items()} for kind, keys in self.wrappers.items()}
        return other

    def add_wrapper_with_key(self, kind, key, wrapper):
        self.wrappers.setdefault(kind, {}).setdefault(key, []).append(wrapper)

    def remove_wrappers_with_key(self, kind, key):
        self.wrappers.get(kind, {}).pop(key, None)

    def sample(self, sigmas=(1.0, 0.75, 0.5, 0.25, 0.0)):
        return self.run("outer_sample", self.steps, torch.tensor(sigmas))

    def steps(self, sigmas):
        x = torch.randn(1, 5, 16, generator=torch.Generator().manual_seed(0))
        for sigma in sigmas[:-1]:
            options = {**self.model_options["transformer_options"], "sigmas": sigma[None], "sample_sigmas": sigmas}
            x = x + self.run("apply_model", self.apply_model, x, sigma[None], None, None, None, options)
        return x

    def apply_model(self, x, t, c_concat, c_crossattn, control, transformer_options):
        return self.model.diffusion_model(x, transformer_options)

    def run(self, kind, function, *args):
        wrappers = [wrapper for of_key in self.wrappers.get(kind, {}).values() for wrapper in of_key]
        for wrapper in reversed(wrappers):  # the first is the outermost
            function = functools.partial(wrapper, Executor(function, self.model))
        return function(*args)


class Executor:
    """core's WrapperExecutor: calls the next wrapper or the function itself."""

    def __init__(self, function, class_obj):
        self.function, self.class_obj = function, class_obj

    def __call__(self, *args):
        return self.function(*args)


@pytest.fixture
def patching(pack_module, monkeypatch):
    core = ModuleType("comfy.patcher_extension")
    core.WrappersMP = SimpleNamespace(APPLY_MODEL="apply_model", OUTER_SAMPLE="outer_sample")
    monkeypatch.setitem(sys.modules, "comfy", ModuleType("comfy"))
    monkeypatch.setitem(sys.modules, "comfy.patcher_extension", core)
    return pack_module("model_patching")


@pytest.fixture
def model():
    return FakePatcher(WanModel())


@pytest.fixture
def patch(patching):
    def patch(model, *, kernels=sage_kernels, show=None, **settings):
        settings = {"precision": "fp4", "allow_emulation": True, **settings}
        return patching.patch_model(model, patching.AttentionSettings(**settings), kernels, show)

    return patch


def kernels_that_fail(on_calls):
    """sage_kernels, but the calls of these numbers give NaN."""
    calls = iter(range(1_000_000))

    def attention(q, k, v, **options):
        output = sage_kernels.attention(q, k, v, **options)
        return output * float("nan") if next(calls) in on_calls else output

    return SimpleNamespace(explain=sage_kernels.explain, attention=attention)


def coverage(patched):
    return patched.model_options["transformer_options"]["optimized_attention_override"].coverage


def test_the_clone_computes_in_fp4_and_the_original_as_ever(patch, model):
    expected = model.sample()
    patched = patch(model)
    assert not torch.equal(patched.sample(), expected)
    assert coverage(patched).by_block() == {BlockId("double", i): {"fp4_emulated": 4} for i in range(DEPTH)}
    assert torch.equal(model.sample(), expected)
    assert (model.model_options, model.wrappers) == ({"transformer_options": {}}, {})


@pytest.mark.parametrize("settings", [{"precision": "fp16"}, {"fp16_blocks": "0-2: 1"}, {"min_tokens": 6}])
def test_what_stays_in_fp16_is_bit_identical(patch, model, settings):
    assert torch.equal(patch(model, **settings).sample(), model.sample())


def test_shares_and_windows_follow_the_noise_level(patch, model):
    patched = patch(model, fp16_blocks="0: 0.5, 1: 0.25 low")
    patched.sample()
    assert coverage(patched).by_block() == {
        BlockId("double", 0): {"fp16": 2, "fp4_emulated": 2},
        BlockId("double", 1): {"fp4_emulated": 3, "fp16": 1},
        BlockId("double", 2): {"fp4_emulated": 4},
    }
    windowed = patch(model, start_percent=0.3)
    windowed.sample()
    assert coverage(windowed).by_kernel() == {"fp16": 6, "fp4_emulated": 6}


def test_a_second_patch_replaces_the_first(patch, model):
    twice = patch(patch(model), precision="fp16")
    assert torch.equal(twice.sample(), model.sample())
    assert {kind: [len(w) for w in keys.values()] for kind, keys in twice.wrappers.items()} == {
        "apply_model": [2],  # sentinel and tracker
        "outer_sample": [1],
    }


def test_an_override_of_another_node_takes_what_is_left(patch, model):
    calls = []

    def other(func, *args, **kwargs):
        calls.append(kwargs["transformer_options"])
        return func(*args, **kwargs)

    model.model_options["transformer_options"]["optimized_attention_override"] = other
    patched = patch(patch(model), fp16_blocks="1: 1")
    patched.sample()
    assert len(calls) == 4
    assert coverage(patched).by_kernel() == {"fp4_emulated": 8, "earlier override": 4}


def test_two_patches_of_one_model_keep_their_own_policies_and_counts(patch, model):
    first, second = patch(model, fp16_blocks="0: 1"), patch(model, fp16_blocks="1-2: 1")
    first.sample()
    second.sample()
    assert coverage(first).by_kernel() == {"fp4_emulated": 8, "fp16": 4}
    assert coverage(second).by_kernel() == {"fp16": 8, "fp4_emulated": 4}


@pytest.mark.parametrize(
    ("settings", "error", "part"),
    [
        ({"fp16_blocks": "3-1: 2"}, BlockOverrideError, "backwards"),
        ({"fp16_blocks": "3: 1"}, BlockOverrideError, "its blocks are 0-2"),
        ({"start_percent": 0.5, "end_percent": 0.5}, ValueError, "must be lower than end_percent"),
        ({"precision": "fp2"}, ValueError, "fp8_fp4"),
    ],
)
def test_bad_settings_are_a_one_line_error_and_the_model_stays_usable(patch, model, settings, error, part):
    expected = model.sample()
    with pytest.raises(error, match=part) as raised:
        patch(model, **settings)
    assert "\n" not in str(raised.value)
    assert torch.equal(model.sample(), expected)


def test_a_model_without_known_blocks_is_refused(patch):
    with pytest.raises(ValueError, match="no transformer blocks are known in Linear"):
        patch(FakePatcher(nn.Linear(1, 1)))


def test_each_sampling_is_counted_and_reported_on_its_own(patch, model, caplog):
    caplog.set_level(logging.INFO)
    patched = patch(model, fp16_blocks="2: 1", verbose=True)
    for _ in range(2):
        caplog.clear()
        patched.sample()
        assert any("fp4_emulated 8" in message and "fp16 4" in message for message in caplog.messages)
        assert "Sage3: block 2: fp16 4" in caplog.messages


def test_a_model_that_never_asks_for_an_override_is_reported(patch, model, caplog):
    patched = patch(model)
    for block in model.model.diffusion_model.blocks:
        block.forward = lambda x, transformer_options: x
    patched.sample()
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "this node changed nothing" in caplog.messages[0]


# --- what happens in a sampling ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("step", "block"), [(0, 1), (3, 2)])
def test_a_step_with_nan_from_a_kernel_is_computed_again_before_the_sampler_sees_it(patch, model, step, block, caplog):
    first_call = step * DEPTH
    # A step whose calls are not watched is evaluated once more to find the block: it fails there too.
    bad = {first_call + block} if step == 0 else {first_call + block, first_call + DEPTH + block}
    patched = patch(model, kernels=kernels_that_fail(bad), precision="fp4")
    assert patched.sample().isfinite().all()
    assert [message for message in caplog.messages if f"block {block} gave non-finite" in message] == caplog.messages
    assert coverage(patched).reasons()["fp16"]["recomputed in FP16 after a non-finite result"] == DEPTH
    patched.sample()
    assert coverage(patched).by_block()[BlockId("double", block)] == {"fp16": 4}
    assert len(caplog.messages) == 1


def test_the_recomputed_step_is_that_of_16_bit(patch, model):
    all_steps_fail = range(1_000_000)
    patched = patch(model, kernels=kernels_that_fail(all_steps_fail))
    assert torch.equal(patched.sample(), model.sample())


def test_a_model_that_is_nan_by_itself_is_left_alone(patch, model, caplog):
    last = model.model.diffusion_model.blocks[-1]
    last.forward = lambda x, transformer_options: type(last).forward(last, x, transformer_options) * float("nan")
    patched = patch(model)
    assert patched.sample().isnan().all()
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "in 16 bit too" in caplog.messages[0]


def test_cross_attention_is_left_to_the_model_where_asked(patch, model):
    patched = patch(model, cross_attention="fp16")
    for block in model.model.diffusion_model.blocks:
        block.context = 2
    patched.sample()
    assert coverage(patched).reasons() == {"fp16": {"cross-attention": 4 * DEPTH}}


def test_training_steps_aside_with_a_reason_and_gets_its_gradients(patch, model):
    patched = patch(model)
    x = torch.randn(1, 5, 16, requires_grad=True)
    options = {**patched.model_options["transformer_options"], "sigmas": torch.ones(1)}
    patched.run("apply_model", patched.apply_model, x, torch.ones(1), None, None, None, options).sum().backward()
    assert x.grad.abs().sum() > 0
    assert coverage(patched).reasons() == {"fp16": {"gradients are wanted": DEPTH}}


def test_the_text_on_the_node_gives_calls_reasons_and_only_what_was_measured(patch, model):
    texts = []
    patch(model, fp16_blocks="2: 1", show=texts.append).sample()
    calls, fp16, speed = texts.pop().splitlines()
    assert calls.startswith("fp4_emulated 8 (")
    assert "fp4: needs a CUDA GPU" in calls
    assert fp16.startswith("fp16 4 (")
    assert fp16.endswith("): block override.")
    assert speed.endswith("x the speed of the model's own attention, measured (8 calls); no prediction: emulation")
    patch(model, show=texts.append).sample()
    assert texts.pop().splitlines()[1:] == ["speed-up not measured (verbose measures it); no prediction: emulation"]
    patch(model, verbose=True, show=texts.append).sample()
    assert "measured (12 calls); no prediction" in texts.pop()
    patch(model, kernels=kernels_that_fail({1}), show=texts.append).sample()
    assert "block 1 gave non-finite numbers" in texts.pop()


def test_measuring_the_speed_changes_no_result_and_no_count(patch, model):
    plain, measured = patch(model), patch(model, verbose=True)
    assert torch.equal(plain.sample(), measured.sample())
    assert coverage(plain).by_block() == coverage(measured).by_block()
