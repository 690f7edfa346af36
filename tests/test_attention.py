"""The public functions: arguments, refusals, layouts, compilation."""

import gc
import weakref

import pytest
import torch

import sage_kernels
from sage_kernels import UnsupportedAttention, architectures, dispatch
from sage_kernels.architectures import ARCHITECTURES, find_architecture
from sage_kernels.attention_call import make_call
from sage_kernels.cli import main
from sage_kernels.kernels import KERNELS, find_kernel
from sage_kernels.precision import PRECISIONS
from sage_kernels.recipes import RECIPES
from sage_kernels.reference import quantized_attention

sdpa = torch.nn.functional.scaled_dot_product_attention


def qkv(*, rows=70, keys=90, heads=4, kv_heads=4, head_dim=32, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    shapes = [(heads, rows), (kv_heads, keys), (kv_heads, keys)]
    return [torch.randn(2, h, n, head_dim, generator=generator).to(dtype) for h, n in shapes]


def pretend_gpu(monkeypatch, capability):
    monkeypatch.setattr(dispatch, "device_architecture", lambda device: find_architecture(capability))


class FakeKernel:
    """A kernel of a precision that this machine can't run."""

    emulated = False

    def __init__(self, precision, reason=None):
        self.precision, self.name, self.reason = precision, f"{precision}_fake", reason

    def refuse(self, call, architecture):
        return self.reason


# ---------------------------------------------------------------- results


@pytest.mark.parametrize("precision", [p for p in PRECISIONS if p != "auto"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("layout", ["BHND", "BNHD"])
def test_output_has_the_shape_layout_and_dtype_of_the_query(precision, dtype, layout):
    q, k, v = qkv(dtype=dtype)
    expected = sdpa(q.float(), k.float(), v.float())
    if layout == "BNHD":
        q, k, v = (x.transpose(1, 2).contiguous() for x in (q, k, v))
    output = sage_kernels.attention(q, k, v, layout=layout, precision=precision, allow_emulation=True)
    assert output.shape == q.shape
    assert output.dtype == dtype
    output = output.transpose(1, 2) if layout == "BNHD" else output
    assert ((output.float() - expected).abs().sum() / expected.abs().sum()) < 0.25


def test_float32_is_rounded_to_bfloat16_by_quantised_rungs_only():
    q, k, v = qkv()
    rounded = [x.bfloat16() for x in (q, k, v)]
    output = sage_kernels.attention(q, k, v, precision="fp4", allow_emulation=True)
    assert torch.equal(output, quantized_attention(*rounded, RECIPES["fp4"])[0])
    assert torch.equal(sage_kernels.attention(q, k, v, precision="fp16"), sdpa(q, k, v))


@pytest.mark.parametrize("precision", ["fp16", "fp4", "int8"])
@pytest.mark.parametrize(
    "options", [{}, {"is_causal": True}, {"attn_mask": "bool"}, {"attn_mask": "additive"}], ids=str
)
def test_every_argument_is_obeyed(precision, options):
    q, k, v = qkv(heads=4, kv_heads=2)
    options = dict(options)
    lengths = torch.tensor([90, 40], dtype=torch.int32)
    allowed = torch.arange(90) < lengths[:, None, None, None]
    if options.get("is_causal"):
        allowed = allowed & torch.ones(70, 90, dtype=torch.bool).tril()
    bias = torch.zeros(2, 4, 70, 90)
    if "attn_mask" in options:
        mask = torch.rand(2, 1, 70, 90, generator=torch.Generator().manual_seed(3))
        options["attn_mask"] = mask > 0.4 if options["attn_mask"] == "bool" else mask * 3
        allowed = allowed & options["attn_mask"] if options["attn_mask"].dtype == torch.bool else allowed
        bias = bias if options["attn_mask"].dtype == torch.bool else bias + options["attn_mask"]
    scores = q @ k.repeat_interleave(2, dim=1).transpose(-1, -2) * 0.2 + bias
    scores = scores.masked_fill(~allowed, -torch.inf)
    expected = scores.softmax(-1) @ v.repeat_interleave(2, dim=1)
    output, lse = sage_kernels.attention(
        q, k, v, scale=0.2, enable_gqa=True, key_lengths=lengths, precision=precision, return_lse=True,
        allow_emulation=True, **options,
    )  # fmt: skip
    budget = {"fp16": 1e-5, "fp4": 0.2, "int8": 0.05}[precision]
    assert ((output - expected).abs().sum() / expected.abs().sum()) < budget
    assert (lse - scores.logsumexp(-1)).abs().mean() < {"fp16": 1e-5, "fp4": 0.06, "int8": 0.01}[precision]


@pytest.mark.parametrize("precision", ["fp16", "fp4", "int8"])
def test_inputs_are_never_changed_and_strides_are_free(precision):
    q, k, v = (x.transpose(2, 3).contiguous().transpose(2, 3) for x in qkv())
    before = [x.clone() for x in (q, k, v)]
    strided = sage_kernels.attention(q, k, v, precision=precision, allow_emulation=True)
    assert all(torch.equal(x, y) for x, y in zip((q, k, v), before, strict=True))
    dense = sage_kernels.attention(*(x.contiguous() for x in (q, k, v)), precision=precision, allow_emulation=True)
    assert torch.allclose(strided, dense, atol=1e-5)


def test_prepared_attention_holds_no_floating_point_key_or_value():
    q, k, v = qkv()
    expected = sage_kernels.attention(q, k, v, precision="int8", allow_emulation=True)
    alive = [weakref.ref(k), weakref.ref(v)]
    prepared = sage_kernels.prepare(q, k, v, precision="int8", allow_emulation=True)
    del k, v
    gc.collect()
    assert [ref() for ref in alive] == [None, None]
    assert torch.equal(sage_kernels.run(prepared), expected)


# ---------------------------------------------------------------- bad arguments


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"q": torch.ones(2, 3, 4)}, ValueError, "q must have 4 axes"),
        ({"q": "text"}, TypeError, "q must be a torch.Tensor"),
        ({"v": torch.ones(2, 4, 90, 16)}, ValueError, "k and v must have one shape"),
        ({"k": torch.ones(1, 4, 90, 32), "v": torch.ones(1, 4, 90, 32)}, ValueError, "same batch size"),
        ({"k": torch.ones(2, 4, 90, 16), "v": torch.ones(2, 4, 90, 16)}, ValueError, "same head_dim"),
        ({"k": torch.ones(2, 2, 90, 32), "v": torch.ones(2, 2, 90, 32)}, ValueError, "enable_gqa=True"),
        ({"k": torch.ones(2, 3, 9, 32), "v": torch.ones(2, 3, 9, 32), "enable_gqa": True}, ValueError, "multiple of"),
        ({"k": torch.ones(2, 4, 0, 32), "v": torch.ones(2, 4, 0, 32)}, ValueError, "at least one head and one token"),
        ({"k": torch.ones(2, 4, 90, 32).half()}, TypeError, "share one dtype"),
        ({"q": torch.ones(2, 4, 70, 32).double()}, TypeError, "float16, bfloat16 or float32"),
        ({"k": torch.ones(2, 4, 90, 32, device="meta")}, ValueError, "one device"),
        ({"attn_mask": torch.ones(70, 91, dtype=torch.bool)}, ValueError, "must broadcast to"),
        ({"attn_mask": torch.ones(70, 90, dtype=torch.int32)}, TypeError, "attn_mask must be bool"),
        ({"attn_mask": [1]}, TypeError, "attn_mask must be a torch.Tensor"),
        ({"attn_mask": torch.ones(70, 90, device="meta")}, ValueError, "attn_mask must be on"),
        ({"attn_mask": torch.ones(70, 90), "is_causal": True}, ValueError, "exclude each other"),
        ({"key_lengths": torch.tensor([1, 2])}, ValueError, "int32"),
        ({"key_lengths": [1, 2]}, TypeError, "int32 tensor"),
        ({"key_lengths": torch.ones(2, dtype=torch.int32, device="meta")}, ValueError, "key_lengths must be on"),
        ({"layout": "NHD"}, ValueError, "BHND, BNHD"),
        ({"precision": "fp2"}, ValueError, "auto, fp4, fp8_fp4, int8, int8_fp16, fp16"),
    ],
)
@pytest.mark.parametrize("function", [sage_kernels.attention, sage_kernels.explain, sage_kernels.prepare])
def test_bad_arguments_are_named_in_one_line(function, change, error, message):
    q, k, v = qkv()
    arguments = {"q": q, "k": k, "v": v} | change
    with pytest.raises(error, match=message) as raised:
        function(**arguments)
    assert "\n" not in str(raised.value)


def test_head_dim_above_256_is_named():
    x = torch.ones(1, 1, 4, 257)
    with pytest.raises(ValueError, match="1 to 256, got 257"):
        sage_kernels.attention(x, x, x)


# ---------------------------------------------------------------- choice of the kernel


def test_auto_on_cpu_uses_sdpa_and_says_why_not_more():
    decision = sage_kernels.explain(*qkv())
    assert (decision.kernel, decision.precision) == ("sdpa", "fp16")
    assert [refusal.kernel for refusal in decision.refusals] == ["fp4", "fp8_fp4", "int8", "int8_fp16"]
    assert all("needs a CUDA GPU" in refusal.reason for refusal in decision.refusals)


def test_quantised_precision_without_hardware_raises_with_the_reasons():
    with pytest.raises(UnsupportedAttention, match=r"needs a CUDA GPU.*allow_emulation=True") as raised:
        sage_kernels.attention(*qkv(), precision="fp4")
    assert raised.value.decision == sage_kernels.explain(*qkv(), precision="fp4")


def test_emulation_is_never_chosen_by_auto():
    assert sage_kernels.explain(*qkv(), allow_emulation=True).kernel == "sdpa"
    assert sage_kernels.explain(*qkv(), allow_emulation=True, precision="fp4").kernel == "fp4_emulated"


def test_inputs_that_require_gradients_are_refused_by_quantised_rungs():
    q, k, v = qkv()
    q.requires_grad_()
    with pytest.raises(UnsupportedAttention, match="trainable_attention"):
        sage_kernels.attention(q, k, v, precision="int8", allow_emulation=True)
    with torch.no_grad():
        sage_kernels.attention(q, k, v, precision="int8", allow_emulation=True)
    assert sage_kernels.attention(q, k, v).requires_grad


@pytest.mark.parametrize(
    ("capability", "precision", "reason"),
    [
        ((7, 5), "int8", "older than sm_80"),
        ((8, 9), "fp4", "no FP4 tensor cores"),
        ((9, 0), "fp4", "no FP4 tensor cores"),
        ((10, 0), "fp8_fp4", "tcgen05"),
        ((10, 3), "fp8_fp4", "tcgen05"),
        ((11, 0), "fp4", "tcgen05"),
        ((13, 0), "fp4", "not in the table"),
    ],
)
def test_each_architecture_says_why_not(monkeypatch, capability, precision, reason):
    pretend_gpu(monkeypatch, capability)
    decision = dispatch.decide(_call(precision))
    assert decision.kernel is None
    assert reason in decision.refusals[0].reason


def test_a_rung_without_a_kernel_says_so(monkeypatch):
    pretend_gpu(monkeypatch, (12, 0))
    decision = dispatch.decide(_call("fp8_fp4"), [each for each in KERNELS if each.emulated])
    assert decision.kernel is None
    assert "no kernel yet for Q, K in MXFP8" in decision.refusals[0].reason


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=lambda row: row.name)
def test_every_architecture_answers_for_every_precision(architecture):
    assert set(architecture.runnable) | set(architecture.refusals) == set(PRECISIONS[1:])
    assert not set(architecture.runnable) & set(architecture.refusals)


def test_blackwell_is_matched_exactly():
    assert "fp4" in find_architecture((12, 0)).runnable
    assert "fp8_fp4" not in find_architecture((10, 0)).runnable
    assert "fp4" not in find_architecture((11, 0)).runnable
    assert find_architecture((12, 5)).runnable == ("fp16",)


def test_a_kernel_that_never_ran_on_such_a_gpu_says_so(monkeypatch):
    pretend_gpu(monkeypatch, (10, 0))
    monkeypatch.setattr(find_kernel("nvfp4_triton").__class__, "refuse", lambda *arguments: None)
    decision = dispatch.decide(_call("fp4"))
    assert (decision.kernel, decision.precision, decision.never_run) == ("nvfp4_triton", "fp4", True)
    assert decision.refusals[0].reason == "is compiled for sm_120a and sm_121a only"
    assert "compiled for this GPU, never run on one" in str(decision)
    assert not dispatch.decide(_call("fp16")).never_run


def test_auto_takes_the_fastest_kernel_that_does_not_refuse(monkeypatch):
    pretend_gpu(monkeypatch, (12, 0))
    monkeypatch.setattr(dispatch, "slower_than_sixteen_bit", lambda *arguments: None)
    refusing, willing = FakeKernel("fp4", "no masks"), FakeKernel("int8")
    decision = dispatch.decide(_call("auto"), (refusing, willing, find_kernel("sdpa")))
    assert (decision.kernel, decision.precision) == ("int8_fake", "int8")
    assert str(decision.refusals[0]) == "fp4_fake: no masks"
    lines = str(decision).splitlines()
    assert lines[0] == "kernel: int8_fake (int8)"
    assert lines[2] == "  not fp4_fake: no masks"


def test_a_native_kernel_goes_before_emulation(monkeypatch):
    pretend_gpu(monkeypatch, (12, 0))
    call = _call("fp4", allow_emulation=True)
    emulated = [kernel for kernel in KERNELS if kernel.emulated]
    assert dispatch.decide(call, (FakeKernel("fp4"), *emulated)).kernel == "fp4_fake"
    assert dispatch.decide(call, (FakeKernel("fp4", "no"), *emulated)).kernel == "fp4_emulated"


def _call(precision, allow_emulation=False):
    return make_call(*qkv(), None, False, None, False, None, "BHND", precision, False, allow_emulation)


def test_kernel_names_are_unique_and_unknown_ones_are_named():
    names = [kernel.name for kernel in KERNELS]
    assert len(set(names)) == len(names)
    with pytest.raises(KeyError, match="sdpa"):
        find_kernel("missing")


def test_capabilities_list_this_machine(capsys):
    last = sage_kernels.capabilities()[-1]
    assert (last.device, last.precisions) == ("cpu", ("fp16",))
    assert main(["doctor"]) == 0
    assert "not fp4: needs a CUDA GPU" in capsys.readouterr().out


def test_amd_gpus_are_not_taken_for_cuda(monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "6.0")
    assert architectures.device_architecture(torch.device("cuda", 0)) is None


# ---------------------------------------------------------------- torch.compile


@pytest.mark.parametrize("precision", ["auto", "fp4"])
@pytest.mark.parametrize("return_lse", [False, True])
def test_compiles_without_graph_breaks(precision, return_lse):
    def layer(q, k, v):
        result = sage_kernels.attention(
            q * 2, k, v, precision=precision, return_lse=return_lse, layout="BNHD", allow_emulation=True
        )
        return tuple(x + 1 for x in result) if return_lse else result + 1

    q, k, v = (x.transpose(1, 2) for x in qkv())
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")(q, k, v)
    assert all(torch.equal(a, b) for a, b in zip(compiled, layer(q, k, v), strict=True))


def test_compiled_sixteen_bit_attention_is_differentiable():
    q, k, v = (x.requires_grad_() for x in qkv())
    torch.compile(sage_kernels.attention, fullgraph=True, backend="aot_eager")(q, k, v).sum().backward()
    assert q.grad is not None


@pytest.mark.parametrize("name", ["attention", "attention_with_lse"])
@pytest.mark.parametrize("layout", ["BHND", "BNHD"])
def test_operators_pass_torchs_own_checks(name, layout):
    arguments = (*qkv(heads=6, kv_heads=6, rows=6, keys=6), None, True, None, False, None, layout, "fp4", True)
    operator = getattr(torch.ops.sage_kernels, name).default
    torch.library.opcheck(operator, arguments, test_utils=("test_schema", "test_faketensor"))
