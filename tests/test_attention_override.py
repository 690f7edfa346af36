"""The override under ComfyUI's calling conventions: what reaches the kernels, what is left alone, and how."""

import copy
import logging
import threading
import types
import weakref
from dataclasses import dataclass

import pytest
import torch

from sage_kernels import Decision, Refusal
from sage_kernels.block_overrides import BlockId, StepShare
from sage_kernels.precision_policy import PrecisionPolicy

HEADS, HEAD_DIM, QUERIES, KEYS = 4, 8, 6, 10
BLOCK = BlockId("double", 3)
NATIVE = {"block_type": "double", "block_index": 3}
sdpa = torch.nn.functional.scaled_dot_product_attention


def core_attention(
    q, k, v, heads, mask=None, attn_precision=None, skip_reshape=False, skip_output_reshape=False, **kwargs
):
    """What core's attention functions compute, for all their conventions."""
    if not skip_reshape:
        head_dim = q.shape[-1] // heads
        q, k, v = (t.reshape(t.shape[0], t.shape[1], -1, head_dim).transpose(1, 2) for t in (q, k, v))
    if mask is not None:
        while mask.ndim < 4:
            mask = mask.unsqueeze(mask.ndim - 2)
    options = {name: kwargs[name] for name in ("scale", "enable_gqa") if name in kwargs}
    out = sdpa(q, k, v, attn_mask=mask, **options)
    return out if skip_output_reshape else out.transpose(1, 2).flatten(2)


class FakeKernels:
    """The API of sage_kernels: torch's attention, with a record of the calls."""

    def __init__(self, decision=None):
        self.decision = decision or Decision("fake_fp4", "fp4", ())
        self.calls = []
        self.watched = []

    def explain(self, q, k, v, **options):
        if isinstance(self.decision, Exception):
            raise self.decision
        return self.decision

    def attention(self, q, k, v, *, attn_mask, scale, enable_gqa, layout, precision, allow_emulation):
        self.calls.append((precision, allow_emulation))
        assert attn_mask is None or attn_mask.ndim == 4
        if layout == "BNHD":
            q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        out = sdpa(q, k, v, attn_mask=attn_mask, scale=scale, enable_gqa=enable_gqa)
        return out.transpose(1, 2) if layout == "BNHD" else out

    def prepare(self, q, k, v, **options):
        return types.SimpleNamespace(q=q.clone(), k=k.clone(), v=v.clone(), options=options)

    def run(self, prepared):
        self.alive_at_run = [ref for ref in self.watched if ref() is not None]
        return self.attention(prepared.q, prepared.k, prepared.v, **prepared.options)


class Container:
    """core's AttentionTensorContainer."""

    def __init__(self, tensor):
        self.tensor = tensor

    def peek(self):
        assert self.tensor is not None
        return self.tensor

    def take(self):
        tensor, self.tensor = self.peek(), None
        return tensor


@pytest.fixture
def module(pack_module):
    return pack_module("attention_override")


@pytest.fixture
def make(module):
    def make(policy=None, kernels=None, **options):
        options = {"native_blocks": {("double", 3): BLOCK}, **options}
        return module.AttentionOverride(policy or PrecisionPolicy("fp4"), kernels or FakeKernels(), **options)

    return make


def tensors(*, flat, heads=HEADS, kv_heads=HEADS, batch=2):
    generator = torch.Generator().manual_seed(0)
    shapes = [(heads, QUERIES), (kv_heads, KEYS), (kv_heads, KEYS)]
    qkv = [torch.randn(batch, h, n, HEAD_DIM, generator=generator) for h, n in shapes]
    return [t.transpose(1, 2).flatten(2) for t in qkv] if flat else qkv


def as_core_calls(**kwargs):
    return {"transformer_options": dict(NATIVE), "_inside_attn_wrapper": True, **kwargs}


def key_mask():
    mask = torch.zeros(2, 1, KEYS)
    mask[:, :, :3] = -torch.finfo(torch.float32).max
    return mask


# --- calling conventions ----------------------------------------------------------------------------------------------


@dataclass
class Convention:
    """How one family calls attention: positional arguments after q, k and v, and keywords."""

    family: str
    flat: bool
    rest: tuple = (HEADS,)
    keywords: dict = None
    kv_heads: int = HEADS


CONVENTIONS = [
    Convention("Wan", True, (), {"heads": HEADS}),
    Convention("Wan S2V", False, (), {"heads": HEADS, "skip_reshape": True, "skip_output_reshape": True}),
    Convention("Flux", False, (HEADS,), {"skip_reshape": True, "mask": None}),
    Convention("Hunyuan refiner", False, (HEADS,), {"skip_reshape": True, "mask": torch.ones(KEYS).bool()[None]}),
    Convention("Qwen-Image 0.3.64", True, (HEADS, None)),
    Convention("Qwen-Image", False, (HEADS, key_mask()), {"skip_reshape": True}),
    Convention("Lumina", False, (HEADS, torch.rand(2, 1, QUERIES, KEYS)), {"skip_reshape": True}),
    Convention("OmniGen2", False, (HEADS, None), {"skip_reshape": True, "enable_gqa": True}, kv_heads=2),
    Convention("LTX 0.3.64", True, (HEADS, torch.rand(QUERIES, KEYS)), {"attn_precision": None}),
    Convention("LTX", True, (HEADS,), {"mask": torch.rand(1, 1, KEYS), "attn_precision": None}),
    Convention("SDXL", True, (HEADS,), {"attn_precision": None}),
    Convention("SD 1.5 in FP16", True, (HEADS, None, torch.float16)),
    Convention("Cosmos", False, (HEADS,), {"skip_reshape": True, "skip_output_reshape": True, "mask": None}),
    Convention("everything by position", False, (HEADS, None, None, True, True)),
    Convention("grouped heads, flat", True, (HEADS,), {"enable_gqa": True}, kv_heads=1),
    Convention("a scale of its own", True, (HEADS,), {"scale": 1.0}),
    Convention("low precision welcome", True, (HEADS,), {"low_precision_attention": True}),
]


@pytest.mark.parametrize("convention", CONVENTIONS, ids=lambda convention: convention.family)
def test_kernels_compute_what_core_would(make, convention):
    qkv = tensors(flat=convention.flat, kv_heads=convention.kv_heads)
    kernels, keywords = FakeKernels(), convention.keywords or {}
    override = make(kernels=kernels)
    out = override(pytest.fail, *qkv, *convention.rest, **as_core_calls(**keywords))
    assert kernels.calls == [("fp4", False)]
    torch.testing.assert_close(out, core_attention(*qkv, *convention.rest, **keywords))


def test_values_may_come_with_their_heads_apart_as_in_stable_diffusion_3(make):
    q, k, v = tensors(flat=True)
    kernels = FakeKernels()
    out = make(kernels=kernels)(pytest.fail, q, k, v.unflatten(-1, (HEADS, HEAD_DIM)), heads=HEADS, **as_core_calls())
    assert kernels.calls == [("fp4", False)]
    torch.testing.assert_close(out, core_attention(q, k, v, HEADS))


@pytest.mark.parametrize("convention", CONVENTIONS, ids=lambda convention: convention.family)
def test_containers_are_emptied_and_computed_the_same(make, convention):
    qkv = tensors(flat=convention.flat, kv_heads=convention.kv_heads)
    keywords = convention.keywords or {}
    containers = [Container(t.clone()) for t in qkv]
    out = make().container_function(*containers, *convention.rest, **as_core_calls(**keywords))
    assert [container.tensor for container in containers] == [None] * 3
    torch.testing.assert_close(out, core_attention(*qkv, *convention.rest, **keywords))


def test_model_tensors_are_free_before_the_attention_runs(make):
    kernels = FakeKernels()
    containers = [Container(t) for t in tensors(flat=True)]
    kernels.watched = [weakref.ref(container.tensor) for container in containers]
    make(kernels=kernels).container_function(*containers, HEADS, **as_core_calls())
    assert kernels.alive_at_run == []


# --- stepping aside ---------------------------------------------------------------------------------------------------

STEP_ASIDE = {
    "full precision wanted": ({"low_precision_attention": False}, "low_precision_attention"),
    "float32 wanted": ({"attn_precision": torch.float32}, "attn_precision"),
    "unknown argument": ({"dropout": 0.1, "causal": True}, "unknown arguments: causal, dropout"),
    "mask with one axis": ({"mask": torch.zeros(KEYS)}, "mask with 1 axes"),
    "heads that don't divide": ({"heads": 5}, "[B, N, heads * D]"),
}


@pytest.mark.parametrize(("keywords", "reason"), STEP_ASIDE.values(), ids=STEP_ASIDE)
def test_calls_that_no_kernel_may_take_go_to_the_model_unchanged(make, keywords, reason):
    override = make(kernels=FakeKernels(AssertionError("not to be asked")))
    kwargs = as_core_calls(**{"heads": HEADS, **keywords})
    assert_left_alone(override, tensors(flat=True), kwargs, reason)


@pytest.mark.parametrize(
    ("decision", "reason"),
    [
        (Decision(None, None, (Refusal("fp4", "needs Blackwell"),)), "fp4: needs Blackwell"),
        (Decision("sdpa", "fp16", (Refusal("fp4", "too short"), Refusal("int8", "no"))), "fp4: too short; int8: no"),
        (ValueError("k and v must have one shape"), "k and v must have one shape"),
        (TypeError("q must be float16"), "q must be float16"),
    ],
)
def test_calls_that_the_kernels_refuse_go_to_the_model_unchanged(make, decision, reason):
    assert_left_alone(make(kernels=FakeKernels(decision)), tensors(flat=True), as_core_calls(heads=HEADS), reason)


def test_a_kernel_that_is_not_the_fastest_is_counted_with_the_reason(make):
    decision = Decision("fake_int8", "int8", (Refusal("fp4", "needs Blackwell"),))
    override = make(kernels=FakeKernels(decision))
    override(pytest.fail, *tensors(flat=True), HEADS, **as_core_calls())
    assert str(override.coverage) == "fake_int8 1: fp4: needs Blackwell (1)"


def test_gradients_are_left_to_the_model(make):
    qkv = tensors(flat=True)
    qkv[1].requires_grad_()
    assert_left_alone(make(), qkv, as_core_calls(heads=HEADS), "gradients")
    with torch.no_grad():
        make()(pytest.fail, *qkv, **as_core_calls(heads=HEADS))


def test_blocks_in_fp16_go_to_the_model_unchanged(make):
    policy = PrecisionPolicy("fp4", {BLOCK: StepShare(1.0)})
    assert_left_alone(make(policy), tensors(flat=True), as_core_calls(heads=HEADS), "block override")


@pytest.mark.parametrize("options", [{}, {"block_type": "single", "block_index": 3}, {"block": ("input", 1)}, None])
def test_attention_outside_known_blocks_goes_to_the_model_unchanged(make, options):
    kwargs = as_core_calls(heads=HEADS, transformer_options=options)
    assert_left_alone(make(), tensors(flat=True), kwargs, "outside the model's transformer blocks", block=None)


def assert_left_alone(override, qkv, kwargs, reason, block=BLOCK):
    seen = []
    result = object()
    assert override(lambda *args, **kw: seen.append((args, kw)) or result, *qkv, **kwargs) is result
    [(args, passed)] = seen
    assert all(a is b for a, b in zip(args, qkv, strict=True))
    assert passed.keys() == kwargs.keys()
    assert all(passed[name] is kwargs[name] for name in kwargs)
    assert override.coverage.by_block() == {block: {"fp16": 1}}
    [told] = override.coverage.reasons()["fp16"]
    assert reason in told


# --- chain ------------------------------------------------------------------------------------------------------------


def test_an_earlier_override_takes_the_calls_that_are_left(make):
    def earlier(func, *args, **kwargs):
        return "earlier", func, args, kwargs

    override = make(PrecisionPolicy("fp16"), previous=earlier)
    qkv, kwargs = tensors(flat=True), as_core_calls(heads=HEADS)
    assert override("func", *qkv, **kwargs) == ("earlier", "func", tuple(qkv), kwargs)
    assert override.coverage.by_kernel() == {"earlier override": 1}


def test_containers_that_are_left_go_to_core_still_full(make, module, monkeypatch):
    monkeypatch.setattr(module, "core_attention", lambda: lambda *args, **kwargs: (args, kwargs))
    containers, kwargs = [Container(t) for t in tensors(flat=True)], as_core_calls()
    result = make(PrecisionPolicy("fp16")).container_function(*containers, HEADS, **kwargs)
    assert result == ((*containers, HEADS), kwargs)
    assert all(container.tensor is not None for container in containers)


def test_containers_that_are_left_go_to_an_earlier_override_that_takes_them(make):
    earlier = types.SimpleNamespace(container_function=lambda *args, **kwargs: (args, kwargs))
    containers, kwargs = [Container(t) for t in tensors(flat=True)], as_core_calls()
    override = make(PrecisionPolicy("fp16"), previous=earlier)
    assert override.container_function(*containers, HEADS, **kwargs) == ((*containers, HEADS), kwargs)


def test_containers_that_are_left_are_opened_for_an_earlier_override_that_takes_tensors(make, module, monkeypatch):
    wrapped = types.SimpleNamespace(__wrapped__="core's function without its wrapper")
    monkeypatch.setattr(module, "core_attention", lambda: wrapped)
    qkv, kwargs = tensors(flat=True), as_core_calls()
    override = make(PrecisionPolicy("fp16"), previous=lambda func, *args, **kwargs: (func, args, kwargs))
    result = override.container_function(*map(Container, qkv), HEADS, **kwargs)
    assert result == (wrapped.__wrapped__, (*qkv, HEADS), kwargs)


# --- window -----------------------------------------------------------------------------------------------------------


class Sampling:
    """core's model_sampling: a linear schedule, shifted."""

    def __init__(self, shift=0.0):
        self.shift = shift

    def percent_to_sigma(self, percent):
        assert 0.0 < percent < 1.0
        return 1.0 - percent + self.shift


def precision_at(pack_module, override, sigma, sampling):
    tracking = pack_module("block_tracking")
    evaluation = tracking.ModelEvaluation([], sigma=sigma, model_sampling=sampling)
    token = tracking._evaluation.set(evaluation)
    try:
        before = override.coverage.by_kernel().get("fake_fp4", 0)
        override(core_attention, *tensors(flat=True), **as_core_calls(heads=HEADS))
        return "fp4" if override.coverage.by_kernel().get("fake_fp4", 0) > before else "fp16"
    finally:
        tracking._evaluation.reset(token)


def test_window_is_taken_from_the_sampling_that_runs(make, pack_module):
    override = make(window=(0.25, 1.0))
    assert override.reads_sigma
    linear, shifted = Sampling(), Sampling(shift=0.125)
    assert precision_at(pack_module, override, 0.8, linear) == "fp16"
    assert precision_at(pack_module, override, 0.7, linear) == "fp4"
    assert precision_at(pack_module, override, 0.8, shifted) == "fp4"
    assert precision_at(pack_module, override, 0.8, linear) == "fp16"


def test_window_without_a_known_noise_level_keeps_fp16(make, pack_module):
    override = make(window=(0.0, 0.5))
    assert precision_at(pack_module, override, None, Sampling()) == "fp16"
    assert_left_alone(make(window=(0.0, 0.5)), tensors(flat=True), as_core_calls(heads=HEADS), "noise level unknown")


def test_whole_run_needs_no_noise_level(make):
    assert not make().reads_sigma
    assert make(PrecisionPolicy("fp4", {BLOCK: StepShare(0.5)})).reads_sigma


# --- life of the override ---------------------------------------------------------------------------------------------


def test_emulation_is_asked_for_only_when_allowed(make):
    kernels = FakeKernels()
    make(kernels=kernels, allow_emulation=True)(pytest.fail, *tensors(flat=True), HEADS, **as_core_calls())
    assert kernels.calls == [("fp4", True)]


def test_cloning_a_model_shares_the_override(make):
    override = make()
    options = copy.deepcopy({"transformer_options": {"optimized_attention_override": override}})
    assert options["transformer_options"]["optimized_attention_override"] is override


def test_each_reason_is_logged_once(make, caplog):
    caplog.set_level(logging.INFO)
    override = make(kernels=FakeKernels(Decision(None, None, (Refusal("fp4", "needs Blackwell"),))))
    for _ in range(3):
        override(core_attention, *tensors(flat=True), HEADS, **as_core_calls())
    assert sum("needs Blackwell" in message for message in caplog.messages) == 1
    assert override.coverage.by_kernel() == {"fp16": 3}


def test_no_call_reads_a_tensor(make):
    """Meta tensors have no data: reading any, which on a GPU would wait for it, raises."""
    qkv = [t.to("meta") for t in tensors(flat=True)]
    mask = torch.zeros(2, 1, KEYS, device="meta")
    make()(pytest.fail, *qkv, HEADS, mask, **as_core_calls())


def test_counts_are_right_with_many_threads(make):
    override = make()
    qkv = tensors(flat=True)

    def attend():
        for _ in range(50):
            override(pytest.fail, *qkv, HEADS, **as_core_calls())

    threads = [threading.Thread(target=attend) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert override.coverage.by_block() == {BLOCK: {"fake_fp4": 200}}


def test_a_compiled_model_asks_anew_in_every_block(make, monkeypatch):
    compiling = []

    def explain(self, q, k, v, **options):
        compiling.append(torch.compiler.is_compiling())
        return self.decision

    override = make(native_blocks={("double", index): BlockId("double", index) for index in range(3)})

    def model(q, k, v):
        for index in range(3):
            options = {"block_type": "double", "block_index": index}
            q = override(core_attention, q, k, v, HEADS, **as_core_calls(transformer_options=options))
        return q

    monkeypatch.setattr(FakeKernels, "explain", explain)
    torch.compile(model, backend="eager")(*tensors(flat=True))
    assert compiling == [False] * 3
    assert override.coverage.by_block() == {BlockId("double", index): {"fake_fp4": 1} for index in range(3)}


def test_the_kernel_packages_prediction_reaches_the_report(make):
    override = make(kernels=FakeKernels(Decision("fake_fp4", "fp4", (), 0.002, 0.005)))
    for _ in range(3):
        override(core_attention, *tensors(flat=True), **as_core_calls(heads=HEADS))
    timing = override.timer.read()
    assert (timing.predicted_speedup, timing.predicted_calls) == (pytest.approx(2.5), 3)
