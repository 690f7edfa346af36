"""Calibration of a small network whose sensitivities are known: its blocks add to the output what they are worth."""

import copy
import functools
import itertools
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from sage_kernels.block_overrides import BlockId

GAINS = (1.0, 4.0, 2.0, 0.5)
HEADS, TOKENS = 2, 300
SIGMAS = (1.0, 0.9, 0.8, 0.6, 0.4, 0.2, 0.0)
STEPS = len(SIGMAS) - 1
LOW_ERROR = {"fp4": 0.1, "int8": 0.01}


class WanModel(nn.Module):
    """Denoised output: the sum of all blocks' attention on one and the same input, each times its gain."""

    def __init__(self, gains=GAINS):
        super().__init__()
        self.blocks = nn.ModuleList(Block(gain) for gain in gains)

    def forward(self, x, transformer_options):
        return sum(block(x, transformer_options) for block in self.blocks)


class Block(nn.Module):
    def __init__(self, gain):
        super().__init__()
        self.gain = nn.Parameter(torch.full((2, 2), gain))

    def forward(self, x, transformer_options):
        override = transformer_options.get("optimized_attention_override") or (lambda func, *a, **k: func(*a, **k))
        return self.gain[0, 0] * override(core_attention, x, x, x, heads=HEADS, transformer_options=transformer_options)


def core_attention(q, k, v, heads, **kwargs):
    q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k, v))
    return torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class Kernels:
    """sage_kernels with errors of known size: the exact result, a little larger."""

    def __init__(self, refusals=(), low_error=None):
        self.refusals, self.low_error, self.calls = refusals, low_error or LOW_ERROR, []

    def explain(self, q, k, v, *, precision, **options):
        return SimpleNamespace(kernel="sdpa" if self.refusals else precision, refusals=self.refusals)

    def attention(self, q, k, v, *, precision, layout="BHND", **options):
        self.calls.append((tuple(q.shape), tuple(k.shape)))
        if layout == "BNHD":
            q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        output = torch.nn.functional.scaled_dot_product_attention(q, k, v) * (1 + self.low_error[precision])
        return output.transpose(1, 2) if layout == "BNHD" else output


class FakePatcher:
    """The part of core's ModelPatcher that a calibration uses, and an Euler sampler with the wrappers."""

    def __init__(self, diffusion_model):
        self.model = SimpleNamespace(diffusion_model=diffusion_model, model_sampling=None)
        self.model_options = {"transformer_options": {}}
        self.wrappers = {}

    def get_model_object(self, name):
        return getattr(self.model, name)

    def clone(self):
        other = FakePatcher(self.model.diffusion_model)
        other.model_options = copy.deepcopy(self.model_options)
        other.wrappers = {kind: {key: list(w) for key, w in keys.items()} for kind, keys in self.wrappers.items()}
        return other

    def add_wrapper_with_key(self, kind, key, wrapper):
        self.wrappers.setdefault(kind, {}).setdefault(key, []).append(wrapper)

    def remove_wrappers_with_key(self, kind, key):
        self.wrappers.get(kind, {}).pop(key, None)

    def sample(self, sigmas=SIGMAS):
        sigmas = torch.tensor(sigmas)
        x = torch.randn(1, TOKENS, 16, generator=torch.Generator().manual_seed(0))
        model_options = {"transformer_options": {**self.model_options["transformer_options"], "sample_sigmas": sigmas}}
        for sigma, following in itertools.pairwise(sigmas):
            denoised = self.run("predict_noise", self.predict_noise, x, sigma[None], model_options, None)
            x = x + (x - denoised) / sigma * (following - sigma)
        return x

    def predict_noise(self, x, timestep, model_options, seed):
        options = {**model_options["transformer_options"], "sigmas": timestep}
        return self.run("apply_model", self.apply_model, x, timestep, None, None, None, options)

    def apply_model(self, x, t, c_concat, c_crossattn, control, transformer_options):
        return self.model.diffusion_model(x, transformer_options)

    def run(self, kind, function, *args):
        for wrapper in (w for wrappers in self.wrappers.get(kind, {}).values() for w in wrappers):
            function = functools.partial(wrapper, Executor(function, self.model))
        return function(*args)


class Executor:
    """core's WrapperExecutor: calls the next wrapper or the function itself."""

    def __init__(self, function, class_obj):
        self.function, self.class_obj = function, class_obj

    def __call__(self, *args):
        return self.function(*args)


@pytest.fixture
def calibration(pack_module, monkeypatch):
    core = ModuleType("comfy.patcher_extension")
    core.WrappersMP = SimpleNamespace(
        APPLY_MODEL="apply_model", OUTER_SAMPLE="outer_sample", PREDICT_NOISE="predict_noise"
    )
    monkeypatch.setitem(sys.modules, "comfy", ModuleType("comfy"))
    monkeypatch.setitem(sys.modules, "comfy.patcher_extension", core)
    return pack_module("calibration")


@pytest.fixture
def shadow_attention(calibration, pack_module):
    return pack_module("shadow_attention")


@pytest.fixture
def model():
    return FakePatcher(WanModel())


@pytest.fixture
def calibrate(calibration):
    def calibrate(model, kernels=None, progress=lambda: None, **settings):
        settings = calibration.CalibrationSettings(**settings)
        with torch.no_grad():
            return calibration.calibrate(
                model, lambda patched: patched.sample(), settings, kernels or Kernels(), progress=progress
            )

    return calibrate


def count_hooks(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.model.diffusion_model.modules())


def test_known_sensitivities_are_found(calibrate, model):
    profile, _ = calibrate(model, precisions=("fp4", "int8"))
    # All blocks see the same input, so each one's part of the output is its gain over the sum of gains.
    expected = torch.tensor(GAINS) / sum(GAINS)
    for precision, sensitivity in zip(profile.precisions, profile.sensitivity, strict=True):
        wanted = LOW_ERROR[precision] * expected[:, None].expand(-1, 3)
        torch.testing.assert_close(sensitivity, wanted, rtol=1e-3, atol=0)
    torch.testing.assert_close(profile.errors[0], torch.full((4, HEADS, 3), 0.1), rtol=1e-3, atol=0)
    torch.testing.assert_close(profile.errors[1], torch.full((4, HEADS, 3), 0.01), rtol=1e-3, atol=0)
    by_block = profile.sensitivity_by_block("fp4")
    assert sorted(by_block, key=by_block.get) == [BlockId("double", index) for index in (3, 0, 2, 1)]


def test_the_profile_says_what_was_measured(calibrate, model):
    profile, _ = calibrate(model)
    assert (profile.family, profile.heads, profile.steps) == ("Wan", (HEADS,) * 4, (1, 3, 5))
    assert profile.schedule == pytest.approx(SIGMAS)
    assert profile.sigmas == pytest.approx((0.9, 0.6, 0.2))
    assert profile.attention_share.tolist() == [0.25] * 4
    profile.check(model)


def test_final_errors_are_those_of_samplings_with_everything_low(calibrate, model, pack_module):
    profile, expected = calibrate(model)
    low = pack_module("model_patching").AttentionOverride(
        pack_module("attention_override").PrecisionPolicy("fp4"),
        Kernels(),
        native_blocks={},
    )
    patched = model.clone()
    patched.model_options["transformer_options"]["optimized_attention_override"] = low
    patched.add_wrapper_with_key("apply_model", "tracker", pack_module("block_tracking").BlockTracker(False))
    with torch.no_grad():
        full = pack_module("frame_metrics").relative_l1(patched.sample(), expected)
    assert full > 0.01
    assert float(profile.full_error[0]) == pytest.approx(full)


def test_what_is_sampled_is_the_16_bit_trajectory(calibrate, model):
    with torch.no_grad():
        assert torch.equal(calibrate(model)[1], model.sample())


@pytest.mark.parametrize("settings", [{}, {"steps_looked_at": 1}, {"steps_looked_at": 9}, {"max_groups": 2}])
def test_every_evaluation_is_announced_and_reported(calibrate, calibration, model, settings):
    counts = {"evaluations": 0, "progress": 0}

    def count(name):
        counts[name] += 1

    model.model.diffusion_model.register_forward_hook(lambda *_: count("evaluations"))
    calibrate(model, progress=lambda: count("progress"), **settings)
    announced = calibration.evaluations(calibration.CalibrationSettings(**settings), len(GAINS), STEPS)
    assert counts == {"evaluations": announced, "progress": announced}


def test_blocks_are_tried_at_the_middle_of_each_part_of_the_schedule(calibrate, model):
    evaluated = []

    def note(module, args):
        evaluated.append(round(float(args[1]["sigmas"]), 4))

    model.model.diffusion_model.register_forward_pre_hook(note)
    calibrate(model)
    samplings = 1 + 3 + 1  # 16 bit, each part in low precision, all in low precision
    extra = {sigma: evaluated.count(sigma) - samplings for sigma in SIGMAS[:-1]}
    assert extra == {1.0: 0, 0.9: 4, 0.8: 0, 0.6: 4, 0.4: 0, 0.2: 4}


@pytest.mark.parametrize("stop_at", [1, 2, 3, 8, 20, 40])
def test_an_interruption_leaves_the_model_clean(calibrate, model, stop_at):
    with torch.no_grad():
        before = model.sample()
    done = []

    def interrupt():
        done.append(1)
        if len(done) == stop_at:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        calibrate(model, progress=interrupt)
    assert (model.model_options, model.wrappers, count_hooks(model)) == ({"transformer_options": {}}, {}, 0)
    with torch.no_grad():
        assert torch.equal(model.sample(), before)


def test_an_error_inside_attention_leaves_the_model_clean(calibrate, model):
    kernels = Kernels()
    kernels.attention = lambda *args, **options: 1 / 0
    with pytest.raises(ZeroDivisionError):
        calibrate(model, kernels)
    assert (model.model_options, model.wrappers, count_hooks(model)) == ({"transformer_options": {}}, {}, 0)


def test_many_blocks_are_measured_in_groups_that_keep_their_common_effect(calibrate, model):
    alone, _ = calibrate(model)
    grouped, _ = calibrate(model, max_groups=2)
    # Two neighbours move the output in one direction here, so their effect is the sum; errors of attention are alike.
    for pair in ((0, 1), (2, 3)):
        together = alone.sensitivity[0, list(pair)].sum(dim=0)
        torch.testing.assert_close(grouped.sensitivity[0, list(pair)].square().sum(dim=0).sqrt(), together)
        torch.testing.assert_close(grouped.sensitivity[0, pair[0]], grouped.sensitivity[0, pair[1]])


def test_groups_hold_neighbours_of_one_type(calibration):
    blocks = [BlockId("double", index) for index in range(5)] + [BlockId("single", index) for index in range(6)]
    groups = calibration._group(blocks, 5)
    assert len(groups) <= 5
    assert [block for group in groups for block in group] == blocks
    assert all(len({block.type for block in group}) == 1 for group in groups)


@pytest.mark.parametrize(
    ("kernels", "settings", "part"),
    [
        (Kernels(refusals=("no FP4 tensor cores",)), {}, "fp4: no FP4 tensor cores"),
        (Kernels(), {"min_tokens": TOKENS + 1}, "fewer tokens than min_tokens"),
    ],
)
def test_a_model_that_nothing_can_be_measured_on_is_an_error_with_the_reason(
    calibrate, calibration, model, kernels, settings, part
):
    with pytest.raises(calibration.CalibrationError, match=part) as raised:
        calibrate(model, kernels, **settings)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("settings", [{"precisions": ("auto",)}, {"precisions": ()}, {"rows": 0}])
def test_impossible_settings_are_refused(calibration, settings):
    with pytest.raises(calibration.CalibrationError):
        calibration.CalibrationSettings(**settings)


def test_results_that_are_not_finite_are_the_worst_there_are(calibrate, pack_module, model):
    profile, _ = calibrate(model, Kernels(low_error={"fp4": float("nan")}))
    assert float(profile.full_error[0]) == pack_module("profile").LARGEST
    assert set(profile.sensitivity.flatten().tolist()) == {pack_module("profile").LARGEST}


def test_memory_is_bounded_by_heads_and_rows(calibrate, shadow_attention, model, monkeypatch):
    together, _ = calibrate(model)
    kernels = Kernels()
    monkeypatch.setattr(shadow_attention, "CHUNK_ELEMENTS", 1)
    one_by_one, _ = calibrate(model, kernels, rows=128)
    whole = (1, TOKENS, HEADS, 8)  # a block in low precision, as the model calls it
    shadow_calls = [call for call in kernels.calls if call[0] != whole]
    assert set(shadow_calls) == {((1, 1, 128, 8), (1, 1, TOKENS, 8))}
    torch.testing.assert_close(one_by_one.errors, together.errors, rtol=1e-3, atol=0)


@pytest.mark.parametrize(
    ("tokens", "rows", "starts"),
    [(1024, 256, [256, 768]), (1024, 100, [512]), (1000, 10_000, [0, 128, 256, 384, 512, 640, 768]), (300, 128, [128])],
)
def test_query_rows_are_sampled_in_whole_blocks(shadow_attention, tokens, rows, starts):
    sampled = shadow_attention.sampled_rows(tokens, rows, torch.device("cpu"))
    assert sampled.tolist() == [row for start in starts for row in range(start, start + 128)]


def test_few_query_rows_are_all_looked_at(shadow_attention):
    assert shadow_attention.sampled_rows(77, 256, torch.device("cpu")).tolist() == list(range(77))


class NoReading(TorchDispatchMode):
    """Refuses to bring a value from the device to Python."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func.overloadpacket is not torch.ops.aten._local_scalar_dense, "waits for the device"
        return func(*args, **(kwargs or {}))


def test_no_attention_call_waits_for_the_device(shadow_attention, pack_module):
    layout = pack_module("model_families").BlockLayout({"double": 1})
    native = {("double", 0): BlockId("double", 0)}
    shadow = shadow_attention.ShadowAttention(layout, ("fp4",), Kernels(), rows=256, native_blocks=native)
    shadow.slot = 0
    x = torch.randn(2, TOKENS, 16)
    options = {"block_type": "double", "block_index": 0}
    with NoReading():
        shadow(core_attention, x, x, x, heads=HEADS, transformer_options=options)
    errors, heads = shadow.errors(1)
    assert heads == (HEADS,)
    torch.testing.assert_close(errors, torch.full((1, 1, HEADS, 1), 0.1), rtol=1e-3, atol=0)
