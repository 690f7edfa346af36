"""Calls of a form that was seen before take a shortcut, which must answer as the whole way does."""

import gc
import threading
import weakref

import pytest
import torch

import sage_kernels
from sage_kernels import planned_attention
from sage_kernels.call_form import FormCache, form_of_arguments
from sage_kernels.kernels import find_kernel
from sage_kernels.planned_attention import plan_attention, plan_with
from sage_kernels.recipes import RECIPES
from sage_kernels.reference import quantized_attention

# (attn_mask, is_causal, scale, enable_gqa, key_lengths, layout, precision, return_lse, allow_emulation)
OPTIONS = {
    "attn_mask": None,
    "is_causal": False,
    "scale": None,
    "enable_gqa": False,
    "key_lengths": None,
    "layout": "BHND",
    "precision": "auto",
    "return_lse": False,
    "allow_emulation": False,
}


@pytest.fixture(autouse=True)
def on_gpu(monkeypatch):
    """Calls are planned only on the GPU: tensors of the CPU pretend to be there. Each test starts without plans."""
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    monkeypatch.setattr(planned_attention, "_PLANNED", FormCache(8))
    monkeypatch.setattr(planned_attention, "_DECISIONS", FormCache(8))


def make_qkv(rows=40, keys=60, heads=2, kv_heads=2, dtype=torch.float16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    sizes = ((heads, rows), (kv_heads, keys), (kv_heads, keys))
    return [torch.randn(1, count, length, 32, generator=generator).to(dtype) for count, length in sizes]


def form(q, k, v, **changes):
    return form_of_arguments(q, k, v, *{**OPTIONS, **changes}.values())


def test_one_form_has_one_plan_and_other_tensors_give_other_results():
    options = {**OPTIONS, "precision": "int8", "allow_emulation": True}
    first, second = make_qkv(), make_qkv(seed=1)
    assert plan_attention(*first, *options.values()) is plan_attention(*second, *options.values())
    for qkv in (first, second):
        output = sage_kernels.attention(*qkv, precision="int8", allow_emulation=True)
        assert torch.equal(output, quantized_attention(*qkv, RECIPES["int8"])[0].to(output.dtype))


def test_every_argument_is_part_of_the_form():
    q, k, v = make_qkv()
    mask = torch.ones(40, 60, dtype=torch.bool)
    lengths = torch.ones(1, dtype=torch.int32)
    shifted = torch.cat([q.flatten()[:1], q.flatten()])[1:].view(q.shape)
    forms = [
        form(q, k, v),
        form(*make_qkv(rows=41)),
        form(*make_qkv(keys=61)),
        form(*make_qkv(dtype=torch.bfloat16)),
        form(shifted, k, v),
        form(q.transpose(2, 3).contiguous().transpose(2, 3), k, v),
        form(q, k[:, :, ::2], v[:, :, ::2]),
        form(q.clone().requires_grad_(), k, v),
        form(q.to("meta"), k, v),
        form(q, k, v, attn_mask=mask),
        form(q, k, v, attn_mask=mask.float()),
        form(q, k, v, attn_mask=mask[:1]),
        form(q, k, v, attn_mask=mask[:1].expand(40, 60)),
        form(q, k, v, key_lengths=lengths),
        *(form(q, k, v, **{name: True}) for name in ("is_causal", "enable_gqa", "return_lse", "allow_emulation")),
        form(q, k, v, scale=1.0),
        form(q, k, v, scale=0.0),
        form(q, k, v, layout="BNHD"),
        form(q, k, v, precision="fp16"),
    ]
    assert None not in forms
    assert len(set(forms)) == len(forms)
    assert form(*make_qkv(seed=3)) == forms[0]
    with torch.no_grad():
        assert form(q.clone().requires_grad_(), k, v) == forms[0]


@pytest.mark.parametrize("layout", ["BHND", "BNHD"])
@pytest.mark.parametrize("precision", ["fp16", "int8", "fp4"])
def test_the_shortcut_answers_as_the_whole_way(precision, layout, monkeypatch):
    q, k, v = make_qkv(heads=4)
    if layout == "BNHD":
        q, k, v = (x.transpose(1, 2).contiguous() for x in (q, k, v))
    mask = torch.rand(40, 60, generator=torch.Generator().manual_seed(1)) > 0.3
    lengths = torch.tensor([50], dtype=torch.int32)
    for options in ({}, {"is_causal": True}, {"attn_mask": mask}, {"key_lengths": lengths, "scale": 0.3}):
        arguments = {**options, "layout": layout, "precision": precision, "return_lse": True}

        def attend(arguments=arguments):
            return sage_kernels.attention(q, k, v, enable_gqa=True, allow_emulation=True, **arguments)

        results = [attend(), attend()]
        with monkeypatch.context() as patch:
            patch.setattr(planned_attention, "form_of_arguments", lambda *arguments: None)
            results.append(attend())
        for output, lse in results[:2]:
            assert torch.equal(output, results[2][0])
            assert torch.equal(lse, results[2][1])


def test_gradients_flow_through_16_bit_whatever_was_planned_before():
    q, k, v = make_qkv(dtype=torch.float32)
    sage_kernels.attention(q, k, v, precision="fp16")
    q.requires_grad_()
    sage_kernels.attention(q, k, v, precision="fp16").sum().backward()
    assert q.grad is not None
    assert q.grad.abs().sum() > 0
    with torch.no_grad():
        assert not sage_kernels.attention(q, k, v, precision="fp16").requires_grad


def test_quantised_rungs_refuse_gradients_after_a_call_without():
    q, k, v = make_qkv()
    options = {"precision": "int8", "allow_emulation": True}
    sage_kernels.attention(q, k, v, **options)
    with pytest.raises(sage_kernels.UnsupportedAttention, match="gradients"):
        sage_kernels.attention(q.requires_grad_(), k, v, **options)


def test_a_mask_that_wants_a_gradient_is_no_call_without():
    q, k, v = make_qkv()
    mask = torch.zeros(40, 60)
    options = {"precision": "int8", "allow_emulation": True}
    sage_kernels.attention(q, k, v, attn_mask=mask, **options)
    learned = mask.clone().requires_grad_()
    with pytest.raises(sage_kernels.UnsupportedAttention, match="gradients"):
        sage_kernels.attention(q, k, v, attn_mask=learned, **options)
    assert form(q, k, v, attn_mask=learned) != form(q, k, v, attn_mask=mask)
    with torch.no_grad():
        assert form(q, k, v, attn_mask=learned) == form(q, k, v, attn_mask=mask)
    q, k, v = make_qkv(dtype=torch.float32)
    sage_kernels.attention(q, k, v, attn_mask=learned, precision="fp16").square().sum().backward()
    assert learned.grad is not None
    assert learned.grad.abs().sum() > 0


def test_compiled_graphs_take_a_learned_mask_after_lengths_and_heads_changed(monkeypatch):
    monkeypatch.undo()  # a compiler must not see a pretended GPU
    torch.compiler.reset()
    compiled = torch.compile(sage_kernels.attention, fullgraph=True, backend="aot_eager")
    for heads, rows, keys in ((3, 8, 8), (2, 16, 20)):
        compiled(*make_qkv(rows, keys, heads, heads, torch.float32))
    q, k, v = make_qkv(40, 60, 4, 4, torch.float32)
    mask = torch.linspace(-1, 1, 60).repeat(40, 1).requires_grad_()
    expected = sage_kernels.attention(q, k, v, attn_mask=mask)
    assert torch.allclose(compiled(q, k, v, attn_mask=mask), expected)


def test_compiled_graphs_give_a_mask_its_gradient(monkeypatch):
    monkeypatch.undo()  # a compiler must not see a pretended GPU
    q, k, v = make_qkv(dtype=torch.float32)
    gradients = []
    for attend in (
        sage_kernels.attention,
        torch.compile(sage_kernels.attention, fullgraph=True, backend="aot_eager"),
    ):
        mask = torch.zeros(40, 60, requires_grad=True)
        attend(q, k, v, attn_mask=mask).square().sum().backward()
        gradients.append(mask.grad)
    assert gradients[0].abs().sum() > 0
    assert torch.allclose(*gradients)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"q": [1, 2]}, TypeError, "q must be a torch.Tensor, got list"),
        ({"k": None}, TypeError, "k must be a torch.Tensor"),
        ({"q": torch.zeros(3, 4)}, ValueError, "4 axes"),
        ({"attn_mask": [True]}, TypeError, "attn_mask must be a torch.Tensor, got list"),
        ({"key_lengths": 5}, TypeError, "key_lengths must be an int32 tensor"),
        ({"layout": ["BHND"]}, ValueError, "layout must be one of"),
        ({"layout": "NHBD"}, ValueError, "layout must be one of"),
        ({"precision": "int4"}, ValueError, "precision"),
        ({"scale": "large"}, ValueError, "large"),
        ({"scale": [1.0]}, TypeError, "list"),
    ],
)
def test_errors_are_those_of_the_whole_way_each_time(arguments, error, words):
    tensors = dict(zip("qkv", make_qkv(), strict=True))
    options = {name: value for name, value in arguments.items() if name not in tensors}
    tensors |= {name: value for name, value in arguments.items() if name in tensors}
    for _ in range(2):
        for function in (sage_kernels.attention, sage_kernels.explain, sage_kernels.prepare):
            with pytest.raises(error, match=words):
                function(*tensors.values(), **options)
    assert len(planned_attention._PLANNED) == 0


def test_what_is_refused_is_refused_each_time():
    for _ in range(2):
        with pytest.raises(sage_kernels.UnsupportedAttention, match="needs a CUDA GPU"):
            sage_kernels.attention(*make_qkv(), precision="fp4")


def test_a_scale_in_a_tensor_is_read_each_time():
    q, k, v = make_qkv()
    scale = torch.tensor(0.1)
    before = sage_kernels.attention(q, k, v, scale=scale)
    scale.fill_(2.0)
    assert not torch.equal(sage_kernels.attention(q, k, v, scale=scale), before)


def test_decisions_are_remembered(monkeypatch):
    q, k, v = make_qkv()
    first = sage_kernels.explain(q, k, v)
    monkeypatch.setattr(planned_attention, "decide", None)
    assert sage_kernels.explain(q, k, v) is first


def test_plans_keep_no_tensors():
    q, k, v = make_qkv()
    alive = [weakref.ref(x) for x in (q, k, v)]
    for precision in ("fp16", "int8"):
        sage_kernels.attention(q, k, v, precision=precision, allow_emulation=True)
        sage_kernels.explain(q, k, v, precision=precision)
    del q, k, v
    gc.collect()
    assert [ref() for ref in alive] == [None] * 3
    assert len(planned_attention._PLANNED) == 2


def test_prepare_and_run_are_planned_too():
    q, k, v = make_qkv()
    expected = sage_kernels.attention(q, k, v)
    prepared = sage_kernels.prepare(q, k, v)
    assert torch.equal(sage_kernels.run(prepared), expected)
    assert len(planned_attention._PLANNED) == 1


def test_a_kernel_can_be_given():
    q, k, v = make_qkv()
    plan_with(find_kernel("int8_emulated"), q, k, v, *OPTIONS.values())
    output = sage_kernels.attention(q, k, v)
    assert torch.equal(output, quantized_attention(q, k, v, RECIPES["int8"])[0].to(output.dtype))


def test_compiled_graphs_are_right_beside_plans(monkeypatch):
    q, k, v = make_qkv(dtype=torch.float32)
    eager = sage_kernels.attention(q, k, v)
    monkeypatch.undo()  # a compiler must not see a pretended GPU
    compiled = torch.compile(sage_kernels.attention, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(q, k, v), eager)


def test_tensors_off_the_gpu_and_subclasses_go_the_whole_way(monkeypatch):
    q, k, v = make_qkv()
    assert form(torch.nn.Parameter(q), k, v) is None
    monkeypatch.undo()
    assert form(q, k, v) is None


# ---------------------------------------------------------------- the cache


def test_the_least_recently_used_form_is_dropped():
    cache = FormCache(2)
    cache.put("a", 1)
    cache.put("b", 2)
    assert cache.get("a") == 1
    cache.put("c", 3)
    assert [cache.get(name) for name in "abc"] == [1, None, 3]
    cache.put("c", 4)
    assert (cache.get("c"), len(cache)) == (4, 2)


def test_threads_can_use_the_cache_at_once():
    cache, errors = FormCache(4), []

    def work(start):
        try:
            for number in range(2000):
                name = (start * 7 + number) % 9
                assert cache.get(name) in (None, name + 1)
                cache.put(name, name + 1)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(start,)) for start in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert len(cache) <= 4
